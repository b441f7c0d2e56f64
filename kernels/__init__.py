"""Triton kernels, one file per op (formula, forward, backward, launchers), imported as `mvdream_fast.kernels`."""

if __name__ != "mvdream_fast.kernels":
    # From the repository root a bare `import kernels` finds this folder, which is another package's name on PyPI.
    # Only its use raises: transformers imports that package to ask for its version, and must be able to find none.
    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("import mvdream_fast.kernels instead of the repository's top-level folder `kernels`")

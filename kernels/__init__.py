"""Triton kernels, one file per op (formula, forward, backward, launchers), imported as `mvdream_fast.kernels`."""

if __name__ != "mvdream_fast.kernels":
    # From the repository root a bare `import kernels` would find this folder, which is another package's name on PyPI.
    raise ImportError("import mvdream_fast.kernels instead of the repository's top-level folder `kernels`")

"""What can be known about the Triton kernels without a GPU: `python benchmarks/kernel_report`, in the source tree."""

"""The noise schedule, sampling, and the guided call of the denoiser."""

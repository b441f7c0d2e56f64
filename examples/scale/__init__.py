"""What 1 to 1,000 GPUs make of three jobs, simulated: the figures of docs/scale.md. See __main__.py."""

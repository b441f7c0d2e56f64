"""The 3D side: hash-grid volume, occupancy grid, renderer, mesh extraction and export; knows nothing of diffusion."""

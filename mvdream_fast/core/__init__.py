"""Leaves: what every room uses, and what knows no 3D and no diffusion."""

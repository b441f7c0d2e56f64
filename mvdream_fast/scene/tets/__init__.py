"""Meshes that are optimised: of a signed distance on a lattice of tetrahedra, or fixed ones for their texture."""

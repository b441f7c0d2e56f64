"""The occupancy-grid estimator under nerfacc's name for it; it lives one folder up."""

from mvdream_fast.nerfacc_compat.occ_grid import OccGridEstimator

__all__ = ["OccGridEstimator"]

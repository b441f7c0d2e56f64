"""A density volume on a hash grid, its occupancy and its renderer."""

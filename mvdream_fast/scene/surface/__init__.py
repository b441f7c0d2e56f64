"""A surface: a signed distance on a hash grid, and what it hides of its background."""

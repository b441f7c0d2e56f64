"""Measures of models and assets, and the small judge that makes them."""

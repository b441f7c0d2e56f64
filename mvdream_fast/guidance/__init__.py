"""What the rendered views should rather be."""

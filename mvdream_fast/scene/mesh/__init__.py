"""Triangles taken from a representation: extraction, texture, files, animations."""

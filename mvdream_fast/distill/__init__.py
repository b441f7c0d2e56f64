"""A text-to-3D run: what is asked for, its state, its memory, and what it shows."""

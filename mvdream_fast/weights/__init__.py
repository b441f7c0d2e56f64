"""The embedded model and its evaluator, as package data; no code lives here."""

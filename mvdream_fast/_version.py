"""The version, read by setup.py and shown as mvdream_fast.__version__; nothing else lives here."""

__version__ = "0.1.0"

"""The version, readable without importing torch (the build reads it from here)."""

__version__ = "0.2.0"

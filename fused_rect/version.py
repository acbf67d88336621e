"""The versions, readable without importing torch (the build reads the first one from here)."""

__version__ = "0.2.0"
NEWEST_TORCH = (2, 14)  # that the tests were run with (tests/versions.py); a later one is warned of at import

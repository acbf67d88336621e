"""A warning where torch is newer than any that the tests were run with: imported before anything that may lack a name.

The package builds on some of torch's private names (internals.py), and its calls in C++ on torch's headers. Where these
no longer compile, calls are served through Python, with a warning of their own.
"""

from __future__ import annotations

import re
import warnings

import torch

from .version import NEWEST_TORCH, __version__


def warn(found: str) -> None:
    """UserWarning if ``found``, a version of torch, is of a later minor release than NEWEST_TORCH."""
    number = re.match(r"(\d+)\.(\d+)", found)
    if number is None or (int(number[1]), int(number[2])) <= NEWEST_TORCH:
        return
    newest = ".".join(map(str, NEWEST_TORCH))
    warnings.warn(
        f"torch {found} is newer than {newest}, the newest that fused_rect {__version__} was tested with; it is used "
        f"as far as it works. If something fails, install a newer fused_rect, or torch {newest}.",
        stacklevel=4,  # whatever imports fused_rect
    )


warn(torch.__version__)

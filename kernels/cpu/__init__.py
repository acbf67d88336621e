"""The native CPU path: C++ kernels that are built at first use."""

from . import build
from .launch import backward, direct, forward


def available() -> bool:
    """Whether the kernels are here; the first call builds them."""
    try:
        build.library()
    except build.BuildError:
        return False
    return True


def reason() -> str:
    """Why they are, or are not, as a sentence."""
    try:
        return f"cpu tensors run C++ kernels, {build.library()._name}"
    except build.BuildError as error:
        return str(error)


def calls() -> str:
    """Whether calls reach the kernels without Python in between, or why they do not, as a sentence."""
    try:
        return f"C++, {build.library(build.DIRECT)._name}"
    except build.BuildError as error:
        return f"Python, slower for small tensors: {error}"


__all__ = ["available", "backward", "calls", "direct", "forward", "reason"]

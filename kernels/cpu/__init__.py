"""The native CPU path: C++ kernels that are built at first use."""

from . import build
from .launch import backward, forward


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


__all__ = ["available", "backward", "forward", "reason"]

"""fused_rect: a convolution's bias-add and its rectifier in one pass (ReLU, Leaky ReLU, PReLU, RReLU).

    import fused_rect as fr
    layer = fr.nn.ConvRReLU2d(64, 64, 3, padding=1)      # a drop-in for nn.Sequential(nn.Conv2d(...), nn.RReLU())

Importing compiles, launches and downloads nothing; Triton is imported when a Triton path first runs.
"""

from . import untried  # noqa: F401  # warns before an import below may fail

# isort: split
from . import decompose, functional, nn, random
from .backends import backend
from .fusion import fuse, unfuse
from .version import __version__

__all__ = ["__version__", "backend", "decompose", "functional", "fuse", "nn", "random", "unfuse"]

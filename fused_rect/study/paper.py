"""The figures that Xu et al. 2015 (arXiv 1505.00853) report: always shown as the paper's, never as this study's.

Read from the paper's tables. It states neither a number of seeds nor whether training errors are of train or eval mode.
"""

from __future__ import annotations

# variant: CIFAR-10 (train, test) error, CIFAR-100 (train, test) error, NDSB (train, validation) log-loss
RESULTS: dict[str, dict[str, tuple[float, float]]] = {
    "relu": {"cifar-10": (0.00318, 0.1245), "cifar-100": (0.1356, 0.429), "ndsb": (0.8092, 0.7727)},
    "leaky100": {"cifar-10": (0.0031, 0.1266), "cifar-100": (0.11552, 0.4205), "ndsb": (0.7846, 0.7601)},
    "leaky5.5": {"cifar-10": (0.00362, 0.1120), "cifar-100": (0.08536, 0.4042), "ndsb": (0.7831, 0.7391)},
    "prelu": {"cifar-10": (0.00178, 0.1179), "cifar-100": (0.0633, 0.4163), "ndsb": (0.7187, 0.7454)},
    "rrelu": {"cifar-10": (0.00550, 0.1119), "cifar-100": (0.1141, 0.4025), "ndsb": (0.8090, 0.7292)},
}
COLUMNS = {
    "cifar-10": "CIFAR-10 test error",
    "cifar-100": "CIFAR-100 test error",
    "ndsb": "NDSB validation log-loss",
}
CAVEATS = (
    "The paper's networks saw other images at full size: its columns are for orientation, none is expected to match.",
    "On CIFAR-10 the paper's RReLU and its Leaky ReLU with a = 5.5 differ by one image of 10,000, and its Leaky ReLU "
    "with a = 100 is worse than its ReLU.",
    "The paper states no number of seeds, so its differences have no interval.",
)

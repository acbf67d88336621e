"""What fixes a run's numbers: the protocol, its public presets, and how far a study departs from them.

The command line's options are this dataclass's fields, so that nothing can differ between runs without being recorded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Protocol:
    """The public NIN configuration for CIFAR-10 by default."""

    data: str = _option("cifar-10", "auto, cifar-10, cifar-100, ndsb, fashion-mnist or digits")
    network: str = _option("nin", "the network", ("nin", "ndsb", "inception"))
    width: float = _option(1.0, "factor on the channels")
    image: int = _option(0, "side of the images after averaging blocks; 0: as they are")
    train_images: int = _option(0, "size of each seed's training subset; 0: all")
    split: str = _option("test", "what to report on; validation: held-out training images", ("test", "validation"))
    validation_images: int = _option(0, "training images held out of every run, 0: none; the same ones for all seeds")
    preprocess: str = _option(
        "raw", "raw: 0 .. 255; mean: minus the channel means, / 255; standardize: (x - mean) / sd of the subset",
        ("raw", "mean", "standardize"),
    )  # fmt: skip
    augment: str = _option("none", "crop-mirror: random crops of 7/8 the side, mirrored", ("none", "crop-mirror"))
    dropout: float = _option(0.5, "probability of each dropout")
    rectified_scores: bool = _option(True, "a rectifier after NIN's last convolution, whose outputs are the scores")
    law: str = _option("divisor", "RReLU's law: divisor ~ U(3, 8), or slope ~ U(1/8, 1/3)", ("divisor", "slope"))
    init: str = _option("0.05", "standard deviation of the initial weights, or he for sqrt(2 / fan-in)")
    lr: float = _option(0.1, "learning rate")
    momentum: float = _option(0.9, "momentum of SGD")
    weight_decay: float = _option(1e-4, "weight decay of convolution and linear weights; PReLU's slopes have none")
    batch_size: int = _option(128, "images in a global batch, over all processes")
    iterations: int = _option(120_000, "updates; 0: count --epochs instead")
    epochs: int = _option(0, "passes over the training subset, where --iterations is 0")
    drop_at: float = _option(100 / 120, "part of the updates after which the learning rate drops")
    drop_factor: float = _option(0.1, "what the learning rate drops by")
    bias_lr: float = _option(2.0, "factor on the learning rate of biases, which have no weight decay")
    last_lr: float = _option(0.1, "factor on the learning rate of the last layer")
    amp: str = _option("none", "autocast dtype", ("none", "bf16", "fp16"))
    channels_last: bool = _option(False, "channels_last memory format")
    epilogue: str = _option("fused", "fused layers, or the same network of plain torch layers", ("fused", "eager"))

    def __post_init__(self) -> None:
        for f in fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {getattr(self, f.name)!r}")
        for name in ("lr", "batch_size", "width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.iterations < 0 or self.epochs < 0 or not self.iterations + self.epochs:
            raise ValueError(f"iterations or epochs must be > 0, got {self.iterations} and {self.epochs}")
        if self.split == "validation" and self.validation_images <= 0:
            raise ValueError("split validation needs validation_images > 0: how many training images to hold out")

    def updates(self, images: int) -> int:
        return self.iterations or self.epochs * self.batches(images)

    def batches(self, images: int) -> int:
        """Updates in one pass over ``images``; the last one has what is left, so every image counts once."""
        return -(-images // self.batch_size)

    def lr_at(self, step: int, updates: int) -> float:
        return self.lr * (self.drop_factor if step >= round(self.drop_at * updates) else 1.0)


NIN_CIFAR10 = Protocol()
PUBLIC = {
    "nin": NIN_CIFAR10,
    # No solver settings of the plankton network were found: these are ours.
    "ndsb": replace(
        NIN_CIFAR10, data="ndsb", network="ndsb", lr=0.01, weight_decay=5e-4, bias_lr=1.0, last_lr=1.0,
        init="he", preprocess="mean",
    ),
    "inception": replace(
        NIN_CIFAR10, data="cifar-100", network="inception", law="slope", batch_size=64, lr=0.05,
        iterations=0, epochs=46, drop_at=39 / 46, drop_factor=0.2, bias_lr=1.0, last_lr=1.0,
        preprocess="mean", augment="crop-mirror", init="he", dropout=0.0,
    ),
}  # fmt: skip
SOURCE = {
    "nin": "the public NIN configuration for CIFAR",
    "ndsb": "settings of our own, since none were found for the plankton network",
    "inception": "the published log of the 75.68 % run; initial weights unverified",
}


def public(network: str, data: str) -> Protocol:
    """The settings that a study of ``network`` on ``data`` is held against."""
    if network == "nin" and data == "cifar-100":
        return replace(NIN_CIFAR10, data=data, lr=0.01, weight_decay=1e-3)
    return PUBLIC[network]


# A study of minutes on two cores. lr: see docs/study.md, chosen on held-out training images.
SMALL = replace(
    NIN_CIFAR10, data="auto", width=1 / 8, image=14, train_images=1000, iterations=0, epochs=40, dropout=0.0,
    preprocess="standardize", init="he", rectified_scores=False, lr=0.02, last_lr=1.0, batch_size=32,
)  # fmt: skip

_EXECUTION = ("amp", "channels_last", "epilogue", "split")


def deviations(protocol: Protocol) -> list[str]:
    """Each way in which ``protocol`` departs from the public settings, as a sentence fragment for the report."""
    reference = public(protocol.network, protocol.data)
    found = []
    for f in fields(protocol):
        ours, theirs = getattr(protocol, f.name), getattr(reference, f.name)
        if ours != theirs and f.name not in _EXECUTION:
            found.append(f"{f.name.replace('_', ' ')}: {_said(f.name, ours)}, public: {_said(f.name, theirs)}")
    return found


def _said(name: str, value: Any) -> str:
    unset = {"image": "as it is", "train_images": "all", "iterations": "by epochs", "epochs": "by iterations"}
    if value == 0 and name in unset:
        return unset[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def identity(protocol: Protocol, variant: str, seed: int, data_fingerprint: str, world_size: int) -> str:
    """A hash of all that fixes a run's numbers: a checkpoint of another run is refused by it.

    Where the numbers are reported does not change the training, but it changes the held-out images, so it counts too.
    """
    everything = {**asdict(protocol), "variant": variant, "seed": seed, "data": data_fingerprint, "world": world_size}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

"""One process or many: what a rank trains on, what it draws, and how counts are summed.

A global batch is cut into contiguous shares; gradients are summed over its images and divided by their exact number, so
the number of processes changes the order of summation alone. Nothing is padded: a share may be smaller, or empty.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def start(device: str) -> torch.device:
    """The device of this process; under `torchrun` the process group is started first (NCCL on GPUs, else gloo)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return chosen


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: T) -> T:
    """This rank's contiguous part of a sequence or tensor; parts differ by at most one item, and none is padded."""
    count, ranks = len(items), world_size()  # type: ignore[arg-type]
    return items[rank() * count // ranks : (rank() + 1) * count // ranks]  # type: ignore[index, no-any-return]


def key(*numbers: int) -> int:
    """A 64-bit seed from ``numbers``: what a rank draws at a step depends on (seed, step, rank) alone.

    So ranks draw independently of each other, a run that is resumed draws what it would have drawn, and no state of a
    generator has to be kept.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def total(values: Tensor) -> Tensor:
    """The sum over all ranks of a small tensor."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(values: Tensor) -> Tensor:
    """The tensors of all ranks, (ranks, ...)."""
    if not dist.is_initialized():
        return values[None]
    everyone = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(everyone, values)
    return torch.stack(everyone)


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank, so that machines need not share a disk."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    return value


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` under DistributedDataParallel; BatchNorm sees the global batch on GPUs (gloo has no such kernel)."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(model, [device.index])
    return nn.parallel.DistributedDataParallel(model)

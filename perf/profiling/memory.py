"""Peak live bytes of a call: on a GPU the caching allocator's own count, on a CPU the profiler's allocation events.

Never resident memory, which follows the allocator and not the tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree


def peak_live_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The peak, in bytes, of what ``run`` allocated on ``device`` and had not freed yet."""
    device = torch.device(device)
    return _peak_on_cpu(run) if device.type == "cpu" else _peak_on_accelerator(run, device)


def _peak_on_accelerator(run: Callable[[], Any], device: torch.device) -> int:
    module: Any = torch.get_device_module(device)
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    run()
    module.synchronize(device)
    return int(module.max_memory_allocated(device) - before)


def _peak_on_cpu(run: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return peak


def kept_bytes(run: Callable[[], Any]) -> int:
    """Bytes that ``run`` keeps for backward or returns, without leaves; memory that two share counts once."""
    kept: dict[int, int] = {}
    leaves: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_leaf and tensor.requires_grad:
            leaves.add(storage.data_ptr())
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    for tensor in _pytree.tree_leaves(result):
        if isinstance(tensor, torch.Tensor):
            keep(tensor)
    return sum(size for pointer, size in kept.items() if pointer not in leaves)

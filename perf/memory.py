"""Peak live bytes of a call, from the profiler's allocation events: resident memory would follow the allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_live_bytes(run: Callable[[], Any]) -> int:
    """The peak, in bytes, of what ``run`` allocated on the CPU and had not freed yet."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, size in events:
        live += size
        peak = max(peak, live)
    return peak

"""How long a call takes, by one of three clocks.

| clock | on a CPU | on a GPU |
|---|---|---|
| call | the mean of as many calls as fill the sample | the median of `triton.testing.do_bench`: what a call takes, the cache emptied before it |
| graph | - | the device alone: calls captured in a CUDA graph and replayed, so that no time of the host's is in it |
| host | - | the host alone: calls issued one after the other, the device left behind |

The last is the host's where the device takes less than the host does for a call: for small tensors.
"""  # noqa: E501

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

CLOCKS = ("call", "graph", "host")
Call = Callable[[], Any]
# Calls a graph: launching it costs some 10 us, which many short calls share; each long one costs a graph's nodes.
LEAST_CALLS, MOST_CALLS = 4, 64
# Launches that wait for the device before the host waits for them are 1024; a step has no more than a dozen.
HOST_CALLS = 50


def sampler(run: Call, device: str, least: float, clock: str = "call") -> Callable[[], float]:
    """Warms ``run`` up; the function returned takes one sample of at least ``least`` seconds, in seconds a call.

    Raises what capturing ``run`` raises where it cannot be captured in a CUDA graph.
    """
    run()
    if torch.device(device).type == "cpu":
        from torch.utils.benchmark import Timer

        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        number = max(1, round(least / timer.timeit(1).mean))
        return lambda: float(timer.timeit(number).mean)
    return {"call": _whole, "graph": _on_the_device, "host": _on_the_host}[clock](run, least)


def _whole(run: Call, least: float) -> Callable[[], float]:
    from triton.testing import do_bench

    return lambda: float(do_bench(run, warmup=5, rep=max(10, 1e3 * least), return_mode="median")) * 1e-3


def _on_the_host(run: Call, least: float) -> Callable[[], float]:
    def sample() -> float:
        spent, calls = 0.0, 0
        while spent < least:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                run()
            spent += time.perf_counter() - start
            calls += HOST_CALLS
        torch.cuda.synchronize()
        return spent / calls

    return sample


def _on_the_device(run: Call, least: float) -> Callable[[], float]:
    once = _events(captured(run, LEAST_CALLS)) / LEAST_CALLS
    calls = min(max(round(least / once), LEAST_CALLS), MOST_CALLS)
    replay = captured(run, calls)
    replays = max(1, round(least / (once * calls)))
    return lambda: _events(replay, replays) / calls


def _events(run: Call, times: int = 1) -> float:
    """Seconds a ``run`` between two events on the device, after one that is not timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / times


def captured(run: Call, calls: int = 1) -> Call:
    """``run`` captured ``calls`` times in a CUDA graph, after warm-up on a side stream; what is returned replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # an older graph that is freed now would spoil the capture
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    finally:
        gc.enable()
    return graph.replay

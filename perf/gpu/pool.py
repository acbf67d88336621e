"""Work for all cores, each process with a context of its own on the GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

MOST = 16  # processes: a context takes half a GB of the GPU
T = TypeVar("T")
R = TypeVar("R")


def pooled(work: Callable[[T], R], items: Sequence[T], worth: int) -> Iterator[R]:
    """``work`` of each of ``items``, in their order.

    worth: so many items are worth a process, which takes seconds to start; fewer than twice as many are done here.
    """
    processes = min(os.cpu_count() or 1, MOST, len(items) // worth)
    if processes < 2:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, items)

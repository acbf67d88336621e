"""All runs of a study: one after another under torchrun, else on as many cores as asked for, one thread each.

Results do not depend on the number of jobs. Each run keeps its own folder, so a study that was killed goes on.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch

from . import data
from .training import Job, execute

Report = Callable[[Job, dict[str, Any]], None]


def run_all(
    work: list[Job], root: Path | None, device: torch.device, jobs: int, report: Report
) -> list[dict[str, Any]]:
    """The results of ``work`` in its order; ``report`` hears of each as it is done."""
    if jobs == 1 or len(work) == 1:
        if device.type == "cpu":
            torch.set_num_threads(1)
        found = {}
        for job in work:
            found[job] = execute(job, _dataset(job.protocol.data, root), device)
            report(job, found[job])
    else:
        found = dict(_in_processes(work, root, device, jobs, report))
    return [found[job] for job in work]


def _in_processes(
    work: list[Job], root: Path | None, device: torch.device, jobs: int, report: Report
) -> Iterator[tuple[Job, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(jobs, len(work)), context, initializer=_start_worker) as pool:
        try:
            with _no_interrupts_for_children():
                futures = {pool.submit(_work, job, root, str(device)): job for job in work}
            for future in as_completed(futures):
                job, result = futures[future], future.result()
                report(job, result)
                yield job, result
        except BaseException as error:
            # Not by shutdown, which waits for the runs at work and for those already handed out: a minute each.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError("a run's process was killed; the same command goes on from here") from error
            raise


@contextlib.contextmanager
def _no_interrupts_for_children() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: they end by the parent's word alone.

    A process inherits the mask of the thread that starts it; an interrupt that comes meanwhile reaches this one after.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """One thread, and an end when the parent ends: an orphan would write into a folder that a new study writes to."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job, root: Path | None, device: str) -> dict[str, Any]:
    return execute(job, _dataset(job.protocol.data, root), torch.device(device))


@functools.cache
def _dataset(name: str, root: Path | None) -> data.Dataset:
    return data.load(name, root)

"""The measuring core: named calls timed in interleaved rounds in several fresh processes, and what their times support.

    def build(size):                                    # in mypackage/bench.py; runs in each fresh process
        a, b = torch.randn(size), torch.empty(size)
        return {"copy": lambda: b.copy_(a), "relu": lambda: torch.relu(a), "absent": "needs a GPU"}

    (samples,) = measure([Case("copy and relu", "mypackage.bench:build", {"size": 1 << 20})])
    print(samples.time("relu"), samples.ratio("copy", "relu"), samples.absent)

A process builds a case, warms its calls up and then runs rounds: each call once a round, in an order that rotates from
round to round, so that drift of the machine falls on all of them alike. One sample is `torch.utils.benchmark.Timer`'s
mean over as many calls as fill ``least`` seconds (with its own two warm-up calls, so that the call before leaves no
trace), on a GPU the median of `triton.testing.do_bench`, which empties the cache between calls, or what another of the
:mod:`.clocks` says.

The interval is Student's, at 95 %, over the processes' medians of log time (or of log ratio, paired round by round):
what varies from one process to the next, such as where the memory lies, varies too from one user's run to the next. In
simulations it holds its 95 % with three processes, where a two-level bootstrap falls to 81 % (docs/profile.md). With
one process the rounds stand for the processes, and the interval is too narrow for claims.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import numpy as np
import torch

from .clocks import sampler
from .memory import kept_bytes, peak_live_bytes
from .named import UserError, described, named

CONFIDENCE = 0.95
LEAST_ROUNDS = 2  # rounds, however little time there is
Runs = Mapping[str, "Callable[[], Any] | str"]  # a call by name, or why there is none


@dataclass(frozen=True)
class Case:
    """What one round compares: the calls that ``build`` (see :mod:`.named`) makes of ``arguments`` (JSON).

    device: where the calls run. threads: torch's number of them, 0 for its own choice. memory: note each call's peak of
    live bytes and what it keeps for backward. about: what its records say of it. clock: one of :mod:`.clocks`. peers:
    names of the calls that are timed, of all where there is none.
    """

    name: str
    build: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 0
    memory: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    clock: str = "call"
    peers: Sequence[str] = ()


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; ``degrees`` of freedom it rests on."""

    value: float
    low: float
    high: float
    degrees: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    @property
    def log_error(self) -> float:
        """Standard error of log(value); infinite where the interval has no end."""
        if not (self.degrees and self.low > 0 and np.isfinite(self.high)):
            return float("inf")
        return float(np.log(self.high / self.low) / 2 / _student(self.degrees))


@dataclass(frozen=True)
class Samples:
    """Seconds a call, (processes, rounds) for each name; why a name is absent; its bytes where asked for."""

    seconds: Mapping[str, np.ndarray[Any, Any]]
    absent: Mapping[str, str]
    live_bytes: Mapping[str, int] = field(default_factory=dict)
    kept_bytes: Mapping[str, int] = field(default_factory=dict)

    def time(self, name: str) -> Interval:
        """Seconds of ``name``."""
        return interval(self.seconds[name])

    def ratio(self, name: str, over: str) -> Interval:
        """Time of ``name`` over that of ``over``, paired by round: above 1, ``over`` is the faster."""
        return interval(self.seconds[name] / self.seconds[over])


def interval(samples: np.ndarray[Any, Any]) -> Interval:
    """Of positive samples (processes, rounds): the geometric mean of the processes' medians, and its interval."""
    logs = np.log(samples)
    units = np.median(logs, axis=1) if len(logs) > 1 else logs[0]
    center, degrees = float(units.mean()), len(units) - 1
    half = float("inf") if not degrees else _student(degrees) * float(units.std(ddof=1)) / len(units) ** 0.5
    with np.errstate(over="ignore"):
        return Interval(float(np.exp(center)), float(np.exp(center - half)), float(np.exp(center + half)), degrees)


def verdict(ratio: Interval) -> str:
    """What a ratio other / ours supports: "faster" (ours), "slower" or "indistinguishable"."""
    if ratio.low > 1:
        return "faster"
    return "slower" if ratio.high < 1 else "indistinguishable"


def _student(degrees: int) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))


# glibc keeps freed memory instead of giving it back to the system: else the place of a freed tensor in the heap decides
# whether the next one costs page faults, which made equal processes differ twofold. Set in the environment, these win.
KEEPING = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def measure(
    cases: Sequence[Case],
    *,
    processes: int = 5,
    rounds: int = 5,
    least: float = 0.01,
    budget: float = float("inf"),
    allocator: str = "keeping",
    progress: Callable[[str], None] = lambda case: None,
) -> list[Samples]:
    """Run ``cases``, each in all of ``processes`` fresh processes, one after the other; ``progress`` hears of each.

    least: seconds a sample lasts at least. budget: seconds that all of it should take, shared out among what is left to
    do; where they do not suffice, cases get fewer rounds, but two at least (a case's samples tell). allocator:
    "keeping" has glibc keep freed memory, "default" leaves it alone. Raises RuntimeError with the end of its error
    output when a process fails. Processes end with this one, however it ends.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    end = time.monotonic() + budget
    for process in range(processes):
        share = max(0.0, end - time.monotonic()) / (processes - process)
        order = {"process": process, "rounds": rounds, "least": least, "seconds": share}
        for at, result in enumerate(_in_fresh_process(cases, order, allocator)):
            found[at].append(result)
            progress(cases[at].name)
    return [joined(results) for results in found]


def joined(results: list[dict[str, Any]]) -> Samples:
    """Of one case, what each process found: names that every one could run; the first reason for the others."""
    absent = {name: why for result in reversed(results) for name, why in result["absent"].items()}
    names = [name for name in results[0]["seconds"] if name not in absent]
    rounds = min((len(result["seconds"][name]) for result in results for name in names), default=0)
    seconds = {name: np.array([result["seconds"][name][:rounds] for result in results]) for name in names}
    return Samples(seconds, absent, results[0]["live_bytes"], results[0]["kept_bytes"])


# A measuring process is a group of its own, which a reader of the pipe from its parent ends: whatever ends the parent
# closes the pipe. It reads before torch is imported, which takes seconds.
_CHILD = f"""
import os, signal, sys, threading
order, pipe = sys.stdin.buffer.readline(), os.dup(0)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
def end_with_the_parent():
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL) if hasattr(os, "killpg") else os._exit(1)
threading.Thread(target=end_with_the_parent, daemon=True).start()
from {__name__} import main
main(order)
"""


def _in_fresh_process(cases: Sequence[Case], order: dict[str, Any], allocator: str) -> Iterator[dict[str, Any]]:
    message = json.dumps({**order, "cases": [asdict(case) for case in cases]}) + "\n"
    environment = ({} if allocator == "default" else KEEPING) | os.environ
    command = [sys.executable, "-c", _CHILD]
    with tempfile.TemporaryFile() as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as child:
            assert child.stdin is not None and child.stdout is not None
            done = 0
            try:
                with contextlib.suppress(BrokenPipeError):  # its exit status, below, says more
                    child.stdin.write(message.encode())
                    child.stdin.flush()
                for line in child.stdout:
                    yield json.loads(line)
                    done += 1
                child.wait()
            except BaseException:
                end(child)
                raise
        if child.returncode or done < len(cases):
            errors.seek(0)
            told = errors.read()[-4000:].decode(errors="replace").strip()
            raise RuntimeError(f"a measuring process failed, with exit status {child.returncode}:\n{told}")


def end(child: subprocess.Popen[bytes]) -> None:
    """``child``, which leads a group of its own, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()


# ---- in the fresh process ----


def _worker(order: dict[str, Any], results: TextIO) -> None:
    default = torch.get_num_threads()
    end = time.monotonic() + order["seconds"]
    for at, entry in enumerate(order["cases"]):
        case = Case(**entry)
        torch.set_num_threads(case.threads or default)
        patience = (end - time.monotonic()) / (len(order["cases"]) - at)
        result = sampled(case, order["process"], order["rounds"], order["least"], patience)
        print(json.dumps(result), file=results, flush=True)


def sampled(
    case: Case, process: int = 0, rounds: int = 5, least: float = 0.01, patience: float = float("inf")
) -> dict[str, Any]:
    """What one process finds of ``case``, in this process: `joined` makes Samples of what several found.

    patience: seconds that it should take; two rounds at least.
    """
    end = time.monotonic() + patience
    runs: Runs = named(case.build)(**case.arguments)
    runs = {name: run for name, run in runs.items() if name in case.peers or not case.peers}
    absent = {name: run for name, run in runs.items() if isinstance(run, str)}
    calls = {name: run for name, run in runs.items() if not isinstance(run, str)}
    samplers = {}
    for name, run in calls.items():
        try:
            samplers[name] = sampler(run, case.device, least, case.clock)
        except Exception as error:
            if case.clock != "graph":
                raise
            absent[name] = f"no CUDA graph: {described(error)}"
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for name in _rotated(list(samplers), process + turn):
            seconds[name].append(samplers[name]())
    weighed = calls if case.memory and process == 0 else {}
    live = {name: peak_live_bytes(run, case.device) for name, run in weighed.items()}
    kept = {name: kept_bytes(run) for name, run in weighed.items()}
    return {"seconds": seconds, "absent": absent, "live_bytes": live, "kept_bytes": kept}


def _rotated(names: list[str], by: int) -> list[str]:
    """A Latin square of orders; every second row of it is walked backward, so that nobody always follows the same."""
    if not names:
        return names
    at = by % len(names)
    turned = names[at:] + names[:at]
    return turned[::-1] if by % 2 else turned


def main(order: bytes) -> None:
    """Results go to the real standard output alone; what a measured model prints there goes to the error output."""
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        try:
            _worker(json.loads(order), results)
        except UserError as error:
            sys.exit(str(error))

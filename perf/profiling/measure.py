"""The measuring core: named calls timed in interleaved rounds in several fresh processes, and what their times support.

    def build(size):                                    # in mypackage/bench.py; runs in each fresh process
        a, b = torch.randn(size), torch.empty(size)
        return {"copy": lambda: b.copy_(a), "relu": lambda: torch.relu(a), "absent": "needs a GPU"}

    (samples,) = measure([Case("copy and relu", "mypackage.bench:build", {"size": 1 << 20})])
    print(samples.time("relu"), samples.ratio("copy", "relu"), samples.absent)

A process builds a case, warms its calls up and then runs rounds: each call once a round, in an order that rotates from
round to round, so that drift of the machine falls on all of them alike. One sample is `torch.utils.benchmark.Timer`'s
mean over as many calls as fill ``least`` seconds (with its own two warm-up calls, so that the call before leaves no
trace), on a GPU the median of `triton.testing.do_bench`, which empties the cache between calls.

The interval is Student's, at 95 %, over the processes' medians of log time (or of log ratio, paired round by round):
what varies from one process to the next, such as where the memory lies, varies too from one user's run to the next. In
simulations it holds its 95 % with three processes, where a two-level bootstrap falls to 81 % (docs/profile.md). With
one process the rounds stand for the processes, and the interval is too narrow for claims.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np
import torch

from .memory import kept_bytes, peak_live_bytes

CONFIDENCE = 0.95
LEAST_ROUNDS = 2  # rounds, however little time there is
Runs = Mapping[str, "Callable[[], Any] | str"]  # a call by name, or why there is none


@dataclass(frozen=True)
class Case:
    """What one round compares: ``build``, as :func:`named` reads it, called with ``arguments`` (JSON) gives the calls.

    device: where the calls run. threads: torch's number of them, 0 for its own choice. memory: note each call's peak of
    live bytes and what it keeps for backward. about: what its records say of it.
    """

    name: str
    build: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 0
    memory: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


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
        """Standard error of log(value)."""
        return float(np.log(self.high / self.low) / 2 / _student(self.degrees)) if self.degrees else float("inf")


@dataclass(frozen=True)
class Samples:
    """Seconds a call, (processes, rounds) for each name; why a name is absent; its bytes where asked for."""

    seconds: Mapping[str, np.ndarray]
    absent: Mapping[str, str]
    live_bytes: Mapping[str, int] = field(default_factory=dict)
    kept_bytes: Mapping[str, int] = field(default_factory=dict)

    def time(self, name: str) -> Interval:
        """Seconds of ``name``."""
        return interval(self.seconds[name])

    def ratio(self, name: str, over: str) -> Interval:
        """Time of ``name`` over that of ``over``, paired by round: above 1, ``over`` is the faster."""
        return interval(self.seconds[name] / self.seconds[over])


def interval(samples: np.ndarray) -> Interval:
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
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def measure(
    cases: Sequence[Case],
    *,
    processes: int = 5,
    rounds: int = 5,
    least: float = 0.01,
    budget: float = float("inf"),
    progress: Callable[[str], None] = lambda case: None,
) -> list[Samples]:
    """Run ``cases``, each in all of ``processes`` fresh processes, one after the other; ``progress`` hears of each.

    least: seconds a sample lasts at least. budget: seconds that all of it should take, shared out among what is left to
    do; where they do not suffice, cases get fewer rounds, but two at least (a case's samples tell). Raises RuntimeError
    with the end of its error output when a process fails.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    end = time.monotonic() + budget
    for process in range(processes):
        share = max(0.0, end - time.monotonic()) / (processes - process)
        order = {"process": process, "rounds": rounds, "least": least, "seconds": share}
        for at, result in enumerate(_in_fresh_process(cases, order)):
            found[at].append(result)
            progress(cases[at].name)
    return [_joined(results) for results in found]


def _joined(results: list[dict[str, Any]]) -> Samples:
    """Names that every process could run; the first reason for the others."""
    absent = {name: why for result in reversed(results) for name, why in result["absent"].items()}
    names = [name for name in results[0]["seconds"] if name not in absent]
    rounds = min((len(result["seconds"][name]) for result in results for name in names), default=0)
    seconds = {name: np.array([result["seconds"][name][:rounds] for result in results]) for name in names}
    return Samples(seconds, absent, results[0]["live_bytes"], results[0]["kept_bytes"])


def _in_fresh_process(cases: Sequence[Case], order: dict[str, Any]) -> Any:
    order = {**order, "cases": [asdict(case) for case in cases]}
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", __spec__.name]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=ALLOCATOR | os.environ
        ) as child:
            try:
                assert child.stdin is not None and child.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # its exit status, below, says more
                    child.stdin.write(json.dumps(order))
                    child.stdin.close()
                yield from map(json.loads, child.stdout)
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"a measuring process failed:\n{errors.read()[-4000:]}")


def named(name: str) -> Any:
    """The object that "module:name" or "path/to/file.py:name" names. Raises ValueError where there is none."""
    module, _, attribute = name.rpartition(":")
    try:
        return getattr(_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), attribute)
    except (AttributeError, FileNotFoundError, KeyError, ModuleNotFoundError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name!r} names nothing: expected module:name or file.py:name ({what})") from error


def _file(path: Path) -> ModuleType:
    """The module in ``path``, which stands in sys.modules, so that the source of its classes can be found."""
    name = path.stem
    while name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path.resolve()):
        name += "_"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# ---- in the fresh process ----


def _worker(order: dict[str, Any], results: TextIO) -> None:
    default = torch.get_num_threads()
    end = time.monotonic() + order["seconds"]
    for at, entry in enumerate(order["cases"]):
        case = Case(**entry)
        torch.set_num_threads(case.threads or default)
        patience = (end - time.monotonic()) / (len(order["cases"]) - at)
        result = _sampled(case, order["process"], order["rounds"], order["least"], patience)
        print(json.dumps(result), file=results, flush=True)


def _sampled(case: Case, process: int, rounds: int, least: float, patience: float) -> dict[str, Any]:
    end = time.monotonic() + patience
    runs: Runs = named(case.build)(**case.arguments)
    absent = {name: run for name, run in runs.items() if isinstance(run, str)}
    calls = {name: run for name, run in runs.items() if not isinstance(run, str)}
    samplers = {name: _sampler(run, case.device, least) for name, run in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for name in _rotated(list(calls), process + turn):
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


def _sampler(run: Callable[[], Any], device: str, least: float) -> Callable[[], float]:
    """Warms ``run`` up; the function returned takes one sample, in seconds."""
    run()
    if torch.device(device).type == "cpu":
        from torch.utils.benchmark import Timer

        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        number = max(1, round(least / timer.timeit(1).mean))
        return lambda: float(timer.timeit(number).mean)
    from triton.testing import do_bench

    return lambda: float(do_bench(run, warmup=5, rep=max(10, 1e3 * least), return_mode="median")) * 1e-3


if __name__ == "__main__":
    # Results go to the real standard output alone; what a measured model prints there goes to the error output.
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        _worker(json.load(sys.stdin), results)

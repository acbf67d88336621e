"""The results: one flat list of records, a row for each peer of each case, from which every table, picture and
comparison is made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from fused_rect import files
from fused_rect.kernels import traffic
from fused_rect.rules import Rule

from . import measure
from .measure import Case, Interval, Samples, verdict
from .peers import EAGER, YARDSTICKS
from .workloads import Layer

SCHEMA = 2
NEVER = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Record:
    """One peer of one case. Times in seconds a call, with 95 % intervals; sizes in bytes.

    ratio: this peer's time over that of the peer ``base``, paired by round. bytes and flops: what the fused call has
    to move and compute, as `fused_rect.kernels.traffic` declares it, with the convolution's where it is part of it.
    live_bytes: measured peak of what the call allocates. kept_bytes: measured, what it keeps for backward or returns.
    absent: why this peer was not timed.
    """

    workload: str
    layer: str
    part: str  # "layer", "epilogue", "model" or "machine"
    rectifier: str
    mode: str
    peer: str
    device: str
    implementation: str  # of the fused call: "triton", "native" or "eager"
    dtype: str
    layout: str
    threads: int
    allocator: str  # "keeping" freed memory, or glibc's "default"
    base: str
    shape: str
    output: str
    kernel: str
    seconds: float
    seconds_low: float
    seconds_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    degrees: int
    verdict: str
    processes: int
    rounds: int
    bytes: int
    flops: int
    live_bytes: int
    kept_bytes: int
    absent: str


# What makes the records of one case, and two cases of different runs the same.
CASE = ["workload", "layer", "part", "rectifier", "mode", "device", "dtype", "layout", "threads", "allocator", "base",
        "shape", "kernel"]  # fmt: skip
KINDS = {field.name: str(field.type) for field in fields(Record)}
COLUMNS = list(KINDS)


def collect(cases: Sequence[Case], **how: Any) -> pd.DataFrame:
    """Measure ``cases``, ``how`` as :func:`.measure.measure` takes it; a frame with one row a record."""
    results = measure.measure(cases, **how)
    return frame([row for case, samples in zip(cases, results) for row in rows(case, samples)])


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def rows(case: Case, samples: Samples) -> list[dict[str, Any]]:
    """The fields of each record of a case."""
    processes, rounds = next((times.shape for times in samples.seconds.values()), (0, 0))
    base = case.about["base"]
    made = []
    for peer in (*samples.seconds, *samples.absent):
        there = peer in samples.seconds
        time = samples.time(peer) if there else NEVER
        ratio = samples.ratio(peer, base) if there and base in samples.seconds else NEVER
        judged = ratio is not NEVER and peer != base and peer not in YARDSTICKS
        record = Record(
            **case.about,
            peer=peer,
            seconds=time.value,
            seconds_low=time.low,
            seconds_high=time.high,
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            degrees=time.degrees,
            verdict=verdict(ratio) if judged else "",
            processes=processes,
            rounds=rounds,
            live_bytes=samples.live_bytes.get(peer, 0),
            kept_bytes=samples.kept_bytes.get(peer, 0),
            absent=samples.absent.get(peer, ""),
        )
        made.append(asdict(record))
    return made


# ---- what a call has to move and compute ----


def work(layer: Layer, part: str, mode: str, itemsize: int) -> tuple[int, int]:
    """(bytes, flops) of the fused call."""
    size, channels = math.prod(layer.output), layer.output[1]
    calls = traffic.step(Rule.default(layer.rectifier), size, itemsize, channels, layer.slopes, mode)
    moved, computed = sum(call.bytes for call in calls), sum(call.flops for call in calls)
    if part == "epilogue":
        return moved, computed
    weights = layer.out_channels * layer.shape[1] * math.prod(layer.kernel)
    once = (math.prod(layer.shape) + weights + size) * itemsize  # each of the three tensors, read or written
    times = 3 if mode == "training" else 1  # forward, gradient of the input, gradient of the weight
    return layer.depth * (moved + times * once), layer.depth * computed + times * layer.flops


# ---- files ----


def plain(records: pd.DataFrame) -> list[dict[Any, Any]]:
    """A dict for each record, None for what is not finite."""
    finite = records.replace([math.inf, -math.inf], math.nan).astype(object)
    rows: list[dict[Any, Any]] = finite.where(finite.notna(), None).to_dict("records")
    return rows


def save(path: Path, records: pd.DataFrame, environment: Mapping[str, Any], command: str) -> None:
    """A JSON file: the schema's number, the command, the environment and the records."""
    content = {"schema": SCHEMA, "command": command, "environment": environment, "records": plain(records)}
    files.replace_json(path, content)


def load(path: Path) -> pd.DataFrame:
    """The records of :func:`save`. Raises ValueError for a file that is none of its, or damaged."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(f"has schema {content['schema']}, this version reads {SCHEMA}: measure it anew")
        rows = content["records"]
        for row in rows:
            _check(row)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else error
        raise ValueError(f"{path} is no file of `fused-rect profile --json`: {what}") from error
    return typed(frame(rows))


def typed(records: pd.DataFrame) -> pd.DataFrame:
    """``records`` as they were before JSON, which has no NaN."""
    return records.astype({name: float for name, kind in KINDS.items() if kind == "float"})


def _check(row: Any) -> None:
    """Raises ValueError for what :func:`save` does not write, TypeError for what is no object of JSON."""
    if sorted(row) != sorted(COLUMNS):
        raise ValueError("a record has other fields")
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float, type(None))}
    for name, value in row.items():
        if not isinstance(value, kinds[KINDS[name]]) or isinstance(value, bool):
            raise ValueError(f"{name} of a record is {value!r}")
    if max(abs(row[name]) for name, kind in KINDS.items() if kind == "int") >= 2**53:
        raise ValueError("a record holds a number that no profile comes to")
    low, ratio, high = (row[name] for name in ("ratio_low", "ratio", "ratio_high"))
    if ratio is not None and not (0 < ratio < math.inf and (low or 0) <= ratio <= (high or math.inf)):
        raise ValueError(f"a ratio is {ratio}, its interval {low} to {high}")


def cases(records: pd.DataFrame) -> list[pd.DataFrame]:
    """The records of each case, in the order of measuring."""
    return [group for _, group in records.groupby(CASE, sort=False, dropna=False)]


def one(case: pd.DataFrame, peer: str) -> Any:
    """The record of ``peer`` in a case, None where it is absent."""
    rows = case[(case.peer == peer) & (case.absent == "")]
    return next(rows.itertuples(index=False), None)


def shown(text: str) -> str:
    """``text`` as a terminal can have it: names and paths are anybody's, and control characters are commands to it."""
    return "".join(c if c.isprintable() else "?" for c in text)


def key(about: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a case from all others."""
    return tuple(about[name] for name in CASE)


def keys(records: pd.DataFrame) -> set[tuple[Any, ...]]:
    """Of all cases but the machine's."""
    return {key(row) for row in records[records.part != "machine"].to_dict("records")}


def base(case: pd.DataFrame) -> Any:
    """The record of the peer that the others are held against, None where it is absent."""
    return one(case, case.base.iloc[0])


def judged(records: pd.DataFrame, peer: str = EAGER) -> dict[str, int]:
    """How many cases the fused call is faster, slower, indistinguishable in, against ``peer``."""
    counts = records[(records.peer == peer) & (records.verdict != "")].verdict.value_counts()
    return {word: int(counts.get(word, 0)) for word in ("faster", "indistinguishable", "slower")}

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

from fused_rect.kernels import traffic

from . import measure
from .measure import Case, Interval, Samples, verdict
from .peers import EAGER, FUSED, YARDSTICKS
from .workloads import Layer

SCHEMA = 1
NEVER = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Record:
    """One peer of one case. Times in seconds a call, with 95 % intervals; sizes in bytes.

    ratio: this peer's time over the fused layer's, paired by round. bytes and flops: what the fused call has to move
    and compute, as `fused_rect.kernels.traffic` declares it, with the convolution's where it is part of the call.
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
CASE = ["workload", "layer", "part", "rectifier", "mode", "device", "dtype", "layout", "threads", "shape", "kernel"]
COLUMNS = [field.name for field in fields(Record)]


def collect(cases: Sequence[Case], **how: Any) -> pd.DataFrame:
    """Measure ``cases``, ``how`` as :func:`.measure.measure` takes it; a frame with one row a record."""
    results = measure.measure(cases, **how)
    rows = [record for case, samples in zip(cases, results) for record in _records(case, samples)]
    return frame([asdict(row) for row in rows])


def frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def _records(case: Case, samples: Samples) -> list[Record]:
    processes, rounds = next((times.shape for times in samples.seconds.values()), (0, 0))
    base = FUSED if FUSED in samples.seconds else None
    made = []
    for peer in (*samples.seconds, *samples.absent):
        there = peer in samples.seconds
        time = samples.time(peer) if there else NEVER
        ratio = samples.ratio(peer, base) if there and base else NEVER
        judged = there and base and peer != FUSED and peer not in YARDSTICKS
        made.append(
            Record(
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
        )
    return made


# ---- what a call has to move and compute ----


def work(layer: Layer, part: str, mode: str, itemsize: int) -> tuple[int, int]:
    """(bytes, flops) of the fused call."""
    size, channels = math.prod(layer.output), layer.output[1]
    lower = layer.slope if layer.rectifier == "leaky_relu" else 0.0
    prelu = layer.rectifier == "prelu"
    rule = "leaky_relu" if layer.rectifier == "rrelu" and mode == "inference" else layer.rectifier
    given: dict[str, Any] = {"bias": channels, "weight": layer.slopes if prelu else 0, "lower": lower}
    calls = [traffic.forward(rule, size, itemsize, **given)]
    if mode == "training":
        calls.append(traffic.backward(rule, size, itemsize, **given, sum_bias=True, sum_weight=prelu))
    moved, computed = sum(call.bytes for call in calls), sum(call.flops for call in calls)
    if part == "epilogue":
        return moved, computed
    weights = layer.out_channels * layer.shape[1] * math.prod(layer.kernel)
    once = (math.prod(layer.shape) + weights + size) * itemsize  # each of the three tensors, read or written
    times = 3 if mode == "training" else 1  # forward, gradient of the input, gradient of the weight
    return moved + times * once, computed + times * layer.flops


# ---- files ----


def save(path: Path, records: pd.DataFrame, environment: Mapping[str, Any], command: str) -> None:
    """A JSON file: the schema's number, the command, the environment and the records."""
    rows = json.loads(records.to_json(orient="records", double_precision=15))  # NaN and infinities become null
    text = json.dumps({"schema": SCHEMA, "command": command, "environment": environment, "records": rows}, indent=1)
    path.write_text(text + "\n")


def load(path: Path) -> pd.DataFrame:
    """The records of :func:`save`. Raises ValueError for a file that is none of its."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"has schema {content['schema']}, this version reads {SCHEMA}: measure it anew")
        loaded = frame(content["records"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of `fused-rect profile --json`: {error}") from error
    numbers = [name for name in COLUMNS if name.startswith(("seconds", "ratio"))]
    return loaded.astype(dict.fromkeys(numbers, float))


def cases(records: pd.DataFrame) -> list[pd.DataFrame]:
    """The records of each case, in the order of measuring."""
    return [group for _, group in records.groupby(CASE, sort=False, dropna=False)]


def one(case: pd.DataFrame, peer: str) -> Any:
    """The record of ``peer`` in a case, None where it is absent."""
    rows = case[(case.peer == peer) & (case.absent == "")]
    return next(rows.itertuples(index=False), None)


def judged(records: pd.DataFrame, peer: str = EAGER) -> dict[str, int]:
    """How many cases the fused call is faster, slower, indistinguishable in, against ``peer``."""
    counts = records[(records.peer == peer) & (records.verdict != "")].verdict.value_counts()
    return {word: int(counts.get(word, 0)) for word in ("faster", "indistinguishable", "slower")}

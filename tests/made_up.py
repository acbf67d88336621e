"""Made-up records for the tests of what is made from records."""

from fused_rect.perf.profiling import records
from fused_rect.perf.profiling.measure import Interval, verdict
from fused_rect.perf.profiling.peers import COPY, EAGER, FUSED, MATMUL, YARDSTICKS


def record(peer, seconds=1e-3, ratio=1.0, spread=1.02, degrees=4, **about):
    """One record; its intervals reach from value / spread to value * spread."""
    judged = peer != FUSED and peer not in YARDSTICKS
    fields = {
        "workload": "default", "layer": "nin cccp1", "part": "layer", "rectifier": "leaky_relu", "mode": "training",
        "device": "cpu", "implementation": "native", "dtype": "float32", "layout": "contiguous", "threads": 2,
        "allocator": "keeping", "base": FUSED,
        "shape": "2x192x32x32", "output": "2x160x32x32", "kernel": "1x1", "processes": degrees + 1, "rounds": 5,
        "bytes": 10**7, "flops": 10**6, "live_bytes": 0, "kept_bytes": 10**6, "absent": "",
    }  # fmt: skip
    return fields | {
        "peer": peer, "seconds": seconds, "seconds_low": seconds / spread, "seconds_high": seconds * spread,
        "ratio": ratio, "ratio_low": ratio / spread, "ratio_high": ratio * spread, "degrees": degrees,
        "verdict": verdict(Interval(ratio, ratio / spread, ratio * spread, degrees)) if judged else "",
    } | about  # fmt: skip


def report(ratios=(1.5, 1.0, 0.7), spread=1.02, **about):
    """A frame: the machine's ceilings, and one layer for each ratio eager / fused, as layer and as epilogue."""
    machine = {"workload": "machine", "layer": "ceilings", "part": "machine", "rectifier": "", "mode": "", "shape": ""}
    rows = [record(peer, 1e-2, float("nan"), flops=10**9, **machine) for peer in (COPY, MATMUL)]
    for at, ratio in enumerate(ratios):
        for part, names in (("layer", (FUSED, EAGER, COPY)), ("epilogue", (FUSED, EAGER, COPY))):
            case = {"layer": f"layer {at}", "part": part, "kept_bytes": 10**6 * (part == "layer")} | about
            values = {FUSED: 1.0, EAGER: ratio, COPY: 0.5}
            rows += [record(name, 1e-3 * values[name] * (at + 1), values[name], spread, **case) for name in names]
    rows.append(record("FlagGems", float("nan"), float("nan"), absent="not installed") | {"verdict": ""})
    return records.frame(rows)

"""The measuring core: intervals that hold their coverage, rounds that interleave, processes that are fresh."""

import contextlib
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from fused_rect.perf.profiling import clocks
from fused_rect.perf.profiling import measure as core
from fused_rect.perf.profiling.measure import Case, Interval, interval, measure, verdict


def build_sleepers(short, long):
    """A case of known times; prints, as a user's model may, and counts the order of its calls."""
    print("a model that prints")
    return {"short": lambda: time.sleep(short), "long": lambda: time.sleep(long), "other": "not installed"}


def build_failing():
    raise ValueError("no such layer")


def build_facts():
    a = torch.ones(1 << 16)
    facts = {"pid": os.getpid(), "threads": torch.get_num_threads()}
    return {"clone": lambda: a.clone(), **{name: str(value) for name, value in facts.items()}}


def test_known_times_come_back_with_their_ratio():
    case = Case("sleep", f"{__file__}:build_sleepers", {"short": 2e-3, "long": 6e-3})
    heard = []
    (samples,) = measure([case], processes=2, rounds=3, least=4e-3, progress=heard.append)
    assert heard == ["sleep", "sleep"]
    assert samples.seconds["short"].shape == (2, 3)
    assert 2e-3 <= samples.time("short").value < 4e-3
    assert 2 < samples.ratio("long", "short").value < 3.2
    assert samples.absent == {"other": "not installed"}


def test_each_process_is_fresh_and_threads_and_bytes_are_as_asked():
    case = Case("facts", f"{__file__}:build_facts", threads=1, memory=True)
    (samples,) = measure([case], processes=1, rounds=2, least=1e-4)
    assert samples.absent["threads"] == "1"
    assert int(samples.absent["pid"]) != os.getpid()
    assert samples.live_bytes == {"clone": 4 << 16}


def test_a_budget_leaves_two_rounds_at_least():
    case = Case("sleep", f"{__file__}:build_sleepers", {"short": 1e-3, "long": 1e-2})
    spent, enough = (measure([case], processes=1, rounds=4, budget=budget)[0] for budget in (0.0, 60.0))
    assert spent.seconds["long"].shape == (1, 2) and enough.seconds["long"].shape == (1, 4)


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match="ValueError: no such layer"):
        measure([Case("bad", f"{__file__}:build_failing")], processes=1, rounds=1)


def build_vanishing(how):
    os._exit(0) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how, status", [("exit", "0"), ("kill", "-9")])
def test_a_process_that_vanishes_is_a_failure(how, status):
    with pytest.raises(RuntimeError, match=f"exit status {status}"):
        measure([Case("vanishing", f"{__file__}:build_vanishing", {"how": how})], processes=1, rounds=1)


def build_reading():
    return {"read": lambda: sys.stdin.read(1)}


def test_a_model_that_reads_finds_no_input():
    (samples,) = measure([Case("reading", f"{__file__}:build_reading")], processes=1, rounds=2, least=1e-4)
    assert list(samples.seconds) == ["read"]


@pytest.mark.parametrize("between, within", [(0.0, 0.03), (0.02, 0.03), (0.02, 0.0)])
def test_interval_covers_in_95_of_100_runs(between, within):
    """Three processes, heavy-tailed rounds: the hardest case that a default run may meet."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        logs = rng.normal(size=(3, 1)) * between + rng.standard_t(3, size=(3, 7)) * within
        found = interval(np.exp(logs))
        hits += found.low <= 1 <= found.high
    assert hits >= 0.92 * 400  # 2.8 standard deviations below 95 %


def test_a_two_level_bootstrap_would_cover_too_little():
    """Why the interval is Student's: three processes that differ, resampled with their rounds 200 times."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        logs = rng.normal(size=(3, 1)) * 0.02 + rng.standard_t(3, size=(3, 7)) * 0.006
        drawn = logs[rng.integers(3, size=(200, 3))[..., None], rng.integers(7, size=(200, 3, 7))]
        low, high = np.percentile(np.median(np.median(drawn, axis=2), axis=1), [2.5, 97.5])
        hits += low <= 0 <= high
    assert hits <= 0.85 * 400


def test_interval_of_one_process_uses_its_rounds_and_of_one_sample_is_unbounded():
    assert interval(np.array([[1.0, 2.0, 4.0]])).degrees == 2
    assert interval(np.array([[1.0, 2.0, 4.0]])).value == pytest.approx(2.0)
    alone = interval(np.array([[3.0]]))
    assert (alone.low, alone.high) == (0.0, np.inf) and verdict(alone) == "indistinguishable"


def test_pairing_removes_what_a_round_does_to_both():
    drift = np.exp(np.random.default_rng(1).normal(size=(3, 9)))
    samples = core.Samples({"a": 2 * drift, "b": drift}, {}, {})
    assert samples.ratio("a", "b").low == pytest.approx(2) == samples.ratio("a", "b").high
    assert samples.time("a").high > 1.5 * samples.time("a").low


def test_verdict():
    assert verdict(Interval(1.2, 1.1, 1.3, 2)) == "faster"
    assert verdict(Interval(0.8, 0.7, 0.9, 2)) == "slower"
    assert verdict(Interval(1.1, 0.99, 1.2, 2)) == "indistinguishable"


def test_every_name_takes_every_place_in_the_round():
    names = ["a", "b", "c"]
    orders = [core._rotated(names, by) for by in range(6)]
    for place in range(3):
        assert {order[place] for order in orders} == set(names)
    assert len({tuple(order) for order in orders}) == 6


def test_on_a_gpu_a_sample_is_tritons_median(monkeypatch):
    import inspect

    from triton import testing

    signature = inspect.signature(testing.do_bench)
    monkeypatch.setattr(testing, "do_bench", lambda *a, **k: signature.bind(*a, **k).arguments["rep"] / 1e3)
    ran = []
    assert clocks.sampler(lambda: ran.append(1), "cuda", 0.05)() == pytest.approx(50e-6)
    assert ran == [1]


@pytest.fixture
def device(monkeypatch):
    """A device whose clock moves by 2 ms a call that runs on it, and by 1 ms a graph launched; the host's by 5 ms."""
    now = {"device": 0.0, "host": 0.0, "captured": 0, "capturing": False}

    class Event:
        def __init__(self, enable_timing=False):
            self.at = None

        def record(self):
            self.at = now["device"]

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Graph:
        calls = 0

        def replay(self):
            now["device"] += 1e-3 + 2e-3 * self.calls

    class Capture:
        def __init__(self, graph):
            self.graph = graph

        def __enter__(self):
            now["capturing"], now["captured"] = True, 0

        def __exit__(self, *_):
            now["capturing"], self.graph.calls = False, now["captured"]

    class Stream:
        def wait_stream(self, other):
            pass

    def run():
        now["host"] += 5e-3
        if now["capturing"]:
            now["captured"] += 1
        else:
            now["device"] += 2e-3

    fakes = {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "current_stream": Stream,
             "stream": lambda s: contextlib.nullcontext(), "synchronize": lambda: None}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now["host"])
    return run


def test_a_graphs_time_is_the_devices(device):
    """The time to launch a graph is shared by its calls: 64 of them, as many as it may hold."""
    sample = clocks.sampler(device, "cuda", 1.0, "graph")
    assert sample() == pytest.approx(2e-3 + 1e-3 / clocks.MOST_CALLS)


def test_the_hosts_time_is_not_the_devices(device):
    assert clocks.sampler(device, "cuda", 0.01, "host")() == pytest.approx(5e-3)


def build_uncapturable():
    return {"good": lambda: None, "bad": lambda: None}


def test_a_call_that_cannot_be_captured_is_absent_and_the_others_are_timed(monkeypatch):
    names = iter(("good", "bad"))

    def sampler(run, device, least, clock):
        if next(names) == "bad":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: 1.0

    monkeypatch.setattr(core, "sampler", sampler)
    found = core.sampled(Case("one", f"{__file__}:build_uncapturable", clock="graph"), rounds=2)
    assert found["seconds"] == {"good": [1.0, 1.0]}
    assert found["absent"]["bad"].startswith("no CUDA graph: ") and "capturing" in found["absent"]["bad"]


def test_only_the_peers_that_are_named_are_timed():
    found = core.sampled(Case("one", f"{__file__}:build_uncapturable", peers=("good",)), rounds=2, least=1e-6)
    assert list(found["seconds"]) == ["good"]

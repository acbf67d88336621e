"""`perf/overhead.py`: what it times is what it says it times."""

import json
import time

import torch

from fused_rect import backends
from fused_rect.perf import overhead
from fused_rect.rules import RULES


def burn(seconds):
    def step():
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    return step


def test_seconds_are_the_processs_and_ratios_those_of_a_round():
    case = overhead.Case("made up", "cpu", "C++", "training", burn(3e-3), burn(1e-3))
    [cost] = overhead.measure([case], rounds=3, calls=3)
    assert 2900 < cost.microseconds < 6000 and 2 < cost.ratio < 4
    asleep = overhead.Case("made up", "cpu", "C++", "training", lambda: time.sleep(0.01), burn(1e-3))
    assert overhead.measure([asleep], rounds=1, calls=3)[0].microseconds < 3000


def test_every_rectifier_is_there_and_each_way_is_the_one_named(monkeypatch):
    assert set(overhead.EPILOGUES) == {row.module for row in RULES.values()}
    taken = []
    monkeypatch.setattr(backends, "direct", lambda like: taken.append(like))
    for case in overhead.cases():
        if case.device != "cpu" or "Conv" in case.what or "Linear" in case.what:
            continue
        taken.clear()
        case.step()
        assert bool(taken) == (case.path == "C++"), case
        taken.clear()
        case.base()
        assert not taken


def test_the_table_and_the_file(monkeypatch, capsys, tmp_path):
    case = overhead.Case("made up", "cpu", "C++", "training", burn(1e-5), burn(1e-5))
    monkeypatch.setattr(overhead, "cases", lambda: [case])
    threads = torch.get_num_threads()
    try:
        assert overhead.main(["--rounds", "1", "--json", str(tmp_path / "o.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "made up" in capsys.readouterr().out
    kept = json.loads((tmp_path / "o.json").read_text())
    assert kept["costs"][0]["what"] == "made up" and kept["machine"]["torch"] == torch.__version__

"""The demo: its networks start alike, its comparison can fail, its figures are what it ran."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from fused_rect import demo


@pytest.fixture
def few(monkeypatch):
    """Two batches of digits instead of twenty-one, of a narrower network."""
    small = {"train_images": 2 * demo.PROTOCOL.batch_size, "width": 1 / 8}
    monkeypatch.setattr(demo, "PROTOCOL", replace(demo.PROTOCOL, **small))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def options(**given):
    return argparse.Namespace(**({"epochs": 1, "seed": 0, "device": "cpu", "json": None} | given))


def test_it_agrees_and_says_what_it_ran(few, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert demo.run(options(json=path)) == 0
    figures = json.loads(path.read_text())
    assert [r["rectifier"] for r in figures["results"]] == list(demo.RECTIFIERS)
    for result in figures["results"]:
        assert 0 < result["fused_loss"] < 10 and 0 <= result["eager_accuracy"] <= 1 and result["cost"]["speedup"] > 0
        assert result["largest_loss_difference_float64"] < 1e-12  # two steps: nothing is amplified yet
    costs = {r["rectifier"]: r["cost"] for r in figures["results"]}
    peaks = {name: cost["fused_bytes"] / cost["eager_bytes"] for name, cost in costs.items()}
    assert peaks["LeakyReLU"] < 0.8 and peaks["RReLU"] < 0.6
    assert "RReLU" in capsys.readouterr().out


def test_a_layer_that_computes_something_else_is_status_1(few, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RECTIFIERS", {"RReLU": "rrelu"})
    monkeypatch.setattr(demo.ReferenceRReLU, "forward", lambda self, x: torch.nn.functional.leaky_relu(x, 0.02))
    assert demo.run(options()) == 1
    assert "differ by more than" in capsys.readouterr().out


def test_every_rectifier_is_there():
    assert list(demo.RECTIFIERS) == ["ReLU", "LeakyReLU", "PReLU", "RReLU"]


def test_nan_is_no_agreement():
    nan = float("nan")
    assert not demo.Result("ReLU", nan, nan, 0, 0, nan, nan, None).agrees


def test_epochs_must_be_positive(capsys):
    parser = argparse.ArgumentParser()
    demo.configure(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--epochs", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
    assert parser.parse_args(["--json", "x"]).json == Path("x")

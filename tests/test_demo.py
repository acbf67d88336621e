"""The demo: its networks start alike, its comparison can fail, its figures are what it ran."""

import argparse
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from fused_rect import demo


@pytest.fixture
def few(monkeypatch):
    """Two batches of digits instead of twenty-three."""
    real = demo.digits

    def digits(device, seed):
        data = real(device, seed)
        return demo.Digits(tuple(t[: 2 * demo.BATCH] for t in data.train), data.test)

    monkeypatch.setattr(demo, "digits", digits)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are too small to share out where others use the cores
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
        assert 0 < result["fused_loss"] < 10 and 0 <= result["eager_accuracy"] <= 1 and result["time_ratio"] > 0
        assert result["largest_loss_difference_float64"] < 1e-12  # two steps: nothing is amplified yet
    peaks = {r["rectifier"]: r["fused_peak_bytes"] / r["eager_peak_bytes"] for r in figures["results"]}
    assert peaks["Leaky ReLU"] < 0.7 and peaks["RReLU"] < 0.5
    assert "RReLU" in capsys.readouterr().out


def test_a_layer_that_computes_something_else_is_status_1(few, monkeypatch, capsys):
    wrong = {"fused": demo.fused.ConvLeakyReLU2d, "eager": demo.torch_layer(lambda: torch.nn.LeakyReLU(0.02))}
    monkeypatch.setattr(demo, "RECTIFIERS", {"Leaky ReLU": wrong})
    assert demo.run(options()) == 1
    assert "differ by more than" in capsys.readouterr().out


def test_nan_is_no_agreement():
    nan = float("nan")
    result = demo.Result("ReLU", nan, nan, 0, 0, nan, nan, 1, (1, 1), 1, 1)
    assert not result.agrees


def test_epochs_must_be_positive(capsys):
    parser = argparse.ArgumentParser()
    demo.configure(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--epochs", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
    assert parser.parse_args(["--json", "x"]).json == Path("x")

"""Models that others wrote compute the same when fused, and when compiled by our backend."""

import pytest
import torch
from torch import nn

import fused_rect as fr
from fused_rect.perf import models, reach
from fused_rect.perf.profiling.memory import peak_live_bytes

# How many sites each has; a lower number means that fuse() lost some.
SITES = {"RRDBNet": 14, "Compact": 5, "CUGAN UNet": 8, "DnCNN": 4, "DRUNet": 7, "VGG": 6, "ResNet": 5, "HiFi-GAN": 21}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", models.MODELS)
def test_fused_models_match_their_originals(name, dtype):
    try:
        result = models.compare(name, dtype, "fuse")
    except ModuleNotFoundError as missing:
        pytest.skip(f"{models.MODELS[name].package} is not installed: {missing}")
    assert result.ok, str(result)
    assert result.fused == result.sites == SITES[name], str(result)


# Each takes most of a minute of compiling.
LONG = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("RRDBNet", "HiFi-GAN")]


@pytest.mark.parametrize("name", ["Compact", *LONG])
def test_compiled_models_match_their_originals(name):
    torch._dynamo.reset()
    try:
        result = models.compare(name, torch.float64, "compile")
    except ModuleNotFoundError as missing:
        pytest.skip(f"{models.MODELS[name].package} is not installed: {missing}")
    assert result.ok and result.fused >= SITES[name], str(result)


def test_a_difference_is_reported_as_one():
    result = models.Result("x", "fuse", torch.float64, 1, 1, 1e-9, 0.0, 10, 10)
    assert not result.ok and "DIFFERS" in str(result)


def test_peak_live_bytes_sees_what_lives_at_once():
    def step():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        b = torch.empty(1 << 20, dtype=torch.uint8)
        c = torch.empty(1 << 20, dtype=torch.uint8)
        return b, c

    peak = peak_live_bytes(step)
    assert 2 << 20 <= peak < (2 << 20) + 4096


@pytest.mark.parametrize("name", [*models.MODELS, "resnet18", "nf_resnet26", "T5"])
def test_every_pair_of_a_real_model_is_reached(name):
    try:
        pairs, fused, normed, fused_normed = reach.reached(reach.REACH[name])
    except ModuleNotFoundError as missing:
        pytest.skip(f"{reach.REACH[name].package} is not installed: {missing}")
    assert (fused, fused_normed) == (pairs, normed) and pairs + normed > 0


def test_a_pair_that_is_missed_lowers_the_count(monkeypatch, capsys):
    """A rectifier that nobody knows to be one is no pair, one that reads a sum is none, and one left counts."""
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    monkeypatch.setitem(reach.REACH, "block", models.Model("torch", lambda: block, (1, 3, 4, 4)))
    assert reach.reached(reach.REACH["block"]) == (1, 1, 1, 1) and reach.reach(["block"]) == 0
    monkeypatch.setattr(reach.fr, "fuse", lambda model, **_: fr.unfuse(model))
    assert reach.reached(reach.REACH["block"]) == (1, 0, 1, 0) and reach.reach(["block"]) == 1
    assert "0 of    1 pairs (0.0%)" in capsys.readouterr().out


def test_the_command_prints_a_line_a_model(capsys):
    if models.importlib.util.find_spec("spandrel") is None:
        pytest.skip("spandrel is not installed")
    assert models.main(["Compact"]) == 0
    assert capsys.readouterr().out.count("Compact") == 2

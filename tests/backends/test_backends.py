"""Which implementation runs, who may force it, and what it says where it cannot run."""

import os
import subprocess
import sys

import pytest
import torch

import fused_rect as fr
from fused_rect import backends


@pytest.fixture(autouse=True)
def automatic():
    with fr.backend("auto"):
        yield


def test_auto(monkeypatch):
    monkeypatch.setattr(backends, "_native", lambda: (True, "built"))
    assert backends.name("cpu") == "native" and backends.why("cpu") == "native: built"
    monkeypatch.setattr(backends, "_native", lambda: (False, "no compiler"))
    assert backends.name("cpu") == "eager" and backends.why("cpu") == "eager: no compiler"
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    assert backends.name("cuda") == backends.name("xpu") == "triton"
    assert backends.name("mps") == "eager" and "mps" in backends.why("mps")
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert backends.name("cuda") == "eager" and "pip install triton" in backends.why("cuda")


def test_without_a_compiler_cpu_tensors_warn_and_work(monkeypatch):
    monkeypatch.setattr(backends, "_native", lambda: (False, "no compiler"))
    backends._warn_once.cache_clear()
    with fr.backend("auto"), pytest.warns(UserWarning, match=r"slower eager path.*no compiler"):
        assert fr.functional.bias_relu(torch.tensor([[-1.0, 2.0]])).tolist() == [[0, 2]]
    backends._warn_once.cache_clear()


def test_forcing_nests_and_ends():
    with fr.backend("eager"):
        with fr.backend("triton"):
            assert backends.name("cpu") == "triton"
        assert backends.name("cpu") == "eager" and "forced" in backends.why("cpu")
        with pytest.raises(KeyError), fr.backend("triton"):
            raise KeyError
        assert backends.name("cpu") == "eager" and backends.resolve("cpu").__name__ == "fused_rect.backends.eager"


def test_an_unknown_name():
    with pytest.raises(ValueError, match="backend name must be one of auto, triton, native, eager, got 'cuda'"), (
        fr.backend("cuda")
    ):
        pass


@pytest.mark.parametrize("op", ["bias_relu", "bias_relu_"])
def test_a_forced_implementation_that_is_not_there(monkeypatch, op):
    z = torch.full((2, 3), -1.0)
    monkeypatch.setattr(backends, "_native", lambda: (False, "no compiler"))
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    for name, message in (("native", "forced but not available: no compiler"), ("triton", "pip install triton")):
        with fr.backend(name), pytest.raises(RuntimeError, match=message):
            getattr(fr.functional, op)(z)
    with fr.backend("native"), pytest.raises(RuntimeError, match="serves CPU tensors only, got cuda"):
        backends.resolve("cuda")
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    with fr.backend("triton"), pytest.raises(RuntimeError, match="cannot read mps"):
        backends.resolve("mps")
    assert torch.equal(z, torch.full((2, 3), -1.0))


@pytest.mark.parametrize(
    "value, status, said", [("eager", 0, "eager: forced"), ("nonsense", 1, "FUSED_RECT_BACKEND must")]
)
def test_the_environment_variable(value, status, said):
    code = "from fused_rect import backends; print(backends.why('cpu'))"
    environment = os.environ | {"FUSED_RECT_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout + done.stderr

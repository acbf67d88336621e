"""Which implementation runs, who may force it and how far that reaches, and what it says where it cannot run."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import fused_rect as fr
from fused_rect import backends
from fused_rect.backends import eager
from fused_rect.kernels import cpu


@pytest.fixture(autouse=True)
def automatic():
    backends._forget()
    with fr.backend("auto"):
        yield
    backends._forget()


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


@pytest.mark.skipif(not cpu.available(), reason=cpu.reason())
def test_forcing_holds_where_calls_in_cpp_served_before(monkeypatch):
    """They ask themselves what is chosen."""
    x, served = torch.randn(2, 3), []
    fr.functional.bias_relu(x)
    original = eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: served.append(args) or original(*args))
    with fr.backend("eager"):
        fr.functional.bias_relu(x)
        fr.functional.bias_relu_(x)
        assert len(served) == 2
        with fr.backend("auto"):
            fr.functional.bias_relu(x)
    assert len(served) == 2


# ---- how far it reaches: as far as torch.no_grad() ----


def state():
    return torch.is_grad_enabled(), backends.name("cpu")


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_do_not_see_each_others(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", "triton")  # as FUSED_RECT_BACKEND would have it

    def other():
        before = backends.name("cpu")
        with fr.backend("native"):
            return before, backends.name("cpu"), backends.resolve("cpu").__name__

    monkeypatch.setattr(backends, "_native", lambda: (True, "built"))
    with fr.backend("eager"):
        assert in_thread(other) == ("triton", "native", "fused_rect.kernels.cpu")
        assert backends.name("cpu") == "eager" and backends.resolve("cpu").__name__ == "fused_rect.backends.eager"
        assert backends.direct(torch.empty(0)) is None


def test_contexts_that_overlap_in_two_threads_end():
    """A enters, B enters, A leaves, B leaves: the process is as it was."""
    entered, left, seen = threading.Event(), threading.Event(), []
    before, outside = backends.name("cpu"), in_thread(state)[1]

    def second():
        entered.wait()
        with fr.backend("triton"):
            left.set()
            first_thread.join()
            seen.append(backends.name("cpu"))

    def first():
        with fr.backend("eager"):
            entered.set()
            left.wait()
            seen.append(backends.name("cpu"))

    first_thread, second_thread = threading.Thread(target=first), threading.Thread(target=second)
    first_thread.start(), second_thread.start()
    first_thread.join(), second_thread.join()
    assert seen == ["eager", "triton"]
    assert backends.name("cpu") == before and in_thread(state)[1] == outside


class Deep(torch.autograd.Function):
    """Its backward calls a backward, `depth` of them; from the 60th on autograd takes threads of its own."""

    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.seen[threading.get_ident()] = backends.name("cpu")
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones(1, requires_grad=True)
                Deep.apply(x, ctx.depth - 1, ctx.seen).backward()
        return grad, None, None


def test_autograds_threads_have_the_callers():
    seen = {}
    with fr.backend("triton"):
        y = Deep.apply(torch.ones(1, requires_grad=True), 70, seen)
    with fr.backend("eager"):
        y.backward()
    assert len(seen) > 1 and set(seen.values()) == {"eager"}


class Asks(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return state()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_start_with_what_no_grad_would_give_them(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} is not a way to start a process here")
    loader = torch.utils.data.DataLoader(Asks(), batch_size=None, num_workers=1, multiprocessing_context=method)
    with torch.no_grad(), fr.backend("triton"):
        (found,) = loader
    # A process that starts with gradients on starts with FUSED_RECT_BACKEND too, as a thread does.
    assert found == ([False, "triton"] if method == "fork" else [True, in_thread(state)[1]])


def test_an_unknown_name():
    with (
        pytest.raises(ValueError, match="backend name must be one of auto, triton, native, eager, got 'cuda'"),
        fr.backend("cuda"),
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

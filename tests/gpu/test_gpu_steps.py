"""The steps' own logic, as far as a machine without a GPU can try it: what is wrong is found, what is right is ok."""

import os

import pytest

pytest.importorskip("triton")

import torch
from torch import nn

import fused_rect as fr
from fused_rect.perf.gpu import agreement, large, networks, pool, replays, sanitizer, sizes, steps, suite
from fused_rect.perf.profiling.measure import Case
from fused_rect.rules import RULES


@pytest.fixture
def interpreted():
    """Triton's interpreter, where the kernels run on CPU tensors."""
    import triton

    from fused_rect.kernels import rectify

    if isinstance(rectify.rectify, triton.JITFunction):
        pytest.skip("the kernels are not interpreted in this run")


# ---- agreement


@pytest.mark.parametrize(
    "shape, dtype", [((2, 3, 5, 7), "float32"), ((40, 12, 5, 3), "float16"), ((33, 10), "float64")]
)
def test_the_kernels_agree_with_the_eager_path(shape, dtype, interpreted):
    found = list(agreement.agreement("cpu", agreement.cases([shape], [dtype])))
    assert [row["cases"] for row in found] == [8] * (2 if len(shape) == 4 else 1)
    assert all(row["ok"] for row in found), found


@pytest.mark.parametrize("wrong", ["out", "bits", "grad_input", "sum"])
def test_a_kernel_that_is_wrong_is_found(wrong, interpreted, monkeypatch):
    forward, backward = agreement.eager.forward, agreement.eager.backward

    def wrong_forward(*arguments):
        forward(*arguments)
        *_, out, bits = arguments
        if wrong == "out":
            out[1] += 1e-5
        if wrong == "bits":
            bits[0] ^= 1

    def wrong_backward(*arguments):
        bias, weight = backward(*arguments)
        if wrong == "grad_input":
            arguments[4][1] += 1e-5
        return (bias + 1e-3 if wrong == "sum" else bias), weight

    monkeypatch.setattr(agreement.eager, "forward", wrong_forward)
    monkeypatch.setattr(agreement.eager, "backward", wrong_backward)
    *cases, whole = agreement.agreement("cpu", agreement.cases([(33, 10)], ["float32"]))
    assert len(cases) == whole["cases"] == 8 and not whole["ok"] and not any(row["ok"] for row in cases)
    place = {"out": "forward", "bits": "forward", "grad_input": "grad_input", "sum": "sums"}[wrong]
    assert whole["worst, in what is allowed"][place] > 1


def test_a_case_that_raises_has_failed_and_the_others_run(interpreted, monkeypatch):
    forward = agreement.eager.forward

    def broken(x, parameters, rule, *rest):
        if rule.random:
            raise RuntimeError("an illegal address")
        forward(x, parameters, rule, *rest)

    monkeypatch.setattr(agreement.eager, "forward", broken)
    *failed, whole = agreement.agreement("cpu", agreement.cases([(33, 10)], ["float32"]))
    assert [row["raised"] for row in failed] == ["RuntimeError: an illegal address"] * 3
    assert whole["cases"] == 8 and not whole["ok"] and whole["worst, in what is allowed"]["forward"] <= 1


def process(_):
    return os.getpid()


def test_much_work_goes_to_several_processes_and_comes_back_in_order():
    items = list(range(8))
    assert list(pool.pooled(str, items, worth=4)) == list(map(str, items))
    here = [os.getpid()] * 7
    assert list(pool.pooled(process, items[:7], worth=4)) == here
    assert os.getpid() not in pool.pooled(process, items, worth=4)


# ---- CUDA graphs


def again(step):
    """What a correct capture amounts to."""
    step()
    return step


def outcome(capture):
    with fr.backend("eager"):
        return {row["case"]: row["ok"] for row in replays.replays("cpu", capture)}


def test_replays_of_a_training_step_are_checked():
    found = outcome(again)
    assert len(found) == 3 and all(found.values())


def test_a_seed_that_freezes_in_the_graph_is_found():
    def frozen(step):
        def replay():
            torch.manual_seed(7)
            step()

        return replay

    found = outcome(frozen)
    assert not found["other slopes each replay"] and found["same slopes in backward"]


def test_a_graph_that_replays_nothing_is_found():
    assert not outcome(lambda step: lambda: None)["weights move each replay"]


# ---- large tensors


def test_every_element_of_a_large_tensor_is_compared(interpreted, monkeypatch):
    monkeypatch.setattr(large, "PART", 300)  # parts that end inside a plane
    with fr.backend("eager"):
        found = list(large.large("cpu", 1000))
    assert len(found) == len(RULES) and all(row["ok"] for row in found), found
    assert "1,004 elements" in found[0]["case"]


@pytest.mark.parametrize("wrong", ["out", "grad", "sum"])
def test_one_wrong_element_of_a_large_tensor_is_found(wrong, monkeypatch):
    eager = fr.backends.resolve("cpu") if fr.backends.name("cpu") == "eager" else agreement.eager
    forward, backward = eager.forward, eager.backward

    def wrong_forward(x, parameters, rule, out, bits):
        forward(x, parameters, rule, out, bits)
        out.view(-1)[-1] += (wrong == "out") * 1.0

    def wrong_backward(grad, kept, parameters, rule, grad_input, need):
        bias, weight = backward(grad, kept, parameters, rule, grad_input, need)
        grad_input.view(-1)[-1] += (wrong == "grad") * 1.0
        return bias + (wrong == "sum") * 1.0, weight

    monkeypatch.setattr(eager, "forward", wrong_forward)
    monkeypatch.setattr(eager, "backward", wrong_backward)
    with fr.backend("eager"):
        assert not any(row["ok"] for row in large.large("cpu", 1000))


# ---- the suite of tests


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder whose tests are written by the test: a function that writes them and runs the step."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)

    def run(text):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = ptx\naddopts = -ra\n")
        (tmp_path / "tests" / "test_it.py").write_text("import pytest\npytestmark = pytest.mark.ptx\n" + text)
        return list(suite.suite(["tests"]))

    return run


PASSING, FAILING = "def test_a(): pass\n", "def test_b(): assert False\n"
SKIPPED = "@pytest.mark.skip(reason='no machine')\ndef test_c(): pass\n"


@pytest.mark.parametrize("workers", [1, 3])
def test_the_tests_outcomes_are_counted(workers, checkout, monkeypatch):
    monkeypatch.setattr(suite.os, "cpu_count", lambda: workers)
    failed, whole = checkout(PASSING + FAILING + SKIPPED)
    assert failed == {"ok": False, "case": "tests/test_it.py::test_b"}
    assert whole["counts"] == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1} and not whole["ok"]


def test_tests_that_pass_are_ok_and_tests_that_are_skipped_are_not(checkout):
    (whole,) = checkout(PASSING + SKIPPED)
    assert whole["ok"]
    (whole,) = checkout(SKIPPED)
    assert not whole["ok"] and whole["why"] == "no test passed; 1 skipped"


def test_a_file_that_cannot_be_read_is_not_ok(checkout, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_other.py").write_text("import no_such_module\n")
    whole = checkout(PASSING)[-1]
    assert whole["counts"]["PASSED"] == 1 and not whole["ok"]


def test_without_tests_the_step_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (row,) = suite.suite(["tests"])
    assert row["ok"] is None and "a checkout has them" in row["why"]


# ---- what is timed


def build_one(missing):
    calls = {"fused": lambda: None, "eager": "no such thing" if missing else lambda: None}
    return calls | {"another": "that nobody asked for"}


UNSAID = ("workload", "layer", "part", "rectifier", "mode", "device", "implementation", "dtype", "layout", "allocator",
          "shape", "output", "kernel")  # fmt: skip
ABOUT = {**dict.fromkeys(UNSAID, ""), "base": "fused", "threads": 1, "bytes": 1, "flops": 1}


@pytest.mark.parametrize("missing", [False, True])
def test_a_call_that_cannot_be_timed_is_not_ok(missing):
    case = Case("one", f"{__file__}:build_one", {"missing": missing}, about=ABOUT, peers=("fused", "eager"))
    bad = Case("bad", f"{__file__}:no_such_builder", about=ABOUT)
    row, failed = steps.measured([case, bad], sizes.SMALL)
    assert row["ok"] is not missing and [record["peer"] for record in row["records"]] == ["fused", "eager"]
    assert row.get("missing", {}) == ({"eager": "no such thing"} if missing else {})
    assert not failed["ok"] and "no_such_builder" in failed["raised"]


def test_what_is_timed_is_what_was_asked():
    """bf16 and float32, both layouts, whole and odd planes; layers and networks in training and inference."""
    kernels = [case.about for case in sizes.kernels(sizes.FULL)][1:]
    assert {(a["dtype"], a["layout"]) for a in kernels} == {
        (d, o) for d in ("bfloat16", "float32") for o in ("contiguous", "channels_last")
    }
    assert {a["mode"] for a in kernels} == {"forward", "training"}
    assert {a["output"] for a in kernels} == {"32x64x128x128", "32x51x145x145", "8x64x56x56"}
    assert {a["rectifier"] for a in kernels} == {"relu", "leaky_relu", "prelu", "rrelu"}
    for timed in (sizes.models(sizes.FULL), sizes.layers(sizes.FULL)):
        assert {case.about["mode"] for case in timed} == {"training", "inference"}
        assert all(case.memory and {"compiled", "fused compiled", "eager", "fused"} <= {*case.peers} for case in timed)
    assert {case.clock for case in sizes.kernels(sizes.FULL)} == {"graph"}
    assert {case.clock for case in sizes.host(sizes.FULL)} == {"host"}


NETWORKS = [
    (networks.rrdbnet, (8, 1), (1, 3, 48, 48)),
    (networks.compact, (8, 1), (1, 3, 48, 48)),
    (networks.hifigan, (8,), (1, 80, 512)),
    (networks.resnet, (8, 1), (1, 3, 96, 96)),
]


@pytest.mark.parametrize(("network", "small", "shape"), NETWORKS, ids=[case[0].__name__ for case in NETWORKS])
def test_networks_are_fused_and_mean_the_same(network, small, shape):
    torch.manual_seed(0)
    model = network(*small).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    scale = {"rrdbnet": (4, 4), "compact": (4, 4), "hifigan": (64,)}.get(network.__name__)
    if scale is not None:
        assert expected.shape[2:] == tuple(s * n for s, n in zip(scale, shape[2:]))
    fr.fuse(model)
    torch.testing.assert_close(model(x), expected)
    assert sum(site.fused for site in fr.fusion.report(model)) > 0


def test_the_resnet_keeps_statistics_where_it_is_timed():
    assert all(m.running_mean is not None for m in networks.resnet().modules() if isinstance(m, nn.BatchNorm2d))


def test_without_compute_sanitizer_the_step_says_so(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    (row,) = sanitizer.sanitizer()
    assert row["ok"] is None and "PATH" in row["why"]


def test_each_check_of_the_sanitizer_is_a_row(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "=== $2"\n[ "$2" != racecheck ]\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(tool))
    found = {row["case"]: row for row in sanitizer.sanitizer()}
    assert {name: row["ok"] for name, row in found.items()} == {"memcheck": True, "racecheck": False, "initcheck": True}
    assert found["memcheck"]["summary"] == ["=== memcheck"]

"""The GPU check, as far as a machine without a GPU can try it: each step's logic, the report, and the refusal."""

import json

import pytest

pytest.importorskip("triton")

import torch
from made_up import report as made_up

import fused_rect as fr
from fused_rect.perf import gpu_check


@pytest.fixture
def interpreted():
    """Triton's interpreter, where the kernels run on CPU tensors."""
    import triton

    from fused_rect.kernels import rectify

    if isinstance(rectify.rectify, triton.JITFunction):
        pytest.skip("the kernels are not interpreted in this run")


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--results", str(tmp_path / "results")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "shape, dtype", [((2, 3, 5, 7), "float32"), ((40, 12, 5, 3), "float16"), ((33, 10), "float64")]
)
def test_the_kernels_agree_with_the_eager_path(shape, dtype, interpreted):
    found = gpu_check.agreement("cpu", [shape], [dtype])
    assert not found["wrong"], found["wrong"][0]
    assert found["ok"] and found["cases"] == 8 * (2 if len(shape) == 4 else 1)


@pytest.mark.parametrize("wrong", ["out", "bits", "grad_input", "sum"])
def test_a_kernel_that_is_wrong_is_found(wrong, interpreted, monkeypatch):
    forward, backward = gpu_check.eager.forward, gpu_check.eager.backward

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

    monkeypatch.setattr(gpu_check.eager, "forward", wrong_forward)
    monkeypatch.setattr(gpu_check.eager, "backward", wrong_backward)
    found = gpu_check.agreement("cpu", [(2, 3, 5, 7)], ["float32"])
    assert not found["ok"]
    place = {"out": "forward", "bits": "forward", "grad_input": "grad_input", "sum": "sums"}[wrong]
    assert found["worst, in tolerances"][place] > 1


def again(step):
    """What a correct capture amounts to."""
    step()
    return step


def test_replays_of_a_training_step_are_checked():
    with fr.backend("eager"):
        assert gpu_check.replays("cpu", again) == {
            "ok": True,
            "other slopes each replay": True,
            "same slopes in backward": True,
            "weights move each replay": True,
        }


def test_a_seed_that_freezes_in_the_graph_is_found():
    def frozen(step):
        def replay():
            torch.manual_seed(7)
            step()

        return replay

    with fr.backend("eager"):
        found = gpu_check.replays("cpu", frozen)
    assert not found["ok"] and not found["other slopes each replay"] and found["same slopes in backward"]


def test_a_graph_that_replays_nothing_is_found():
    with fr.backend("eager"):
        found = gpu_check.replays("cpu", lambda step: lambda: None)
    assert not found["ok"] and not found["weights move each replay"]


def test_times_are_the_profiles(monkeypatch):
    monkeypatch.setattr(gpu_check.cli, "measured", lambda work, options, console: made_up())
    found = gpu_check.profile("--workload", "gpu")
    assert found["ok"] and "bias + rectifier alone" in found["report"]
    text = gpu_check.markdown({}, {"profile": {**found, "seconds": 1.0}})
    assert "```\n" in text and "1.50 ▲" in text and "records" not in text


def test_a_kernel_that_could_not_be_timed_has_failed(monkeypatch):
    frame = made_up()
    frame.loc[frame.peer == "fused", "absent"] = "OutOfMemoryError"
    monkeypatch.setattr(gpu_check.cli, "measured", lambda work, options, console: frame)
    assert not gpu_check.profile()["ok"]


def test_a_step_that_raises_has_failed_and_the_others_run(capsys):
    def broken():
        raise RuntimeError("no such kernel")

    report = gpu_check.check({"broken": broken, "fine": lambda: {"ok": True}, "absent": lambda: {"ok": None}})
    assert report["broken"]["raised"] == "RuntimeError: no such kernel"
    assert [step["ok"] for step in report.values()] == [False, True, None]
    assert "broken: FAILED" in capsys.readouterr().out


def test_the_report_as_markdown():
    report = {"tests": {"ok": False, "seconds": 1.0, "summary": ["1 failed"]}}
    text = gpu_check.markdown({"accelerator": "H100", "target": "sm_90"}, report)
    assert "- accelerator: H100" in text and "| tests | FAILED | 1.0 |" in text and "- summary: ['1 failed']" in text


def test_results_are_written_and_failures_are_the_exit_status(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main unsets it, which other tests must not see
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda device: {"accelerator": "none", "target": "sm_90"})
    outcomes = {name: (lambda: {"ok": True}) for name in gpu_check.STEPS}
    monkeypatch.setattr(gpu_check, "STEPS", outcomes)
    assert gpu_check.main(["--results", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*.json")
    assert set(json.loads(written.read_text())["steps"]) == set(outcomes)
    assert written.with_suffix(".md").exists()
    outcomes["tests"] = lambda: {"ok": False}
    assert gpu_check.main(["--results", str(tmp_path), "--only", "tests"]) == 1

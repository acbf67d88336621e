"""The GPU check as a command: the plan, a process a step, files that no run writes over another's, the report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from made_up import report as made_up

from fused_rect.perf import gpu_check
from fused_rect.perf.gpu import report, running, steps
from fused_rect.perf.profiling import records

ROOT = Path(gpu_check.__file__).parents[2]


@pytest.fixture
def with_a_gpu(monkeypatch):
    """The command believes that there is one; its steps are made up: one outcome a step, "ok" for the others."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main unsets it, which other tests must not see
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda device: {"accelerator": "none", "target": "sm_90"})
    outcomes, asked = {}, []

    def run(name, size, seconds, log):
        asked.append(name)
        log.write(f"all that {name} says\n")
        row = {"ok": True, "case": name}
        return {"outcome": outcomes.get(name, "ok"), "seconds": 1.0, "exit status": 0, "rows": [row]}

    monkeypatch.setattr(running, "run", run)
    return outcomes, asked


def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--results", str(tmp_path / "results")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_plan_comes_first_and_fits_eight_minutes(tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "--results", str(tmp_path / "results")]) == 0
    told = capsys.readouterr().out
    assert all(f"{step.seconds:4} s  {step.what}" in told for step in steps.STEPS.values())
    assert sum(step.seconds for step in steps.STEPS.values()) <= 470  # the command itself starts in some seconds
    assert not (tmp_path / "results").exists()


def test_each_step_is_in_the_files_and_the_log(tmp_path, with_a_gpu, capsys):
    assert gpu_check.main(["--results", str(tmp_path)]) == 0
    base = next(tmp_path.glob("*.json"))
    content = json.loads(base.read_text())
    assert list(content["steps"]) == list(steps.STEPS) and content["machine"]["target"] == "sm_90"
    assert "| kernels | ok | 1.0 |" in base.with_suffix(".md").read_text()
    assert "all that tests says" in base.with_suffix(".log").read_text()
    assert capsys.readouterr().out.startswith("10 steps")


@pytest.mark.parametrize("outcome, status", [("FAILED", 1), ("out of time", 1), ("not run", 0)])
def test_failures_are_the_exit_status(outcome, status, tmp_path, with_a_gpu):
    with_a_gpu[0]["kernels"] = outcome
    assert gpu_check.main(["--results", str(tmp_path), "--only", "kernels", "host"]) == status
    assert with_a_gpu[1] == ["kernels", "host"]  # the others run all the same


def test_a_later_run_writes_over_nothing(tmp_path, with_a_gpu):
    for _ in range(3):
        gpu_check.main(["--results", str(tmp_path), "--only", "host"])
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.log"))) == 3


def test_what_is_found_is_written_before_the_next_step(tmp_path, with_a_gpu, monkeypatch):
    run = running.run

    def killed(name, *rest):
        if name == "agreement":
            raise KeyboardInterrupt
        return run(name, *rest)

    monkeypatch.setattr(running, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--results", str(tmp_path)])
    assert list(json.loads(next(tmp_path.glob("*.json")).read_text())["steps"]) == ["prepare"]


def test_a_report_that_fails_costs_no_step(tmp_path, with_a_gpu, monkeypatch):
    def broken(*_):
        raise ValueError("no such column")

    monkeypatch.setattr(report, "markdown", broken)
    assert gpu_check.main(["--results", str(tmp_path), "--only", "kernels", "host"]) == 0
    assert set(json.loads(next(tmp_path.glob("*.json")).read_text())["steps"]) == {"kernels", "host"}
    assert "no such column" in next(tmp_path.glob("*.log")).read_text()


# ---- a process a step


@pytest.mark.parametrize(
    "rows, status, expected",
    [
        ([{"ok": True}], 0, "ok"),
        ([{"ok": True}, {"ok": None}, {"told": 1}], 0, "ok"),
        ([{"ok": True}, {"ok": False}], 0, "FAILED"),
        ([{"ok": True}], -11, "FAILED"),
        ([], 0, "FAILED"),
        ([{"ok": None}], 0, "not run"),
        ([{"ok": True}, running.CUT], -9, "out of time"),
        ([{"ok": False}, running.CUT], -9, "FAILED"),
    ],
)
def test_outcomes(rows, status, expected):
    assert running.outcome(rows, status) == expected


def step_in(tmp_path, text, name="made", seconds=60.0):
    """What `running.run` makes of a step that ``text`` defines, run in a real process; and its log."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\nsteps = types.ModuleType('fused_rect.perf.gpu.steps')\n"
        f"class Step:\n{text}\n"
        "steps.STEPS = {'made': Step}\nsys.modules[steps.__name__] = steps\n"
    )
    with pytest.MonkeyPatch.context() as patched, open(tmp_path / "log", "w") as log:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
        found = running.run(name, "small", seconds, log)
    return found, (tmp_path / "log").read_text()


def test_rows_come_back_and_what_is_printed_goes_to_the_log(tmp_path):
    found, log = step_in(tmp_path, """
    def run(size):
        print("to standard output")
        yield {"ok": True, "case": float("inf"), "other": [float("nan")]}
""")  # fmt: skip
    assert found["outcome"] == "ok" and found["rows"] == [{"ok": True, "case": "inf", "other": [None]}]
    assert log == "to standard output\n"


def test_a_step_that_dies_keeps_its_rows_and_says_how(tmp_path):
    found, _ = step_in(tmp_path, """
    def run(size):
        yield {"ok": True}
        import os
        os.kill(os.getpid(), 11)
""")  # fmt: skip
    assert found["outcome"] == "FAILED" and found["exit status"] == -11 and found["rows"] == [{"ok": True}]


def test_a_step_that_raises_has_failed_with_its_traceback_in_the_log(tmp_path):
    found, log = step_in(tmp_path, """
    def run(size):
        yield {"ok": True}
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
""")  # fmt: skip
    assert found["outcome"] == "FAILED" and "illegal memory access" in log


def test_a_step_ends_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GRACE", 120.0)  # for a busy machine, where importing takes long
    found, _ = step_in(tmp_path, """
    def run(size):
        while True:
            yield {"ok": True}
""", seconds=0.0)  # fmt: skip
    assert found["outcome"] == "out of time" and found["rows"] == [{"ok": True}, running.CUT]


def test_a_step_that_does_not_end_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    wait = subprocess.Popen.wait

    def out_of_time_once_it_has_started(self, timeout=None):
        if timeout != 7.0 + running.GRACE:
            return wait(self, timeout)
        while not (tmp_path / "log").read_text().endswith("\n"):
            time.sleep(0.05)
            assert self.poll() is None
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", out_of_time_once_it_has_started)
    found, log = step_in(tmp_path, """
    def run(size):
        import os, subprocess
        yield {"ok": True}
        child = subprocess.Popen(["sleep", "600"])
        print(child.pid, flush=True)
        child.wait()
""", seconds=7.0)  # fmt: skip
    assert found["outcome"] == "out of time" and found["rows"][0] == {"ok": True}
    assert "ended after 12 s" in found["rows"][1]["why"]
    assert not alive(int(log))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- the report


def test_the_report_tells_what_failed():
    rows = [{"ok": False, "case": "rrelu", "raised": "no\nkernel"}, {"ok": True, "case": "relu", "worst": 0.5}]
    step = {"outcome": "FAILED", "seconds": 1.0, "rows": rows}
    text = report.markdown({"accelerator": "H100"}, {"agreement": step}, {"agreement": 30})
    assert "- accelerator: H100" in text and "| agreement | FAILED | 1.0 | 30 |" in text
    assert "- **FAILED** rrelu: raised: no kernel\n" in text and "- relu: worst: 0.5\n" in text


def timed(mode, peer, seconds, moved):
    about = {"mode": mode, "dtype": "bfloat16", "output": "2x4x1000x1000", "part": "epilogue", "peer": peer}
    return {"rectifier": "relu", "layout": "channels_last", "seconds": seconds, "bytes": moved, **about}


def test_the_kernels_table_sets_each_pass_beside_the_others():
    """8 M elements: forward 33 MB in 20 us beside a copy of 32 MB in 16; backward is training without forward."""
    times = {"forward": (20e-6, 25e-6, 40e-6, 16e-6), "training": (50e-6, 70e-6, 100e-6, 16e-6)}
    peers = ("fused", "compiled", "eager", "copy")
    found = [timed(mode, peer, s, {"forward": 33, "training": 66}[mode] * 10**6)
             for mode, seconds in times.items() for peer, s in zip(peers, seconds)]  # fmt: skip
    shape = {"target": "sm_90", "rectifier": "relu", "dtype": "bfloat16", "layout": "channels_last",
             "shape": [2, 4, 1000, 1000]}  # fmt: skip
    predictions = [{"predicted": shape, "kernel": name, "fraction": fraction, "bound": "memory"}
                   for name, fraction in (("forward", 1.0), ("backward", 0.9), ("finish", None))]  # fmt: skip
    step = {"outcome": "ok", "seconds": 1.0}
    made = {"prepare": {**step, "rows": predictions}, "kernels": {**step, "rows": [{"ok": True, "records": found}]}}
    text = report.markdown({}, made, {"prepare": 1, "kernels": 1})
    head = "| relu | bfloat16 | channels_last | 2x4x1000x1000 |"
    assert f"{head} forward | 20.0 | 1650 | 0.82 | 1.00 | 1.25 | 2.00 |" in text
    assert f"{head} backward | 30.0 | 1100 | 0.55 | 0.90 | 1.50 | 2.00 |" in text


def test_layers_and_networks_are_told_as_a_profile_tells_them():
    rows = [{"ok": True, "case": "a", "records": records.plain(made_up())}]
    step = {"outcome": "ok", "seconds": 1.0, "rows": rows}
    text = report.markdown({}, {"layers": step}, {"layers": 1})
    assert "convolution + bias + rectifier, training" in text and "1.50 ▲" in text


def test_the_hosts_times_are_told_in_microseconds():
    record = timed("training", "fused", 31e-6, 0) | {"shape": "1x8x8x8"}
    absent = timed("training", "eager", None, 0) | {"shape": "1x8x8x8"}
    step = {"outcome": "ok", "seconds": 1.0, "rows": [{"ok": True, "records": [record, absent]}]}
    text = report.markdown({}, {"host": step}, {"host": 1})
    assert "| epilogue | relu | training | 1x8x8x8 | 31.0 | absent |" in text


# ---- on a CUDA device made of CPU memory


@pytest.fixture
def soft(tmp_path):
    """The command on the soft device, all its processes too; how many kernels are compiled then, by their names."""
    if not (folder := soft_device()):
        pytest.skip("softcuda, a CUDA device made of CPU memory, is not on PYTHONPATH")
    lacking = ("pip", "spandrel", "selenium", "expecttest", "mypy", "ruff")  # which a machine with a GPU need not have
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({lacking}))\nimport softcuda\nsoftcuda.install(90)\n"
        f"sys.path.append({str(ROOT / 'tests')!r})\nimport soft_device\nsoft_device.mend()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSED_RECT_BACKEND")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), folder]), "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }  # fmt: skip

    def run(*only):
        results = tmp_path / "-".join(only)
        command = [sys.executable, "-m", "fused_rect.perf.gpu_check", "--size", "small", "--results", results, "--only"]
        done = subprocess.run([*command, *only], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr + next(results.glob("*.log")).read_text()[-3000:]
        found = json.loads(next(results.glob("*.json")).read_text())["steps"]
        return {name: step["outcome"] for name, step in found.items()}, found

    run.compiled = lambda: sorted(p.name for p in (tmp_path / "triton").glob("*/*.cubin"))
    return run


def soft_device():
    """The folder on the path that holds softcuda, or None."""
    return next((place for place in sys.path if os.path.isdir(os.path.join(place, "softcuda"))), None)


def test_on_the_soft_device_what_is_prepared_is_not_compiled_again(soft):
    outcomes, found = soft("prepare")
    assert outcomes == {"prepare": "ok"}
    assert {row["kernel"] for row in found["prepare"]["rows"] if "predicted" in row} == {
        "forward",
        "backward",
        "finish",
    }
    compiled = soft.compiled()
    outcomes, found = soft("kernels", "models", "host", "layers")
    assert outcomes == dict.fromkeys(("kernels", "models", "host", "layers"), "ok")
    assert soft.compiled() == compiled and any(name.startswith("rectify") for name in compiled)
    assert all(record["seconds"] > 0 for step in found.values() for row in step["rows"] for record in row["records"])
    assert found["models"]["rows"][0]["records"][0]["live_bytes"] > 0


def test_on_the_soft_device_the_other_steps_find_the_kernels_right(soft):
    outcomes, found = soft("agreement", "tests", "large", "sanitizer")
    assert outcomes == {"agreement": "ok", "tests": "ok", "large": "ok", "sanitizer": "not run"}
    assert found["tests"]["rows"][-1]["counts"]["PASSED"] > 50

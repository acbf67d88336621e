"""`fused-rect profile` under faults: what is measured is kept, what cannot work is refused, nothing is orphaned."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import report
from rich.console import Console

from fused_rect import cli, files
from fused_rect.perf.profiling import named, peers, records
from fused_rect.perf.profiling.cli import PLAIN
from fused_rect.perf.profiling.compare import compare
from fused_rect.perf.profiling.report import print_comparison

MODEL = """
import sys
import torch
from torch import nn

instance = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
pair = instance, torch.zeros(1, 3, 4, 4)
number = 3

class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("forward")  # line 12

class Wants(nn.Module):
    def __init__(self, width):
        super().__init__()

def factory():
    return instance

def raises():
    return 1 / 0  # line 22

def leaves():
    sys.exit(3)  # line 25

def dictionary():
    return {}
"""
MARKED = ("[/b]", "[bold", ":smile:", "%s {0}", "a\x1b[2J", "line\nbreak", "\udcff", "µ≈▲")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"m{uuid.uuid4().hex}.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def measured(monkeypatch):
    """Every profile measures this at once."""
    frame = report()
    monkeypatch.setattr(records, "collect", lambda *_, **__: frame)
    monkeypatch.setattr(records, "key", lambda about: "one and the same")
    return frame


def profile(*arguments):
    return cli.main(["profile", *map(str, arguments)])


# ---- nothing measured is lost ----


@pytest.mark.parametrize("name", MARKED, ids=ascii)
def test_names_are_no_markup(name, model, measured, tmp_path, capsys):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    inside = model.rename(folder / model.name)
    measured.loc[:, "layer"] = name
    old = tmp_path / "old.json"
    records.save(old, measured, {}, "")
    out = {kind: folder / f"a.{kind}" for kind in ("json", "csv", "html")}
    options = [part for kind, path in out.items() for part in (f"--{kind}", path)]
    assert profile("--model", f"{inside}:instance", "--shape", "1,3,4,4", "--compare", old, *options) == 0
    printed = capsys.readouterr().out
    assert all(path.stat().st_size for path in out.values())
    assert "\x1b" not in name or printed.count("\x1b[2J") == 0
    assert records.shown(name) in printed
    records.load(out["json"])


def test_files_are_written_before_anything_is_printed(measured, tmp_path, monkeypatch):
    def fail(*_):
        raise UnicodeEncodeError("ascii", "µ", 0, 1, "any error")

    monkeypatch.setattr("fused_rect.perf.profiling.report.print_report", fail)
    with pytest.raises(UnicodeEncodeError):
        profile("--json", tmp_path / "a.json")
    assert len(records.load(tmp_path / "a.json")) == len(measured)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "shift_jis", "utf-8"])
def test_any_terminal_can_be_printed_to(encoding, measured, monkeypatch):
    measured.loc[:, "layer"] = "µ ≈ \udcff"
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    assert profile() == 0
    out.flush()
    printed = out.buffer.getvalue().decode(encoding)
    assert "eager" in printed and ("1.50 ▲" if encoding in ("utf-8",) else "1.50") in printed
    if encoding == "ascii":
        assert "1.50 + 1.47-1.53" in printed and "u ~ ?" in printed


def test_a_file_that_cannot_be_written_leaves_the_others(measured, tmp_path, monkeypatch, capsys):
    if Path("/dev/full").exists():
        assert profile("--json", "/dev/full", "--csv", tmp_path / "a.csv") == 1
        assert "No space left on device: '/dev/full'" in capsys.readouterr().err
        assert (tmp_path / "a.csv").stat().st_size
    replace = files.replace

    def full(path, write):
        if path.suffix == ".json":
            raise OSError(28, "No space left on device", str(path))
        replace(path, write)

    monkeypatch.setattr(files, "replace", full)
    assert profile("--json", tmp_path / "b.json", "--html", tmp_path / "b.html") == 1
    assert "b.json" in capsys.readouterr().err and (tmp_path / "b.html").stat().st_size


def test_an_interruption_is_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "collect", interrupted)
    assert profile("--json", tmp_path / "a.json") == 130
    assert "interrupted" in capsys.readouterr().err and not os.listdir(tmp_path)


# ---- files to compare with ----


def saved(path):
    records.save(path, report(), {}, "")
    return json.loads(path.read_text())


DAMAGED = {
    "empty": b"", "text": b"text", "binary": bytes(range(256)), "none": b"{}", "list": b"[]", "null": b"null",
    "another schema": b'{"schema": 1, "records": []}', "no records": b'{"schema": 2}', "deep": b"[" * 100_000,
    "records of another kind": b'{"schema": 2, "records": {"a": 1}}', "a number": b'{"schema": 2, "records": 3}',
    "words": b'{"schema": 2, "records": ["seconds"]}', "numbers": b'{"schema": 2, "records": [1]}',
    "other fields": b'{"schema": 2, "records": [{"seconds": 1}]}',
}  # fmt: skip
WRONG = [
    ("ratio", "1"), ("ratio", 0.0), ("ratio", -1.0), ("ratio", float("inf")), ("ratio", float("nan")), ("ratio", True),
    ("ratio_low", 9.0), ("ratio_high", 0.1), ("degrees", None), ("degrees", 1.5), ("degrees", 10**40), ("layer", 3),
    ("seconds", []), ("verdict", None),
]  # fmt: skip


@pytest.mark.parametrize("kind", [*DAMAGED, *WRONG, "absent", "folder", "cut short"], ids=str)
def test_a_damaged_or_foreign_file_is_refused_before_measuring(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "collect", lambda *_, **__: pytest.fail("measured"))
    old = tmp_path / "old.json"
    content = saved(old)
    if isinstance(kind, tuple):
        content["records"][3][kind[0]] = kind[1]
        old.write_text(json.dumps(content))
    elif kind in DAMAGED:
        old.write_bytes(DAMAGED[kind])
    elif kind == "cut short":
        old.write_bytes(old.read_bytes()[:-9])
    else:
        old = tmp_path / "no such file" if kind == "absent" else tmp_path
    assert profile("--compare", old) == 2
    assert f"{old} is no file of `fused-rect profile --json`" in capsys.readouterr().err


def test_a_profile_of_something_else_is_refused_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "collect", lambda *_, **__: pytest.fail("measured"))
    saved(tmp_path / "old.json")
    assert profile("--shape", "1,2,3", "--compare", tmp_path / "old.json") == 2
    assert "no case in common" in capsys.readouterr().err


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=3
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_is_taken_can_be_compared_and_printed(data, tmp_path):
    """Any value in any field of a record: refused when it is read, or harmless to the end."""
    path = tmp_path / "old.json"
    content = saved(path)
    record = content["records"][data.draw(st.integers(0, len(content["records"]) - 1))]
    record[data.draw(st.sampled_from(records.COLUMNS))] = data.draw(json_values)
    path.write_text(json.dumps(content))
    try:
        old = records.load(path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    with open(os.devnull, "w", errors="replace") as nowhere:
        print_comparison(compare(old, report()), 0.1, Console(file=nowhere, **PLAIN))


# ---- the user's code ----


@pytest.mark.parametrize(
    "name, status, message",
    [
        ("number", 2, "or a function without arguments that returns either, got int"),
        ("dictionary", 2, "must be a torch.nn.Module, a module and its inputs, or a function without"),
        ("Wants", 2, "calling it without arguments is missing a required argument: 'width'"),
        ("absent", 2, "has no 'absent', it defines Raises, Wants, factory"),
        ("raises", 1, "line 22, in raises: ZeroDivisionError: division by zero"),
        ("leaves", 1, "line 25, in leaves: SystemExit: 3"),
    ],
)
def test_what_is_no_model_is_told_before_measuring(name, status, message, model, monkeypatch, capsys):
    monkeypatch.setattr(records, "collect", lambda *_, **__: pytest.fail("measured"))
    assert profile("--model", f"{model}:{name}", "--shape", "1,3,4,4") == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, message",
    [
        ("import torch\n\n1 / 0\n", "line 3, in <module>: ZeroDivisionError"),
        ("import torch\ndef f(:\n", "line 2: SyntaxError"),
        ("import no_such_package\n", "line 1, in <module>: ModuleNotFoundError: No module named 'no_such_package'"),
        ("import json\njson.loads('{')\n", "line 2, in <module>: JSONDecodeError"),
        ("import torch\ntorch.zeros(2) @ torch.zeros(3)\n", "line 2, in <module>: RuntimeError"),
        ("raise SystemExit\n", "line 1, in <module>: SystemExit: no message"),
        ("raise KeyError('net')\n", "line 1, in <module>: KeyError: 'net'"),
    ],
)
def test_an_error_in_the_users_file_is_told_with_its_line(source, message, model, capsys):
    model.write_text(source)
    assert profile("--model", f"{model}:net", "--shape", "1,3,4,4") == 1
    assert f"{model}, {message}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["instance", "pair", "factory"])
def test_a_model_is_a_module_or_gives_one(name, model):
    shape = None if name == "pair" else [1, 3, 4, 4]
    module, inputs = peers.load_model(f"{model}:{name}", shape, "float64", "cpu")
    assert module(*inputs).dtype == torch.float64


def test_a_model_whose_forward_raises_is_a_failure(model, tmp_path, capsys):
    options = ["--shape", "1,3,4,4", "--processes", "1", "--rounds", "1", "--budget", "0", "--threads", "1"]
    assert profile("--model", f"{model}:Raises", *options, "--json", tmp_path / "a.json") == 1
    printed = capsys.readouterr()
    assert "could be timed" in printed.err and "line 12, in forward: ValueError: forward" in printed.out
    assert records.load(tmp_path / "a.json").absent.str.contains("line 12").any()


def test_named_objects_of_modules_and_files(tmp_path):
    import inspect
    import json as standard

    file = tmp_path / "json.py"  # the name of a module that is there already
    file.write_text("class Here:\n    pass\n")
    here = named.named(f"{file}:Here")
    assert inspect.getsource(here).startswith("class Here") and named.named(f"{file}:Here") is here
    assert named.named("json:dumps") is standard.dumps
    for name in ("no.module:f", "json:nothing", f"{tmp_path}/none.py:f", f"{file}:nothing", "json", ":", "folder/:f"):
        with pytest.raises(ValueError, match="names nothing"):
            named.named(name)


# ---- processes ----


def alive(mark):
    """Processes that were started with ``mark`` in their environment, zombies left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # it has ended, or is not ours
    return found


def start(folder, mark, rounds=2):
    options = ["--shape", "1,3,8,8", "--rectifier", "relu", "--processes", "2", "--threads", "1", "--budget", "1e6"]
    options += ["--rounds", str(rounds)]
    options += [part for kind in ("json", "csv", "html") for part in (f"--{kind}", str(folder / f"a.{kind}"))]
    command = [sys.executable, "-m", "fused_rect.cli", "profile", *options]
    environment = {**os.environ, "FUSED_RECT_TEST_MARK": mark}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def duration(tmp_path_factory):
    """Seconds of a whole run."""
    begun = time.monotonic()
    assert start(tmp_path_factory.mktemp("whole"), "whole").wait(300) == 0
    return time.monotonic() - begun


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by Linux's /proc")
@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(3, 20))])
def test_a_profile_killed_at_any_moment_leaves_no_process_and_no_half_file(number, duration, tmp_path):
    """Every second one would measure for hours: what ends is ended, and not at its end."""
    drawn = random.Random(number)
    mark = uuid.uuid4().hex
    parent = start(tmp_path, mark, rounds=2 if number % 2 else 10**6)
    try:
        time.sleep(drawn.uniform(0.2, 1.0) * duration)
        parent.send_signal((signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 4])
        parent.wait(60)
        end = time.monotonic() + 10
        while alive(mark) and time.monotonic() < end:
            time.sleep(0.1)
        assert alive(mark) == []
    finally:
        for pid in alive(mark):
            os.kill(pid, signal.SIGKILL)
    if (tmp_path / "a.json").exists():
        records.load(tmp_path / "a.json")
    assert not (tmp_path / "a.csv").exists() or (tmp_path / "a.csv").read_text().endswith("\n")
    assert not (tmp_path / "a.html").exists() or (tmp_path / "a.html").read_text().rstrip().endswith("</html>")

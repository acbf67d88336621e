"""The study under faults: damaged files, full disks, Ctrl-C, kills, a folder that is somebody else's, hostile data."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_rect import cli
from fused_rect.study import checkpoint, data, folder, formats, log
from fused_rect.study.formats import DataError
from fused_rect.study.protocol import SMALL

OPTIONS = "--data digits --variants relu,rrelu --seeds 2 --width 0.03125 --train-images 64 --evaluate-every 1 --no-cost"


def study(out, *more):
    return ["study", *OPTIONS.split(), "--out", str(out), *map(str, more)]


def flipped(contents: bytes, bit: int) -> bytes:
    return contents[: bit // 8] + bytes([contents[bit // 8] ^ 1 << bit % 8]) + contents[bit // 8 + 1 :]


# ---- damaged files: refused by name, or the same values ----


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


STATE = {
    "identity": "me",
    "step": 7,
    "model": {"w": torch.linspace(0, 1, 40), "b": torch.arange(3)},
    "history": [{"a": 0.1}],
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "checkpoint.pt"
    checkpoint.save(path, STATE)
    return path, path.read_bytes()


def test_no_bit_of_a_checkpoint_changes_what_is_resumed(kept):
    """One bit of each byte, a different one from byte to byte."""
    path, contents = kept
    for byte in range(len(contents)):
        path.write_bytes(flipped(contents, 8 * byte + byte % 8))
        with pytest.raises(ValueError, match=r"checkpoint\.pt is not a readable checkpoint .*delete it"):
            checkpoint.load(path, "me")
    path.write_bytes(contents)
    assert same(checkpoint.load(path, "me"), STATE) and zipfile.ZipFile(path).testzip() is None


def test_a_checkpoint_cut_anywhere_is_refused(kept):
    path, contents = kept
    for length in range(0, len(contents), 7):
        path.write_bytes(contents[:length])
        with pytest.raises(ValueError, match=r"checkpoint\.pt is not a readable checkpoint .*delete it"):
            checkpoint.load(path, "me")


RESULT = {
    "variant": "relu",
    "seed": 3,
    "final": {"test_loss": 0.123456789, "test_count": 500},
    "history": [{"epoch": 1.5}],
}


def test_no_bit_of_a_result_changes_what_is_reported(tmp_path):
    path = tmp_path / "result.json"
    checkpoint.save_result(path, "me", RESULT)
    contents = path.read_bytes()
    assert checkpoint.load_result(path, "me") == RESULT
    for bit in range(8 * len(contents)):
        path.write_bytes(flipped(contents, bit))
        try:
            assert checkpoint.load_result(path, "me") == RESULT  # a space that became another
        except ValueError as error:
            assert str(path) in str(error) and "delete it" in str(error)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"result\.json is the result of a run with other settings"):
        checkpoint.load_result(path, "you")


def events(path):
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def test_no_bit_of_a_log_is_gone_on_from(tmp_path):
    def opened():
        return log.Log(tmp_path, "relu-seed0", True, False)

    path = tmp_path / "log.jsonl"
    with opened() as first:
        first.write("start", step=0)
        first.write("epoch", train_loss=0.25, step=3)
    contents = path.read_bytes()
    for bit in range(8 * (len(contents) - 1)):
        path.write_bytes(flipped(contents, bit))
        with contextlib.suppress(ValueError):
            opened().__exit__()
            same_lines = [checkpoint.unsealed(line) for line in path.read_bytes().splitlines()]
            assert same_lines == [checkpoint.unsealed(line) for line in contents.splitlines()]
    path.write_bytes(contents.replace(b"0.25", b"0.35"))
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2, is damaged .*delete the file"):
        opened()
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1, is damaged \(it is another run's"):
        log.Log(tmp_path, "rrelu-seed0", True, False)
    path.write_bytes(b"\0" * (1 << 20))
    with pytest.raises(ValueError, match=r"line 1, is damaged"):
        opened()


def test_a_line_that_a_kill_cut_short_is_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    for cut in (1, 5, 60):
        path.unlink(missing_ok=True)
        for event in ("start", "epoch"):
            with log.Log(tmp_path, "relu-seed0", True, False) as file:
                file.write(event)
        path.write_bytes(path.read_bytes()[:-cut])
        with log.Log(tmp_path, "relu-seed0", True, False) as file:
            file.write("resume")
        assert events(path) == ["start", "resume"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A study with one finished run, one that has a checkpoint, and none of the others."""
    out = tmp_path_factory.mktemp("interrupted")
    from fused_rect.study import training

    update, seen = training.Run.update, []

    def stop(run):
        if run.job.name not in seen:
            seen.append(run.job.name)
        if len(seen) == 2 and run.step == 3:
            raise KeyboardInterrupt
        update(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "update", stop)
        assert cli.main(study(out, "--epochs", 2, "--jobs", 1, "--checkpoint-every", 2)) == 130
    assert (out / "runs/relu-seed0/result.json").exists() and (out / "runs/rrelu-seed0/checkpoint.pt").exists()
    return out


def missing(key):
    def damage(path):
        state = torch.load(path, weights_only=True)
        state.pop(key)
        checkpoint.save(path, state)

    return damage


def with_value(key, value):
    def damage(path):
        checkpoint.save(path, {**torch.load(path, weights_only=True), key: value})

    return damage


RESULTS, CHECKPOINT, LOG = "runs/relu-seed0/result.json", "runs/rrelu-seed0/checkpoint.pt", "runs/rrelu-seed0/log.jsonl"
DAMAGES = {
    **{f"checkpoint without {key}": (CHECKPOINT, missing(key)) for key in
       ("identity", "step", "history", "sums", "model", "optimizer", "scaler")},
    "model of another network": (CHECKPOINT, with_value("model", {"x": torch.zeros(2)})),
    "model that is none": (CHECKPOINT, with_value("model", None)),
    "optimizer of another": (CHECKPOINT, with_value("optimizer", {"state": {}, "param_groups": []})),
    "sums of no process": (CHECKPOINT, with_value("sums", torch.zeros(0, 3))),
    "a list": (CHECKPOINT, lambda path: checkpoint.save(path, [1])),
    "another archive": (CHECKPOINT, lambda path: torch.save({"identity": 1}, path)),
    "a pickle": (CHECKPOINT, lambda path: path.write_bytes(pickle.dumps({"identity": 1}))),
    "empty": (CHECKPOINT, lambda path: path.write_bytes(b"")),
    "no JSON": (RESULTS, lambda path: path.write_text("{")),
    "no object": (RESULTS, lambda path: path.write_text("[1, 2]\n")),
    "no text": (RESULTS, lambda path: path.write_bytes(b"\xff\xfe")),
    "nested": (RESULTS, lambda path: path.write_text("[" * 100_000)),
    "unsealed": (RESULTS, lambda path: path.write_text(path.read_text().replace("crc32", "crc"))),
    "edited": (RESULTS, lambda path: path.write_text(path.read_text().replace('_count": 500', '_count": 50'))),
    "another log": (LOG, lambda path: path.write_text(path.read_text().replace("rrelu", "relu"))),
    "no log": (LOG, lambda path: path.write_text("once upon a time\n")),
    "settings": ("study.json", lambda path: path.write_text("{}")),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_ends_the_study_with_its_name_and_the_remedy(interrupted, damage, capsys):
    name, change = DAMAGES[damage]
    path = interrupted / name
    contents = path.read_bytes()
    try:
        change(path)
        damaged = path.read_bytes()
        assert cli.main(study(interrupted, "--epochs", 2, "--jobs", 1, "--checkpoint-every", 2)) == 1
        said = capsys.readouterr()
        assert name in said.out.replace("\n", "") and "delete" in said.out and "Traceback" not in said.out + said.err
        assert path.read_bytes() == damaged, "it is left to the user"
    finally:
        path.write_bytes(contents)


# ---- the folder ----


def test_a_study_with_other_settings_is_refused_by_name(tmp_path):
    with folder.claimed(tmp_path, SMALL, "abc", 1):
        pass
    with folder.claimed(tmp_path, SMALL, "abc", 1):
        pass
    for changed, data_sha256, processes, said in (
        (dataclasses.replace(SMALL, lr=0.5), "abc", 1, r"\(lr: 0\.02 there, 0\.5 here\)"),
        (SMALL, "abd", 1, "data_sha256: abc there, abd here"),
        (SMALL, "abc", 2, "processes: 1 there, 2 here"),
    ):
        with (
            pytest.raises(ValueError, match=f"{tmp_path.name} holds a study with other settings.*{said}.*--out"),
            folder.claimed(tmp_path, changed, data_sha256, processes),
        ):
            pass


def test_runs_of_two_settings_are_never_merged(interrupted, capsys):
    """Not even where none of the first one's runs is among the second one's."""
    before = sorted(p.name for p in interrupted.rglob("*"))
    arguments = study(interrupted, "--epochs", 2, "--jobs", 1, "--lr", 0.5, "--first-seed", 7)
    assert cli.main(arguments) == 1
    assert "lr: 0.02 there, 0.5 here" in " ".join(capsys.readouterr().out.split())
    assert sorted(p.name for p in interrupted.rglob("*")) == before


def test_two_studies_at_once_in_one_folder(tmp_path):
    with (
        folder.claimed(tmp_path, SMALL, "abc", 1),
        pytest.raises(ValueError, match="another study is at work in"),
        folder.claimed(tmp_path, SMALL, "abc", 1),
    ):
        pass
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".1234.part").write_text("half")
    with folder.claimed(tmp_path, SMALL, "abc", 1):
        assert [p.name for p in (tmp_path / "runs").iterdir()] == []


# ---- disks ----


def full_at(name):
    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(name)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc to know a file by its descriptor")
def test_a_full_disk_names_the_file_and_the_former_checkpoint_stays(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    monkeypatch.setattr(os, "fsync", full_at(tmp_path))
    with pytest.raises(OSError, match=r"No space left on device.*checkpoint\.pt"):
        checkpoint.save(path, {**STATE, "step": 8})
    assert same(checkpoint.load(path, "me"), STATE) and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_small_disk_ends_the_study_with_the_files_name(tmp_path, capsys):
    """On a real file system that fills up, at whatever file it does; with room again, the study goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root, and not in every container, can mount a file system")
    try:
        arguments = study(disk / "out", "--epochs", 3, "--checkpoint-every", 1)
        assert cli.main([*arguments, "--jobs", "2"]) == 1
        said = capsys.readouterr()
        assert "No space left on device" in said.out and str(disk) in said.out.replace("\n", "")
        assert "Traceback" not in said.out + said.err
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert cli.main([*arguments, "--jobs", "1"]) == 0 and (disk / "out" / "report.html").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- Ctrl-C and kills ----


def session(number):
    """Living processes of the session ``number``."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[3]) == number and fields[0] != "Z":
                found.append(int(status.parent.name))
    return found


@pytest.fixture
def start():
    """Starts studies in sessions of their own, of which nothing is left after the test, whatever it finds."""
    started = []

    def study_in_session(out, *more):
        command = [sys.executable, "-m", "fused_rect.cli", *study(out, *more)]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                # In the background of a script the tests ignore interrupts, and so would what they start.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        )
        return started[-1]

    yield study_in_session
    for process in started:
        for number in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.communicate()


def gone(process, seconds=20):
    deadline = time.monotonic() + seconds
    while (left := session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def results(out):
    return {p.parent.name: checkpoint.unsealed(p.read_bytes()) for p in out.glob("runs/*/result.json")}


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc to see other processes")


@needs_proc
@pytest.mark.parametrize("to, jobs", [("parent", 1), ("parent", 2), ("group", 2)])
def test_an_interrupt_ends_the_study_and_all_its_processes(tmp_path, start, to, jobs):
    """Two seconds on an idle machine; here, where tests share the cores, less than a hundredth of what a run takes."""
    process = start(tmp_path, "--epochs", 4000, "--jobs", jobs, "--checkpoint-every", 20)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/checkpoint.pt"))) < jobs:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(0.3)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT) if to == "group" else process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 20 and process.returncode == 130
    assert "stopped; the same command goes on from here" in said and "Traceback" not in said
    assert gone(process, 5)
    for path in tmp_path.glob("runs/*/checkpoint.pt"):
        identity = torch.load(path, weights_only=True)["identity"]
        assert checkpoint.load(path, identity)["step"] >= 20
    assert len(list(tmp_path.glob("runs/*"))) == jobs, "no run is started after it"


@needs_proc
def test_runs_end_when_the_study_is_killed(tmp_path, start):
    """Whose runs would take an hour: they would write into a folder that a new study writes to."""
    process = start(tmp_path, "--epochs", 4000, "--jobs", 2, "--checkpoint-every", 20)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/checkpoint.pt"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert gone(process)


@needs_proc
def test_a_runs_process_that_is_killed_ends_the_study_with_a_word(tmp_path, start):
    process = start(tmp_path, "--epochs", 4000, "--jobs", 2)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/*/log.jsonl"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # The resource tracker is a child too, and holds no run.
    workers = [pid for pid in session(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "a run's process was killed" in said and "Traceback" not in said
    assert gone(process)


@needs_proc
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments(tmp_path, start, times):
    """From its start to its report: no process is left, no file is half-written under its name, and the last study
    ends with the numbers of one that was never killed."""
    more = ("--epochs", 6, "--checkpoint-every", 1)
    assert cli.main(study(tmp_path / "whole", *more, "--jobs", 1)) == 0
    rng, out = random.Random(times), tmp_path / "killed"
    for _ in range(times):
        process = start(out, *more, "--jobs", 2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, 12))  # a whole one takes about as long
        process.kill()
        process.wait()
        assert gone(process), "an orphan"
        results(out)
        for path in out.glob("runs/*/checkpoint.pt"):
            assert checkpoint.load(path, torch.load(path, weights_only=True)["identity"])
        for name in ("results.json", "study.json"):
            if (out / name).exists():
                json.loads((out / name).read_text())
        if (out / "report.html").exists():
            assert (out / "report.html").read_text().rstrip().endswith("</html>")
    process = start(out, *more, "--jobs", 2)
    assert process.wait(240) == 0
    assert results(out) == results(tmp_path / "whole") and len(results(out)) == 4
    assert not list(out.rglob(".*.part"))


# ---- data that is not what its name says ----


@contextlib.contextmanager
def at_most(megabytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()


def gzip_bomb(path, megabytes):
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(pack.compress(bytes(1 << 20)))
        file.write(pack.flush())


def sparse(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(40 << 30)
    assert path.stat().st_blocks < 100


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-images-idx3-ubyte"])
def test_an_idx_file_is_read_no_further_than_it_can_be_long(tmp_path, name):
    gzip_bomb(tmp_path / name, 300) if name.endswith(".gz") else sparse(tmp_path / name)
    with at_most(120), pytest.raises(DataError, match=r"train-images.* longer than the 47,040,016 bytes"):
        data.fashion_mnist(tmp_path)


@pytest.mark.parametrize("spec", [formats.CIFAR10, formats.CIFAR100], ids=lambda spec: spec.name)
@pytest.mark.parametrize("form", ["binary folder", "python folder", "binary archive", "python archive"])
def test_a_cifar_file_is_read_no_further_than_it_can_be_long(tmp_path, spec, form):
    binary = "binary" in form
    if "archive" in form:
        sparse(tmp_path / (spec.binary_tar if binary else spec.python_tar)[0])
    else:
        sparse(
            tmp_path
            / (f"{spec.binary_folder}/{spec.train[0]}.bin" if binary else f"{spec.python_folder}/{spec.train[0]}")
        )
    with at_most(700), pytest.raises(DataError, match=r"longer than the [\d,]+ bytes"):
        formats.cifar(tmp_path, spec)


def picture(path, name, size=(8, 8)):
    from PIL import Image

    Image.fromarray(np.zeros(size, np.uint8)).convert("RGB").save(path, name)


@pytest.mark.parametrize("name", ["BMP", "GIF", "TIFF", "ICO", "PPM", "TGA", "EPS", "PDF", "WEBP"])
def test_an_image_of_another_format_is_refused_whatever_its_name(tmp_path, monkeypatch, name):
    path = tmp_path / "x.jpg"
    try:
        picture(path, name)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow writes no {name}: {error}")

    def refuse(*args, **kwargs):
        raise AssertionError("Ghostscript, or another program, was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(DataError, match=r"x\.jpg is not a readable JPEG or PNG image"):
        formats._grey(path, 4)


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_an_image_of_either_format_is_read_whatever_its_name(tmp_path, name):
    picture(tmp_path / "x.jpg", name)
    assert formats._grey(tmp_path / "x.jpg", 4).shape == (4, 4)


def test_a_huge_or_damaged_image_is_refused(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    path = tmp_path / "x.png"
    for side, said in ((60_000, "x.png is not a readable"), (8_000, "8000 x 8000 pixels are more than 16,777,216")):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
        with at_most(20), pytest.raises(DataError, match=said):
            formats._grey(path, 4)
    picture(path, "PNG", (64, 64))
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        path.write_bytes(flipped(whole, rng.randrange(8 * len(whole)))[: rng.randrange(len(whole) + 1)])
        with contextlib.suppress(DataError):
            formats._grey(path, 4)


def test_what_is_no_file_is_no_image(tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"holds no <class>/\*\.jpg"):
        formats.class_folders(tmp_path, 4)


class Touches:
    """Its pickle touches a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", formats.CIFAR10.python_md5)
def test_no_pickle_but_the_publishers_is_loaded(tmp_path, name):
    written = tmp_path / name
    with written.open("wb") as file:
        pickle.dump(Touches(tmp_path / "touched"), file, 2)
    with pytest.raises(DataError, match=f"{name} of cifar-10 is damaged: its md5 is"):
        formats._python_records(lambda name, _: written.read_bytes(), name, formats.CIFAR10, train=True)
    spec = dataclasses.replace(formats.CIFAR10, python_md5={name: hashlib.md5(written.read_bytes()).hexdigest()})
    with pytest.raises(DataError, match=rf"{name} of cifar-10 is not one .* asks for (posix|nt)\.system"):
        formats._python_records(lambda name, _: written.read_bytes(), name, spec, train=True)
    assert not (tmp_path / "touched").exists()

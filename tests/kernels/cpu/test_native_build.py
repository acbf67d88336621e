"""Building the C++ kernels at first use: private, atomic, shared by processes, and clear about what went wrong."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import fused_rect as fr
from fused_rect import environment
from fused_rect.kernels import cpu, direct
from fused_rect.kernels.cpu import build, launch

needs_compiler = pytest.mark.skipif(not cpu.available(), reason=cpu.reason())


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered from before."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSED_RECT_CACHE", str(folder))
    clear()
    yield folder
    monkeypatch.undo()
    clear()


SMALL = 'extern "C" int answer() { return 42; }\nextern "C" void fused_rect() {}\n'


def clear():
    build._outcomes.cache_clear()
    launch._kernel.cache_clear()
    fr.backends._forget()
    fr.backends._warn_once.cache_clear()


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A source that compiles at once, where the kernels themselves do not matter."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setattr(build, "SOURCES", {build.KERNELS: source})
    return source


def python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def test_import_compiles_nothing(tmp_path):
    code = "import fused_rect, sys; sys.exit('fused_rect.kernels.cpu' in sys.modules)"
    process = python(code, FUSED_RECT_CACHE=str(tmp_path / "cache"))
    assert process.wait() == 0 and not (tmp_path / "cache").exists()


@needs_compiler
def test_built_once_privately_then_loaded(fresh, small_source):
    assert build.library().answer() == 42
    (library,) = fresh.glob("*.so")
    assert fresh.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o022 == 0
    built = library.stat().st_mtime_ns
    clear()
    assert build.library().answer() == 42 and library.stat().st_mtime_ns == built
    assert sorted(p.name for p in fresh.iterdir()) == [library.name, "rectify.lock"]


@needs_compiler
@pytest.mark.parametrize("changed", ["source", "flags", "compiler", "its options"])
def test_what_makes_the_library_names_it(fresh, small_source, monkeypatch, changed):
    first = build._key(build.KERNELS)
    if changed == "source":
        small_source.write_text(SMALL.replace("42", "43"))
    elif changed == "flags":
        monkeypatch.setattr(build, "flags", lambda part: (*build.FLAGS, "-O1"))
    elif changed == "its options":
        monkeypatch.setenv("CXX", f"{build.compiler()[0]} -fsanitize=address")
    else:
        monkeypatch.setattr(build, "version", lambda command: "another compiler 1.0")
    assert build._key(build.KERNELS) != first


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_RECT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.folder() == tmp_path / "fused_rect"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.folder() == tmp_path / ".cache" / "fused_rect"
    monkeypatch.setenv("FUSED_RECT_CACHE", "~/mine")
    assert build.folder() == tmp_path / "mine"


@needs_compiler
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("how", ["foreign", "writable"])
def test_what_others_can_write_is_refused(fresh, small_source, what, how):
    build.library()
    (library,) = fresh.glob("*.so")
    path = fresh if what == "folder" else library
    if how == "writable":
        path.chmod(path.stat().st_mode | 0o020)
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    clear()
    message = "belongs to user 12345" if how == "foreign" else "can be written by other users"
    with pytest.raises(build.BuildError, match=message):
        build.library()
    assert not cpu.available() and str(path) in cpu.reason() and "FUSED_RECT_CACHE" in cpu.reason()


def test_a_link_of_somebody_else_is_refused(fresh, small_source):
    if os.geteuid() != 0:
        pytest.skip("only root can give a link away")
    (fresh.parent / "real").mkdir(mode=0o700)
    fresh.symlink_to(fresh.parent / "real")
    build._refuse_foreign(fresh)
    os.lchown(fresh, 12345, -1)
    with pytest.raises(build.BuildError, match="belongs to user 12345"):
        build._refuse_foreign(fresh)


@needs_compiler
def test_a_failing_compiler_is_quoted_and_asked_once(fresh, small_source, monkeypatch):
    small_source.write_text("this is no C++\n")
    with pytest.raises(build.BuildError, match=r"(?s)failed \(status 1\).*small\.cpp:1:1: error"):
        build.library()
    monkeypatch.setattr(build, "_compile", None)
    assert not cpu.available() and "error" in cpu.reason()
    assert not list(fresh.glob("*.so")) and not list(fresh.glob("build-*"))


# ---- whatever goes wrong: one warning with cause and remedy, the eager path, and `fused-rect env` says it ----


def broken_folder(number):
    """Every way to make something in the cache folder fails with errno ``number``; as root, no mode bits would."""

    def arrange(folder, monkeypatch):
        folder.mkdir(mode=0o700, exist_ok=True)

        def failing(original):
            def call(path, *args, **kwargs):
                if str(path).startswith(f"{folder}{os.sep}"):
                    raise OSError(number, os.strerror(number), str(path))
                return original(path, *args, **kwargs)

            return call

        monkeypatch.setattr(os, "open", failing(os.open))
        monkeypatch.setattr(os, "mkdir", failing(os.mkdir))

    return arrange


def no_home(folder, monkeypatch):
    import pwd

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "FUSED_RECT_CACHE"):
        monkeypatch.delenv(name, raising=False)


def no_working_folder(folder, monkeypatch):
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    monkeypatch.setenv("FUSED_RECT_CACHE", "relative")


def a_file_in_the_way(folder, monkeypatch):
    folder.write_text("")


def environ(name, value):
    return lambda folder, monkeypatch: monkeypatch.setenv(name, value)


def scripted(body):
    """CXX is a shell script that answers --version and then does ``body`` with the output's name in $out."""

    def arrange(folder, monkeypatch):
        script = folder.parent / "compiler"
        find = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done'
        script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo 1.0; exit;; esac\n{find}\n{body}\n')
        script.chmod(0o700)
        monkeypatch.setenv("CXX", str(script))
        monkeypatch.setattr(build, "BUILD_LIMIT", 0.3)

    return arrange


def no_source(folder, monkeypatch):
    monkeypatch.setattr(build, "SOURCES", dict.fromkeys(build.SOURCES, folder.parent / "gone.cpp"))


def nothing_starts(folder, monkeypatch):
    def run(*args, **kwargs):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", run)


CACHE, COMPILER = "set FUSED_RECT_CACHE to a folder of yours", "install a C++17 compiler"
FAILURES = {
    "read-only": (broken_folder(errno.EROFS), "Read-only file system", CACHE),
    "full": (broken_folder(errno.ENOSPC), "No space left on device", CACHE),
    "over quota": (broken_folder(errno.EDQUOT), "quota exceeded", CACHE),
    "forbidden": (broken_folder(errno.EACCES), "Permission denied", CACHE),
    "bad disk": (broken_folder(errno.EIO), "Input/output error", CACHE),
    "no home": (no_home, "home directory", CACHE),
    "no such user": (environ("FUSED_RECT_CACHE", "~nosuchuser/x"), "home directory", CACHE),
    "no working folder": (no_working_folder, "No such file or directory", CACHE),
    "a file in the way": (a_file_in_the_way, "cannot be made", CACHE),
    "too long a name": (environ("FUSED_RECT_CACHE", "/tmp/" + 300 * "x"), "File name too long", CACHE),
    "open quote": (environ("CXX", 'g++ "'), "No closing quotation", COMPILER),
    "blank": (environ("CXX", " "), "CXX=  is not a program", COMPILER),
    "missing": (environ("CXX", "nonexistent-compiler -m64"), "nonexistent-compiler -m64 is not a program", COMPILER),
    "fails": (environ("CXX", "/bin/false"), "/bin/false does not run (status 1", COMPILER),
    "no program": (scripted("exit 1\n#"), "failed (status 1)", COMPILER),
    "writes no file": (environ("CXX", "/bin/true"), "wrote no file", COMPILER),
    "writes an empty file": (scripted(': > "$out"'), "cannot be loaded", "delete it"),
    "writes text": (scripted('echo "not a library" > "$out"'), "cannot be loaded", "delete it"),
    "speaks Latin-1": (scripted("printf 'kaputt: \\344\\n' >&2; exit 3"), "kaputt: �", COMPILER),
    "dies": (scripted("kill -9 $$"), "failed (status -9)", COMPILER),
    "hangs": (scripted("exec sleep 60"), "timed out after 0.3 seconds", COMPILER),
    "nothing starts": (nothing_starts, "Resource temporarily unavailable", COMPILER),
    "no sources": (no_source, "gone.cpp", CACHE),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_any_failure_is_one_warning_and_the_eager_path(fresh, monkeypatch, failure):
    arrange, cause, remedy = FAILURES[failure]
    arrange(fresh, monkeypatch)
    eager_serves_with_one_warning(cause, remedy)
    with fr.backend("native"), pytest.raises(RuntimeError, match="'native' is forced but not available") as refused:
        fr.functional.bias_relu(torch.zeros(1, 2))
    assert cause in str(refused.value)


def eager_serves_with_one_warning(cause, remedy):
    layer, x = fr.nn.ConvPReLU2d(2, 3, 3), torch.randn(1, 2, 5, 5, requires_grad=True)
    with fr.backend("auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(x).sum().backward()
        assert fr.backends.name("cpu") == "eager"
        said = environment.report()
    (warning,) = [w for w in caught if "fused_rect" in str(w.message)]
    assert cause in str(warning.message) and remedy in str(warning.message)
    assert cause in said["paths"]["cpu"] and said["paths"]["cpu"].startswith("eager")
    plain = torch.nn.Sequential(layer[0], layer[1])
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize(
    "options, cause", [("ro", "Read-only file system"), ("nr_inodes=1", "No space left on device")]
)
def test_a_mounted_folder_that_takes_nothing(fresh, options, cause):
    fresh.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=1m,mode=700,{options}", "tmpfs", str(fresh)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root, and not in every container, can mount a file system")
    try:
        eager_serves_with_one_warning(cause, CACHE)
    finally:
        subprocess.run(["umount", str(fresh)], check=True)


@needs_compiler
def test_a_read_only_folder_that_holds_the_library_serves(fresh, small_source, monkeypatch):
    build.library()
    clear()
    broken_folder(errno.EROFS)(fresh, monkeypatch)
    assert build.library().answer() == 42


def test_the_default_folder_is_named_where_there_is_none(monkeypatch):
    no_home(None, monkeypatch)
    with pytest.raises(build.BuildError, match=r"no cache folder \(.*home directory.*\); set FUSED_RECT_CACHE"):
        build.folder()
    assert "set FUSED_RECT_CACHE" in environment.report()["cache"]


@needs_compiler
def test_a_compiler_that_builds_no_kernels_is_named(fresh, small_source):
    small_source.write_text("int x;\n")
    with pytest.raises(build.BuildError, match="holds no function fused_rect, so CXX is no C"):
        build.library()


@needs_compiler
def test_a_compiler_may_say_its_version_in_any_encoding(fresh, small_source, monkeypatch):
    script = fresh.parent / "compiler"
    compiler = build.compiler()[0]
    script.write_text(f"#!/bin/sh\n[ $1 = --version ] && printf 'g++ \\344\\n' && exit\nexec {compiler} \"$@\"\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    assert build.version([str(script)]) == "g++ �" and build.library().answer() == 42


@needs_compiler
def test_the_kernels_serve_without_what_torchs_headers_need(fresh, small_source, monkeypatch):
    """torch.utils.cpp_extension imports setuptools, which a container may not have."""
    monkeypatch.setattr(build, "SOURCES", {build.KERNELS: small_source, build.DIRECT: small_source})
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    assert build.library().answer() == 42
    why = direct.why("cpu")
    assert why.startswith("Python, slower for small tensors: ") and "ModuleNotFoundError" in why


@needs_compiler
def test_a_process_that_may_start_no_thread_builds_without(fresh, small_source, monkeypatch):
    def none(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(build.ThreadPoolExecutor, "submit", none)
    assert build.library().answer() == 42


@needs_compiler
def test_a_folder_whose_name_is_no_text_serves(fresh, small_source, monkeypatch):
    monkeypatch.setenv("FUSED_RECT_CACHE", os.fsdecode(os.fsencode(fresh.parent) + b"/caf\xe9"))
    clear()
    assert build.library().answer() == 42


# ---- locks, and what killed processes leave ----


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@needs_compiler
@pytest.mark.parametrize(
    "make",
    [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), socket_at],
    ids=["folder", "pipe", "link", "socket"],
)
def test_something_else_in_the_locks_place(fresh, small_source, make):
    fresh.mkdir(mode=0o700)
    make(fresh / "rectify.lock")
    assert build.library().answer() == 42


@needs_compiler
def test_a_lock_that_is_never_given_back(fresh, small_source, monkeypatch):
    """Its holder is stopped, or on a machine that is gone."""
    fresh.mkdir(mode=0o700)
    with (fresh / "rectify.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with monkeypatch.context() as patch:
            patch.setattr(build, "BUILD_LIMIT", 0.2)
            with build._one_at_a_time(fresh / "rectify.lock") as alone:
                assert not alone
    with build._one_at_a_time(fresh / "rectify.lock") as alone:
        assert alone


def test_what_killed_builds_left_is_cleared_and_what_runs_is_not(tmp_path):
    old = time.time() - 2 * build.BUILD_LIMIT
    for name in ("build-rectify-a", "build-direct-b", "build-old", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.s").write_text("")
    for name in ("build-old", "kept"):
        os.utime(tmp_path / name, (old, old))
    build._clear(tmp_path, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["build-direct-b", "build-rectify-a", "kept"]
    build._clear(tmp_path, "build-rectify-")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["build-direct-b", "kept"]


def flipped(contents):
    middle = len(contents) // 2
    return contents[:middle] + bytes([contents[middle] ^ 1]) + contents[middle + 1 :]


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[:1], lambda c: c[:4096], lambda c: c[:-1], lambda c: c + b"\0", flipped,
     lambda c: bytes(len(c)), lambda c: b"not a library"],
    ids=["empty", "a byte", "a page", "all but a byte", "a byte more", "a bit", "zeros", "text"],
)  # fmt: skip
def test_a_damaged_library_is_built_again(fresh, small_source, damage):
    """A power loss leaves files that are short, or zeros; mapped, they kill the process with SIGBUS."""
    build.library()
    (library,) = fresh.glob("*.so")
    contents = library.read_bytes()
    library.unlink()  # a new file: this process has mapped the old one
    library.write_bytes(damage(contents))
    library.chmod(0o700)
    clear()
    assert build.library().answer() == 42
    (again,) = fresh.glob("*.so")
    assert again.stem.endswith(build._hash(again.read_bytes()))


@needs_compiler
def test_a_library_is_on_the_disk_before_it_has_its_name(fresh, small_source, monkeypatch):
    steps = []
    monkeypatch.setattr(build, "_on_disk", lambda path: steps.append(path.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("named"), replace(a, b)))
    build.library()
    assert steps == ["rectify.so", "named", fresh.name]


@needs_compiler
def test_several_processes_compile_once(tmp_path):
    """Each says when it compiles; all load the same file."""
    code = (
        "from fused_rect.kernels.cpu import build; from pathlib import Path\n"
        f"build.SOURCES = {{build.KERNELS: Path({str(tmp_path / 'small.cpp')!r})}}; compile = build._compile\n"
        "build._compile = lambda *args: (print('compiles'), compile(*args))[1]\n"
        "print(build.library().answer())"
    )
    (tmp_path / "small.cpp").write_text(SMALL)
    processes = [python(code, FUSED_RECT_CACHE=str(tmp_path / "cache")) for _ in range(3)]
    outputs = [p.communicate()[0].split() for p in processes]
    assert sorted(outputs, key=len) == [["42"], ["42"], ["compiles", "42"]]


@needs_compiler
def test_a_build_killed_half_way_is_done_again(fresh, tmp_path, small_source, monkeypatch):
    slow = tmp_path / "slow"
    compiler = build.compiler()[0]
    slow.write_text(f'#!/bin/sh\ncase "$*" in *--version*) exec {compiler} "$@";; esac\n{compiler} "$@"; sleep 60\n')
    slow.chmod(0o700)
    monkeypatch.setenv("CXX", str(slow))
    code = "from fused_rect.kernels.cpu import build; from pathlib import Path\n"
    code += f"build.SOURCES = {{build.KERNELS: Path({str(small_source)!r})}}; build.library()"
    process = python(code)
    deadline = time.monotonic() + 30
    while not list(fresh.glob("build-*/*.so")):  # the compiler has written all, but not returned
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(fresh.glob("*.so"))
    slow.write_text(f'#!/bin/sh\nexec {compiler} "$@"\n')
    assert build.library().answer() == 42 and not list(fresh.glob("build-*"))


@needs_compiler
def test_works_with_spaces_and_wrapped_compilers(tmp_path, monkeypatch, small_source):
    monkeypatch.setenv("FUSED_RECT_CACHE", str(tmp_path / "a b'c"))
    monkeypatch.setenv("CXX", f"{shutil.which('env')} {build.compiler()[0]}")
    clear()
    assert build.library().answer() == 42
    clear()

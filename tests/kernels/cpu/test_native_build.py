"""Building the C++ kernels at first use: private, atomic, shared by processes, and clear about what went wrong."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

import fused_rect as fr
from fused_rect.kernels import cpu
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


def clear():
    build._outcomes.cache_clear()
    launch._kernel.cache_clear()
    fr.backends._forget()
    fr.backends._warn_once.cache_clear()


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """A source that compiles at once, where the kernels themselves do not matter."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
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
@pytest.mark.parametrize("changed", ["source", "flags", "compiler"])
def test_what_makes_the_library_names_it(fresh, small_source, monkeypatch, changed):
    first = build._target()
    if changed == "source":
        small_source.write_text('extern "C" int answer() { return 43; }\n')
    elif changed == "flags":
        monkeypatch.setattr(build, "flags", lambda part: (*build.FLAGS, "-O1"))
    else:
        monkeypatch.setattr(build, "version", lambda command: "another compiler 1.0")
    assert build._target() != first


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


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSED_RECT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match=r"cannot be made .* set FUSED_RECT_CACHE"):
        build._target()


@needs_compiler
def test_a_failing_compiler_is_quoted_and_asked_once(fresh, small_source, monkeypatch):
    small_source.write_text("this is no C++\n")
    with pytest.raises(build.BuildError, match=r"(?s)failed \(status 1\).*small\.cpp:1:1: error"):
        build.library()
    monkeypatch.setattr(build, "_compile", None)
    assert not cpu.available() and "error" in cpu.reason()
    assert not list(fresh.glob("*.so")) and not list(fresh.glob("build-*"))


@needs_compiler
def test_a_broken_library_is_named(fresh, small_source):
    library = build._target()
    library.write_bytes(b"\x7fELF")
    library.chmod(0o700)
    with pytest.raises(build.BuildError, match=r"cannot be loaded .* delete it"):
        build.library()


@pytest.mark.parametrize("value", ["/nonexistent", "/bin/false", "nonexistent-compiler -m64"])
def test_without_a_compiler_eager_serves_with_one_warning(fresh, monkeypatch, value):
    monkeypatch.setenv("CXX", value)
    layer, x = fr.nn.ConvPReLU2d(2, 3, 3), torch.randn(1, 2, 5, 5, requires_grad=True)
    with fr.backend("auto"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(x).sum().backward()
        assert fr.backends.name("cpu") == "eager"
    (warning,) = [w for w in caught if "fused_rect" in str(w.message)]
    assert "CXX" in str(warning.message) and "install a C++17 compiler" in str(warning.message)
    with fr.backend("native"), pytest.raises(RuntimeError, match=r"'native' is forced but not available.*CXX"):
        fr.functional.bias_relu(x)


@needs_compiler
def test_several_processes_compile_once(tmp_path):
    """Each says when it compiles; all load the same file."""
    code = (
        "from fused_rect.kernels.cpu import build; from pathlib import Path\n"
        f"build.SOURCES = {{build.KERNELS: Path({str(tmp_path / 'small.cpp')!r})}}; compile = build._compile\n"
        "build._compile = lambda *args: (print('compiles'), compile(*args))\n"
        "print(build.library().answer())"
    )
    (tmp_path / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
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
    assert build.library().answer() == 42


@needs_compiler
def test_works_with_spaces_and_wrapped_compilers(tmp_path, monkeypatch, small_source):
    monkeypatch.setenv("FUSED_RECT_CACHE", str(tmp_path / "a b'c"))
    monkeypatch.setenv("CXX", f"{shutil.which('env')} {build.compiler()[0]}")
    clear()
    assert build.library().answer() == 42
    clear()

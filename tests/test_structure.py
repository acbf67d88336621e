"""The rules that hold the rooms together: imports go one way, and importing costs next to nothing."""

import ast
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fused_rect"

# Higher imports lower or its own level, never higher. A folder stands for its modules.
LEVELS = [
    {"version", "untried", "internals", "rules", "tracing", "files", "perf.profiling.memory"},
    {"reference"},
    {"kernels"},
    {"random", "backends"},
    {"ops"},
    {"decompose", "sharding"},
    {"functional"},
    {"nn"},
    {"fusion"},
    {"compile"},
    {"perf", "study", "demo", "environment", "cli"},
]
PLAN_IMPORTS = {"__future__", "collections", "dataclasses", "functools", "math"}


def sources():
    rooms = PACKAGE, PACKAGE / "kernels", PACKAGE / "perf"  # rglob follows no symlinks below
    return sorted({path for room in rooms for path in room.rglob("*.py")})


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Absolute names of everything that a file imports, wherever in the file."""
    package = ["fused_rect", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            head = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{head}.{alias.name}" for alias in node.names)


def level(name):
    """The level of a module inside fused_rect; its own entry counts before its folder's. None: the package itself."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        for number, modules in enumerate(LEVELS):
            if ".".join(parts[:depth]) in modules:
                return number
    return None


def test_every_module_has_its_level():
    assert len(sources()) > 25
    assert [module_name(p) for p in sources() if module_name(p) and level(module_name(p)) is None] == []


def test_nothing_lower_imports_anything_higher():
    wrong = []
    for path in sources():
        name = module_name(path)
        if not name:
            continue
        for target in imported(path):
            if target.startswith("fused_rect."):
                number = level(target.removeprefix("fused_rect."))
                if number is not None and number > level(name):
                    wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_the_import_rule_sees_a_wrong_import(tmp_path, monkeypatch):
    (tmp_path / "ops.py").write_text("def f():\n    from .nn import ConvReLU2d\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    with pytest.raises(AssertionError, match=r"ops imports fused_rect\.nn\.ConvReLU2d"):
        test_nothing_lower_imports_anything_higher()


def test_the_plan_knows_neither_torch_nor_triton():
    assert {name.split(".")[0] for name in imported(PACKAGE / "kernels" / "plan.py")} <= PLAN_IMPORTS


def test_kernels_know_nothing_of_autograd():
    for path in (PACKAGE / "kernels").rglob("*.py"):
        assert not [name for name in imported(path) if "autograd" in name], path


def test_imports_never_name_a_bare_kernels_or_perf():
    files = [*sources(), *(ROOT / "tests").rglob("*.py")]
    assert [f for f in files for name in _absolute(f) if name.split(".")[0] in ("kernels", "perf")] == []


def _absolute(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_no_file_shadows_the_standard_library():
    assert not (ROOT / "perf" / "profile.py").exists() and not (ROOT / "perf" / "inspect.py").exists()


def run(code):
    environment = {key: value for key, value in os.environ.items() if key != "FUSED_RECT_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_takes_at_most_0_3_s_beyond_torch():
    code = "import torch, time; t = time.process_time(); import fused_rect; print(time.process_time() - t)"
    assert statistics.median(float(run(code)) for _ in range(3)) <= 0.3


def test_importing_brings_no_triton_no_compiler_and_no_process():
    code = """
import torch, subprocess, sys
before = set(sys.modules)
def refuse(*a, **k): raise AssertionError(f"importing started {a}")
subprocess.Popen = refuse
import fused_rect
new = set(sys.modules) - before
print([m for m in new if m.split(".")[0] in ("triton", "rich", "pandas", "scipy", "sklearn", "socket")])
print("torch._inductor.compile_fx" in new, "fused_rect.kernels.launch" in new)
"""
    assert run(code).split("\n")[:2] == ["[]", "False False"]


def test_every_folder_is_in_the_wheel():
    declared = re.search(r"^packages = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    listed = set(re.findall(r'"fused_rect\.?([\w.]*)"', declared[1]))
    assert listed == {".".join(p.parent.relative_to(PACKAGE).parts) for p in sources() if p.name == "__init__.py"}

"""The sdist has what its tests read, and the wheel the package alone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[1]
# Of a checkout; an sdist is a checkout without links, history and CI.
PARTS = ("fused_rect", "kernels", "perf", "tests", "docs", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE",
         "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt")  # fmt: skip
CODE = "import setuptools.build_meta as b, sys; print(getattr(b, f'build_{sys.argv[1]}')('dist'))"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Names of the files in what is built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        if (ROOT / part).exists():
            subprocess.run(["cp", "-r", "--no-dereference", ROOT / part, folder / part], check=True)

    def build(kind):
        done = subprocess.run([sys.executable, "-c", CODE, kind], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / "dist" / done.stdout.split()[-1]

    return build


def files(*parts):
    """Of the checkout, but for what running it leaves."""
    found = (path for part in parts for path in (ROOT / part).rglob("*") if path.is_file())
    return {os.path.relpath(p, ROOT) for p in found if "__pycache__" not in p.parts and p.suffix in SUFFIXES}


SUFFIXES = (".py", ".cpp", ".h", ".md", ".json", ".html", ".typed")


def test_the_sdist_has_the_tests_and_all_that_they_read(built):
    with tarfile.open(built("sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    inside = {"fused_rect/kernels", "fused_rect/perf"}
    assert files("tests", "docs", "fused_rect", *inside) <= names
    assert {"MANIFEST.in", "Makefile", "constraints.txt", "CHANGELOG.md"} <= names


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built("wheel")).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fused_rect"}
    assert {"fused_rect/kernels/cpu/rectify.cpp", "fused_rect/perf/gpu/steps.py", "fused_rect/py.typed"} <= names
    assert not [name for name in names if "/results/" in name]

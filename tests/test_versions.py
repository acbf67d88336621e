"""`make test-versions` but for its hours: what it chooses, what it says, and that a failing suite is a failure."""

import sys
from pathlib import Path

import pytest
import versions


def test_by_default_the_oldest_and_the_newest():
    assert versions.chosen([]) == [versions.VERSIONS[0], versions.VERSIONS[-1]]
    assert versions.chosen(["all"]) == list(versions.VERSIONS)
    with pytest.raises(SystemExit, match=r"torch 1\.0: not of 2\.9\.1"):
        versions.chosen(["1.0"])


def test_the_oldest_are_those_that_are_promised():
    text = (versions.ROOT / "pyproject.toml").read_text()
    oldest = versions.VERSIONS[0]
    assert f'"torch>={oldest.torch.rpartition(".")[0]}"' in text and f'requires-python = ">={oldest.python}"' in text


def test_a_python_that_is_not_there_is_said_and_is_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(versions.shutil, "which", lambda name: None)
    assert versions.main(["--folder", str(tmp_path)]) == 0
    assert "torch 2.9.1, Python 3.10: not run: there is no python3.10 on PATH" in capsys.readouterr().out


@pytest.mark.parametrize("passes, status", [(True, 0), (False, 1)])
def test_the_suites_last_line_decides(tmp_path, monkeypatch, capsys, passes, status):
    test = tmp_path / "test_one.py"
    test.write_text(f"def test_one(): assert {passes}")
    monkeypatch.setattr(versions, "environment", lambda version, folder: Path(sys.executable))
    arguments = ["2.13.0", "--", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(test)]
    assert versions.main(arguments) == status
    assert f"1 {'passed' if passes else 'failed'}" in capsys.readouterr().out.splitlines()[-1]

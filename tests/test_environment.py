"""`fused-rect env`: what it says is what runs."""

import json

import pytest
import torch

import fused_rect as fr
from fused_rect import backends, cli, environment


def test_json_says_which_path_runs_and_why(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["paths"]["cpu"] == backends.why("cpu") and found["calls"]["cpu"] == backends.calls("cpu")
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["fused_rect"] == fr.__version__


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_a_forced_path_is_named(name):
    with fr.backend(name):
        assert environment.report()["paths"]["cpu"].startswith(f"{name}: forced")


def test_text_has_every_line_of_the_report(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_RECT_CACHE", str(tmp_path))
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in environment.report())
    assert f"FUSED_RECT_CACHE: {tmp_path}" in out and backends.why("cpu") in out


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    assert "CXX=/nonexistent/compiler is not a program" in environment.report()["compiler"]


@pytest.mark.parametrize(
    "home, said", [("/home/me", "~/.cache/x.so"), ("/", "/home/me/.cache/x.so"), ("", "/home/me/.cache/x.so")]
)
def test_the_home_folder_is_not_told(monkeypatch, home, said):
    monkeypatch.setenv("HOME", home)
    assert environment._without_home("/home/me/.cache/x.so") == said

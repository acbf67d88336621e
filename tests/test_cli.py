"""The command line's table, and that a subcommand's dependencies are its own."""

import sys
import types

import pytest

from fused_rect import cli
from fused_rect.version import __version__


def test_help_names_every_subcommand_and_imports_none(capsys):
    before = set(sys.modules)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert not {command.module for command in cli.COMMANDS.values()} & (set(sys.modules) - before)


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fused-rect {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"]])
def test_a_wrong_command_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: fused-rect" in capsys.readouterr().err


def test_a_subcommand_gets_its_options_and_gives_the_status(monkeypatch):
    module = types.ModuleType("made_up")
    module.configure = lambda parser: parser.add_argument("--status", type=int)
    module.run = lambda options: options.status
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setitem(cli.COMMANDS, "made-up", cli.Command("made_up", "for this test", ""))
    assert cli.main(["made-up", "--status", "3"]) == 3


def test_a_missing_dependency_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.delitem(sys.modules, "fused_rect.demo", raising=False)
    with pytest.raises(SystemExit, match=r"demo needs the package sklearn.*pip install 'fused-rect\[demo\]'"):
        cli.main(["demo"])

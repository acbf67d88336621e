"""The mutants still fit the code, and the runner can tell a killed one from a survivor."""

import dataclasses

import mutation
import pytest
from mutants import FOCUSED, MUTANTS, REST, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.name}")
def test_the_text_to_replace_occurs_once(mutant):
    mutation.check(mutant, mutation.ROOT)
    assert mutant.old != mutant.new


def test_there_are_enough_of_them_and_tests_for_each():
    assert len(MUTANTS) >= 40
    assert len({(m.file, m.name) for m in MUTANTS}) == len(MUTANTS)
    assert {m.file for m in MUTANTS} == set(FOCUSED)
    for test in {*REST, *(test for tests in FOCUSED.values() for test in tests)}:
        assert (mutation.ROOT / test.split("::")[0]).exists(), test


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A project of one line and one test."""
    (tmp_path / "twice.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_twice.py").write_text("from twice import double\n\n\ndef test_it():\n    assert double(2) == 4\n")
    monkeypatch.setattr(mutation, "ROOT", tmp_path)
    monkeypatch.setattr(mutation, "COPIED", ("twice.py", "test_twice.py"))
    monkeypatch.setattr(mutation, "FOCUSED", {"twice.py": ["test_twice.py"]})
    monkeypatch.setattr(mutation, "REST", [])
    monkeypatch.setattr(mutation, "OPTIONS", ())
    return tmp_path


KILLED = Mutant("twice.py", "added", "2 * x", "3 * x")
SURVIVES = Mutant("twice.py", "squared", "2 * x", "x * x")


def test_killed_and_surviving_mutants(tree, monkeypatch, capsys):
    explained = dataclasses.replace(SURVIVES, name="explained", equivalent="2 * 2 is 2 squared")
    monkeypatch.setattr(mutation, "MUTANTS", [KILLED, SURVIVES, explained])
    assert mutation.main([]) == 1
    out = capsys.readouterr().out
    assert "twice.py: added: killed by test_twice.py::test_it" in out
    assert "twice.py: squared: SURVIVED" in out
    assert "survived, as explained: 2 * 2 is 2 squared" in out
    assert "1 of 3 mutants killed, 1 survived unexplained" in out


def test_a_failing_test_without_any_mutant_is_said(tree, monkeypatch, capsys):
    (tree / "twice.py").write_text("def double(x):\n    return 5 * x + 0 * (2 * x)\n")
    monkeypatch.setattr(mutation, "MUTANTS", [KILLED])
    assert mutation.main([]) == 2
    assert "fails without any mutant" in capsys.readouterr().out


def test_a_mutant_that_no_longer_fits_is_refused(tree):
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutation.check(Mutant("twice.py", "stale", "4 * x", "5 * x"), tree)

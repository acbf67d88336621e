"""Statistics against hand-made numbers, sentences that follow the numbers, the report, and the command end to end."""

import importlib.util
import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fused_rect import cli
from fused_rect.study import paper, plots, report, statistics
from fused_rect.study.variants import VARIANTS


def runs(losses, errors=None):
    """{variant: one log-loss a seed} as results of runs."""
    made = []
    for variant, values in losses.items():
        for seed, value in enumerate(values):
            error = (errors or {}).get(variant, [0.3] * len(values))[seed]
            final = {f"{p}_{k}": value for p in ("train", "train_mode_train", "test") for k in ("loss",)}
            final |= {f"{p}_error": error for p in ("train", "train_mode_train", "test")}
            final |= {f"{p}_count": 100 for p in ("train", "train_mode_train", "test")}
            figures = {"train_loss": value, "train_error": error, "test_loss": value, "test_error": error}
            history = [{"epoch": e, "step": e, **figures} for e in (1, 2)]
            made.append({"variant": variant, "seed": seed, "final": final, "history": history})
    return made


def test_interval_is_students():
    low, high = statistics.interval([1.0, 2.0, 3.0])  # t(.975, 2) = 4.3027, s / sqrt(3) = .57735
    assert (low, high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert all(math.isnan(x) for x in statistics.interval([1.0]))


def test_differences_are_paired_and_corrected():
    shared = np.array([0.0, 1.0, 2.0, 3.0])  # seeds differ by far more than variants
    values = {
        "relu": shared,
        "prelu": shared - 0.1 + np.array([0.01, -0.01, 0.01, -0.01]),
        "rrelu": shared + np.array([0.2, -0.2, 0.1, -0.1]),
    }
    found = statistics.differences(statistics.table(runs(values)), "test_loss").set_index(["a", "b"])
    row = found.loc["relu", "prelu"]
    # d = -.09, -.11, -.09, -.11: mean -.1, s = .011547, t = -17.32 at 3 degrees of freedom
    assert row["difference"] == pytest.approx(-0.1) and row["p"] == pytest.approx(4.19e-4, rel=0.01)
    assert row["p_holm"] == pytest.approx(3 * row["p"]) and row["separated"]
    assert not found.loc["relu", "rrelu"]["separated"]
    assert list(found.index) == [("relu", "prelu"), ("relu", "rrelu"), ("prelu", "rrelu")]


@settings(max_examples=8)
@given(st.lists(st.floats(0.1, 3), min_size=4, max_size=8, unique=True), st.integers(0, 9))
def test_holms_correction_and_intervals_that_agree_with_p(values, seed):
    rng = np.random.default_rng(seed)
    frame = statistics.table(runs({v: np.array(values) + rng.normal(0, 0.1, len(values)) for v in VARIANTS}))
    found = statistics.differences(frame, "test_loss")
    p = np.sort(found["p"])
    by_hand = np.minimum(np.maximum.accumulate(p * np.arange(len(p), 0, -1)), 1)
    np.testing.assert_allclose(np.sort(found["p_holm"]), by_hand)
    outside = (found["low"] > 0) | (found["high"] < 0)
    assert (outside == (found["p"] < 0.05)).all(), "the interval and the uncorrected test say the same"


def test_equal_runs_and_constant_differences():
    found = statistics.differences(statistics.table(runs({"relu": [1.0, 2.0], "prelu": [1.0, 2.0]})), "test_loss")
    assert found["p_holm"].tolist() == [1.0] and not found["separated"].any()


def test_seeds_that_lack_a_variant_are_left_out():
    made = runs({"relu": [1.0, 2.0, 3.0], "rrelu": [1.0, 2.0]})
    assert statistics.table(made)["seed"].tolist() == [0, 1, 0, 1]


# ---- runs that diverged ----


def lose(made, *which):
    """``made`` with the runs (variant, seed) diverged, as training reports them."""
    for run in made:
        if (run["variant"], run["seed"]) in which:
            run["diverged"] = "the training loss is nan after 5 of 9 updates"
            run |= {"final": {}, "history": [{"epoch": 1, "step": 5}]}
    return made


def test_a_diverged_run_is_in_no_mean_and_in_no_pair():
    losses = {"relu": [1.0, 9.0, 2.0, 3.0], "prelu": [2.0, 7.0, 3.5, 4.0], "rrelu": [1.5, 2.5, 2.5, 5.0]}
    frame = statistics.table(lose(runs(losses), ("relu", 1)))
    summary = statistics.summary(frame).set_index(["variant", "figure"])
    assert summary.loc["relu", "test_loss"][["n", "mean"]].tolist() == [3, 2.0]
    assert summary.loc["prelu", "test_loss"][["n", "mean"]].tolist() == [4, 16.5 / 4]
    pairs = statistics.differences(frame, "test_loss").set_index(["a", "b"])
    assert pairs.loc["relu", "prelu"][["n", "difference"]].tolist() == [3, pytest.approx(3.5 / 3)]
    assert pairs.loc["prelu", "rrelu"]["n"] == 4
    said = " ".join(statistics.conclusions(frame, 100))
    assert "1 of 4 runs of ReLU diverged and is in no mean or pair (seed 1, the training loss is nan" in said
    assert "3 to 4 seeds" in said


ALL = [(v, s) for v in ("relu", "rrelu") for s in range(3)]


@pytest.mark.parametrize(
    "lost, seeds",
    [
        ([], ["3", "3"]),
        ([("relu", 0)], ["2 (1 diverged)", "3"]),
        ([("relu", 0), ("rrelu", 1)], ["2 (1 diverged)", "2 (1 diverged)"]),
        (ALL[:2], ["1 (2 diverged)", "3"]),
        (ALL[:3], ["0 (3 diverged)", "3"]),
        (ALL[:2] + ALL[4:], ["1 (2 diverged)", "1 (2 diverged)"]),
        (ALL, ["0 (3 diverged)", "0 (3 diverged)"]),
    ],
    ids=lambda x: str(len(x)),
)
def test_the_report_is_written_whatever_diverged(study, tmp_path, lost, seeds):
    value = json.loads((study[0] / "results.json").read_text())
    made = lose(runs({"relu": [1.0, 1.2, 1.1], "rrelu": [0.9, 1.0, 1.2]}), *lost)
    frame = statistics.table(made)
    again = report._plain(
        value
        | {
            "runs": made,
            "conclusions": statistics.conclusions(frame, 100),
            "summary": statistics.summary(frame).to_dict("records"),
            "differences": {m: statistics.differences(frame, m).to_dict("records") for m in statistics.METRICS},
        }
    )
    report.write(tmp_path, again)
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    page = (tmp_path / "report.html").read_text()
    console = Console(width=120, file=io.StringIO())
    report.show(console, again)
    assert [row["seeds"] for row in report.rows(again)] == seeds
    for text in (page, console.file.getvalue()):
        assert all(cell in text for cell in seeds) and "nan %" not in text
        assert ("diverged" in text) == bool(lost) and ("n/a" in text) >= ("0 (3 diverged)" in seeds)


def test_a_study_that_diverges_ends_with_its_report(tmp_path, capsys):
    options = (
        "study --data digits --seeds 2 --variants relu,prelu --epochs 2 --width 0.03125 --train-images 64 --jobs 1"
    )
    arguments = [*options.split(), "--lr", "1e30", "--no-cost", "--out", str(tmp_path)]
    for _ in range(2):  # and again, from what is kept
        assert cli.main(arguments) == 0
        assert "diverged, the training loss is" in " ".join(capsys.readouterr().out.split())
    value = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert all(run["diverged"] for run in value["runs"]) and {e["n"] for e in value["summary"]} == {0}
    assert "2 of 2 runs of PReLU diverged" in (tmp_path / "report.html").read_text()


def test_power_figures():
    """80 % power at 5 % needs 34 pairs for an effect of half a standard deviation (Cohen 1988)."""
    assert statistics._seeds_needed(0.5, 1.0, 1) == 34
    assert statistics._detectable(34, 1.0, 1) == pytest.approx(0.5, abs=0.01)


# ---- sentences ----


def sentences(losses, errors=None):
    return " ".join(statistics.conclusions(statistics.table(runs(losses, errors)), 100))


def test_sentences_follow_the_numbers():
    noise = np.random.default_rng(0).normal(0, 0.005, (2, 8))
    base = np.linspace(0.6, 0.9, 8)
    lower = sentences({"relu": base, "rrelu": base - 0.08 + noise[0]})
    assert "separate 1 of 1 pair: RReLU, U(3, 8) below ReLU by 0.0" in lower
    assert "RReLU − ReLU in log-loss: −0.0" in lower and "p < 0.001: separated" in lower
    higher = sentences({"relu": base, "rrelu": base + 0.08 + noise[0]})
    assert "ReLU below RReLU, U(3, 8)" in higher
    none = sentences({"relu": base, "rrelu": base + noise[1] - noise[1].mean()})
    assert "In log-loss the data separate none of the 1 pair." in none and "not separated" in none
    assert "In error the data separate none" in lower
    assert "lowest training log-loss" in lower and lower.index("RReLU") < lower.index("the paper's on CIFAR-10")


def test_one_seed_separates_nothing():
    assert sentences({"relu": [1.0], "rrelu": [0.1]}).endswith("nothing can be separated.")


def test_the_papers_figures_are_the_papers():
    assert paper.RESULTS["rrelu"]["cifar-10"] == (0.00550, 0.1119) and set(paper.RESULTS) == set(VARIANTS)
    gap = paper.RESULTS["leaky5.5"]["cifar-10"][1] - paper.RESULTS["rrelu"]["cifar-10"][1]
    assert round(gap * 10_000) == 1


# ---- the command ----


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    options = (
        "study --data digits --seeds 2 --variants relu,rrelu --epochs 2 --width 0.03125 --train-images 64 --jobs 1"
    )
    arguments = [*options.split(), "--evaluate-every", "1", "--out", str(out)]
    assert cli.main(arguments) == 0
    return out, arguments


def test_results_hold_everything(study):
    value = json.loads((study[0] / "results.json").read_text(), parse_constant=pytest.fail)
    assert len(value["runs"]) == 4 and len(value["cost"]) == 2 and value["conclusions"]
    assert value["protocol"]["data"] == "digits" and any(line.startswith("width") for line in value["deviations"])
    assert all(cost["fused_bytes"] > 0 and cost["fused_seconds"] > 0 for cost in value["cost"])
    assert {r["final"]["test_count"] for r in value["runs"]} == {500}
    means = {(e["variant"], e["figure"]): e["mean"] for e in value["summary"]}
    by_hand = pd.Series([r["final"]["test_loss"] for r in value["runs"] if r["variant"] == "rrelu"]).mean()
    assert means["rrelu", "test_loss"] == pytest.approx(by_hand)


def test_report_is_one_file_that_says_what_is_the_papers(study):
    page = (study[0] / "report.html").read_text()
    value = json.loads((study[0] / "results.json").read_text())
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") == 2 and "prefers-color-scheme: dark" in page
    heading, figures = page.index("the paper’s own figures"), page.index("11.19 %")
    assert heading < figures < page.index("</table>"), "under a heading of its own in the table of results"
    for sentence in value["conclusions"]:
        assert sentence.replace("<", "&lt;").replace("'", "&#39;") in page
    for line in value["deviations"]:
        assert line in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids)), "an id is met once in a page"


def test_a_second_run_reads_what_the_first_found(study, monkeypatch):
    from fused_rect.study import training

    before = json.loads((study[0] / "results.json").read_text())
    monkeypatch.setattr(training.Run, "update", None)
    assert cli.main([*study[1], "--no-cost"]) == 0
    after = json.loads((study[0] / "results.json").read_text())
    assert after["runs"] == before["runs"] and after["summary"] == before["summary"] and after["cost"] == []


def test_in_two_processes_the_numbers_are_the_same(study, tmp_path):
    arguments = [*study[1], "--no-cost", "--jobs", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (study[0], tmp_path))
    assert one["runs"] == two["runs"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--variants relu,elu", "elu"),
        ("--data cifar-10", "cifar-10 is not installed by any package: name the folder that holds it with --root"),
        ("--scale full --network ndsb", "ndsb is not installed"),
        ("--data digits --image 5", "image must divide 8"),
        ("--data digits --train-images 5000", "at most 1297"),
        ("--data digits --lr -1", "lr must be"),
        ("--seeds 0", "--seeds"),
        ("--data digits --split validation", "validation_images"),
        pytest.param(
            "--data digits --tensorboard",
            "pip install tensorboard",
            marks=pytest.mark.skipif(bool(importlib.util.find_spec("tensorboard")), reason="it is installed"),
        ),
    ],
)
def test_bad_options_are_named_before_anything_is_written(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["study", "--seeds", "1", "--jobs", "1", "--out", str(out), *arguments.split()]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert message in said and not out.exists()


def test_plots_take_the_pages_colours():
    made = runs({"relu": [1.0, 1.2], "rrelu": [0.9, 1.1]})
    for svg in (plots.learning_curves(made), plots.differences(statistics.table(made))):
        assert "var(--series-1)" in svg or "var(--series-5)" in svg
        assert "#0300" not in svg and "#010101" not in svg and "var(--ink)" in svg


def test_figures_read_well():
    assert report.percent({"mean": -0.0123, "low": None, "high": None}) == "−1.23"
    assert report.loss({"mean": 0.5, "low": 0.4, "high": 0.6}) == "0.500 [0.400, 0.600]"

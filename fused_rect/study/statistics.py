"""Means, paired differences and what they separate, over seeds; the methods are statsmodels' and scipy's.

A seed fixes weights, subset and batch order for all variants, so the unit is the seed and every comparison is paired.
The p-values of one metric, over all its pairs, are corrected together by Holm's method.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from . import paper
from .variants import VARIANTS

LEVEL, POWER = 0.05, 0.8
METRICS = {"test_loss": "log-loss", "test_error": "error"}
COLUMNS = ("train_error", "train_mode_train_error", "train_loss", "train_mode_train_loss", "test_error", "test_loss")


def table(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a run: variant, seed, its final figures, and how it diverged if it did; then its figures are NaN, and no
    mean or pair has them. Seeds that lack a variant are left out.
    """
    counts = {f"{name}_count": math.nan for name in ("train", "train_mode_train", "test")}
    absent = {**dict.fromkeys(COLUMNS, math.nan), **counts}
    frame = pd.DataFrame(
        [
            {"variant": r["variant"], "seed": r["seed"], "diverged": r.get("diverged"), **absent, **r["final"]}
            for r in runs
        ]
    )
    variants = frame["variant"].nunique()
    complete = frame.groupby("seed")["variant"].transform("nunique") == variants
    return frame[complete].reset_index(drop=True)


def interval(values: Any) -> tuple[float, float]:
    """95 % t interval of the mean; NaN for a single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return math.nan, math.nan
    low, high = DescrStatsW(values).tconfint_mean(LEVEL)
    return float(low), float(high)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Per variant and figure: n (seeds that the mean has), mean, low, high; in the paper's order."""
    rows = []
    for variant in order(frame):
        for column in COLUMNS:
            values = frame.loc[frame["variant"] == variant, column].dropna()
            low, high = interval(values)
            rows.append((variant, column, len(values), values.mean(), low, high))
    return pd.DataFrame(rows, columns=["variant", "figure", "n", "mean", "low", "high"])


def order(frame: pd.DataFrame) -> list[str]:
    present = set(frame["variant"])
    return [key for key in VARIANTS if key in present]


def differences(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Every pair of variants: later - earlier in the paper's order, over the seeds that both have (n), with
    Holm-corrected p.

    `detectable` is the difference that the pair's spread lets these seeds find with 80 % power at Holm's strictest
    level; `seeds_needed` how many would find the observed one.
    """
    wide = frame.pivot(index="seed", columns="variant", values=metric)
    pairs = list(itertools.combinations(order(frame), 2))
    rows = [_pair((wide[b] - wide[a]).dropna(), a, b, len(pairs)) for a, b in pairs]
    result = pd.DataFrame(rows)
    if rows:
        result["p_holm"] = multipletests(result["p"].fillna(1.0), LEVEL, method="holm")[1]
        result.loc[result["p"].isna(), "p_holm"] = math.nan
        result["separated"] = result["p_holm"] < LEVEL
    return result


def _pair(d: Any, a: str, b: str, pairs: int) -> dict[str, Any]:
    low, high = interval(d)
    n, mean, sd = len(d), float(d.mean()), float(d.std(ddof=1)) if len(d) > 1 else math.nan
    if n < 2:
        p = math.nan
    elif sd == 0:  # a t-test has no p-value without spread
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(stats.ttest_1samp(d, 0.0).pvalue)
    return {
        "a": a, "b": b, "n": n, "difference": mean, "low": low, "high": high, "p": p,
        "detectable": _detectable(n, sd, pairs), "seeds_needed": _seeds_needed(mean, sd, pairs),
    }  # fmt: skip


def _detectable(n: int, sd: float, pairs: int) -> float:
    if n < 2 or not sd > 0:
        return math.nan
    return float(TTestPower().solve_power(None, nobs=n, alpha=LEVEL / pairs, power=POWER)) * sd


def _seeds_needed(mean: float, sd: float, pairs: int) -> float:
    if not sd > 0 or mean == 0:
        return math.nan
    counts = np.unique(np.geomspace(2, 10_000, 400).round())  # every number to 60, then steps of 2 %
    enough = TTestPower().power(abs(mean) / sd, counts, LEVEL / pairs) >= POWER
    return float(counts[enough.argmax()]) if enough.any() else math.inf


# ---- in words ----


def conclusions(frame: pd.DataFrame, reported_images: int) -> list[str]:
    """What the data separate and what they do not, as sentences made from the numbers."""
    seeds = sorted(frame["seed"].unique())
    lost = _diverged(frame)
    if len(seeds) < 2:
        why = "without a second one there is no spread, and nothing can be separated."
        return [*lost, f"{_count(len(seeds), 'seed')}: {why}"]
    found = [
        *lost,
        f"{_count(len(seeds), 'paired seed')}, {reported_images:,} images reported on; the intervals are 95 % t "
        "intervals over seeds.",
    ]
    if frame["test_loss"].isna().all():
        return lost
    for metric in METRICS:
        found.append(_separated(differences(frame, metric), metric))
    found += filter(None, (_headline(differences(frame, metric), metric) for metric in METRICS))
    found += _training(frame)
    return found


def _diverged(frame: pd.DataFrame) -> list[str]:
    """One sentence a variant that lost runs."""
    found = []
    for variant in order(frame):
        rows = frame[frame["variant"] == variant]
        lost = rows[rows["diverged"].notna()]
        if len(lost):
            each = "; ".join(f"seed {r['seed']}, {r['diverged']}" for r in lost.to_dict("records"))
            runs = f"{len(lost)} of {_count(len(rows), 'run')} of {_label(variant)}"
            are = "is" if len(lost) == 1 else "are"
            found.append(f"{runs} diverged and {are} in no mean or pair ({each}); a smaller --lr may hold.")
    return found


def _separated(pairs: pd.DataFrame, metric: str) -> str:
    if pairs.empty:
        return f"One variant alone: there is no difference in {METRICS[metric]} to test."
    sure = pairs[pairs["separated"]]
    typical, fewest, most = pairs["detectable"].median(), int(pairs["n"].min()), int(pairs["n"].max())
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    blind = (
        f"Of the others, differences under about {_amount(typical, metric)} are too small for "
        f"{seeds} (80 % power at Holm's strictest level, for the median pair)."
        if len(sure) < len(pairs) and math.isfinite(typical)
        else ""
    )
    if sure.empty:
        said = f"In {METRICS[metric]} the data separate none of the {_count(len(pairs), 'pair')}."
        return " ".join(filter(None, (said, blind.replace("Of the others, d", "D"))))
    listed = "; ".join(_below(row, metric) for row in sure.to_dict("records"))
    return (
        f"In {METRICS[metric]} the data separate {len(sure)} of {_count(len(pairs), 'pair')}: {listed}. {blind}".strip()
    )


def _below(row: Any, metric: str) -> str:
    lower, higher = (row["b"], row["a"]) if row["difference"] < 0 else (row["a"], row["b"])
    return f"{VARIANTS[lower].label} below {VARIANTS[higher].label} by {_amount(abs(row['difference']), metric)}"


def _headline(pairs: pd.DataFrame, metric: str) -> str:
    """The paper's claim, RReLU against ReLU, whatever came out."""
    row = next((r for r in pairs.to_dict("records") if (r["a"], r["b"]) == ("relu", "rrelu")), None)
    if row is None or not row["n"]:
        return ""
    verdict = "separated" if row["separated"] else "not separated"
    needed = ""
    if not row["separated"] and math.isfinite(row["seeds_needed"]) and row["seeds_needed"] > row["n"]:
        needed = f"; were that the true difference and spread, about {int(row['seeds_needed']):,} seeds would show it"
    low, high = (_signed(row[bound], metric).removesuffix(" points") for bound in ("low", "high"))
    interval = f" [{low}, {high}]" if row["n"] > 1 else " in one seed"
    return (
        f"RReLU − ReLU in {METRICS[metric]}: {_signed(row['difference'], metric)}{interval}, "
        f"Holm-corrected p {p_value(row['p_holm'], '= ')}: {verdict}{needed}."
    )


def _training(frame: pd.DataFrame) -> list[str]:
    means = frame.groupby("variant")[list(COLUMNS)].mean().loc[order(frame)].dropna()
    if len(means) < 2:
        return []
    gap = means["test_loss"] - means["train_loss"]
    fits, widest, narrowest = means["train_loss"].idxmin(), gap.idxmax(), gap.idxmin()
    theirs = sorted(means.index, key=lambda v: paper.RESULTS[v]["cifar-10"][1])
    return [
        f"By their means alone: {_label(fits)} fits the training images best (lowest training log-loss in eval mode); "
        f"the gap to the log-loss reported on is largest for {_label(widest)}, smallest for {_label(narrowest)}.",
        f"By mean error, best first, here: {_labels(means['test_error'].sort_values(kind='stable').index)}; "
        f"the paper's on CIFAR-10: {_labels(theirs)}.",
    ]


def _label(variant: Any) -> str:
    return VARIANTS[variant].label


def _labels(variants: Any) -> str:
    return "; ".join(_label(v) for v in variants)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _amount(value: float, metric: str) -> str:
    return f"{100 * value:.2f} points" if metric == "test_error" else f"{value:.3f}"


def _signed(value: float, metric: str) -> str:
    return ("−" if value < 0 else "+") + _amount(abs(value), metric)


def p_value(p: float | None, relation: str = "") -> str:
    return "n/a" if p is None or math.isnan(p) else "< 0.001" if p < 0.001 else f"{relation}{p:.3f}"

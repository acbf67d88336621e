"""Runs: killed and resumed, on one process and two, exact counts, pairing, modes."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rect import files
from fused_rect.study import batches, checkpoint, data, distributed, training
from fused_rect.study.protocol import NIN_CIFAR10
from fused_rect.study.training import Job

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    NIN_CIFAR10, data="made", width=1 / 32, iterations=0, epochs=4, batch_size=16, lr=0.02, init="he",
    preprocess="standardize",
)  # fmt: skip


def dataset(train=43, test=21):
    """Images of two classes that differ in brightness; sizes that no batch and no number of ranks divides."""
    rng = np.random.default_rng(0)
    labels = np.arange(train + test) % 2
    images = np.clip(rng.normal(90 + 70 * labels[:, None, None, None], 40, (train + test, 1, 8, 8)), 0, 255)
    images = images.astype(np.uint8)
    return data.Dataset("made", "here", images[:train], labels[:train], images[train:], labels[train:], 2)


def job(folder, variant="rrelu", seed=0, every=1, **changes):
    return Job(dataclasses.replace(TINY, **changes), variant, seed, folder, evaluate_every=2, checkpoint_every=every)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- resuming ----

CHILD = """
import sys, pathlib, torch
sys.path.insert(0, sys.argv[1])
import test_study_training as t
torch.set_num_threads(1)
t.training.execute(t.job(pathlib.Path(sys.argv[2]), epochs=40), t.dataset(), t.CPU)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_and_started_again_ends_with_the_same_numbers(tmp_path):
    whole = training.execute(job(tmp_path / "whole", epochs=40), dataset(), CPU)
    folder = tmp_path / "killed"
    for kill in (True, True, False):
        before = _step(folder)
        child = subprocess.Popen([sys.executable, "-c", CHILD, os.path.dirname(__file__), str(folder)])
        deadline = time.monotonic() + 120
        while kill and _step(folder) <= before + 5:  # it is some updates further: kill it wherever it now is
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        if kill:
            child.send_signal(signal.SIGKILL)
        child.wait()
        assert (folder / "result.json").exists() != kill
    found = checkpoint.unsealed((folder / "result.json").read_bytes())
    found.pop("identity")
    assert found == json.loads(json.dumps(whole))
    events = [json.loads(line)["event"] for line in _whole_lines(folder / "log.jsonl")]
    assert events.count("start") == 1 and events.count("resume") == 2 and events[-1] == "result"


def _step(folder):
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def _whole_lines(path):
    return [line for line in path.read_text().splitlines() if line.endswith("}")]


class Killed(Exception):
    pass


@settings(max_examples=12)
@given(
    at=st.integers(0, 11), every=st.integers(1, 5), variant=st.sampled_from(["prelu", "rrelu"]), dropout=st.booleans()
)
def test_stopped_at_any_update(at, every, variant, dropout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    changes = {"dropout": 0.5 if dropout else 0.0}
    whole = training.execute(job(folder / "whole", variant, every=0, **changes), dataset(), CPU)
    broken = job(folder / "broken", variant, every=every, **changes)
    original = training.Run.update

    def update(run):
        if run.step == at:
            raise Killed
        original(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "update", update)
        with pytest.raises(Killed):
            training.execute(broken, dataset(), CPU)
    assert training.execute(broken, dataset(), CPU) == whole
    assert not (folder / "broken" / "checkpoint.pt").exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run = training.Run(job(tmp_path), dataset(), CPU)
    run.update()
    run.save()
    with pytest.raises(ValueError, match="other settings"):
        training.execute(job(tmp_path, lr=0.03), dataset(), CPU)
    with pytest.raises(ValueError, match="other settings"):
        training.execute(job(tmp_path), dataset(train=42), CPU)


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"identity": "a", "value": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        checkpoint.save(path, {"identity": "a", "value": 2})
    assert checkpoint.load(path, "a")["value"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*delete it"):
        checkpoint.load(path, "a")


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    first = training.execute(job(tmp_path), dataset(), CPU)
    monkeypatch.setattr(training.Run, "update", None)
    assert training.execute(job(tmp_path), dataset(), CPU) == first
    with pytest.raises(ValueError, match="other settings"):
        training.execute(job(tmp_path, epochs=5), dataset(), CPU)


# ---- numbers ----


def test_it_learns_and_counts_every_image_once(tmp_path):
    result = training.execute(job(tmp_path, "relu", epochs=15, dropout=0.0, last_lr=1.0), dataset(), CPU)
    final = result["final"]
    assert (final["train_count"], final["train_mode_train_count"], final["test_count"]) == (43, 43, 21)
    assert final["test_error"] < 0.2 and result["updates"] == 15 * 3
    assert final["test_error"] * 21 == pytest.approx(round(final["test_error"] * 21)), "a whole number of images"


def test_counts_at_the_edges_of_chunks(tmp_path, monkeypatch):
    run = training.Run(job(tmp_path), dataset(), CPU)
    whole = run.measure(run.train, training=False)
    for chunk in (1, 42, 43, 44):
        monkeypatch.setattr(training, "CHUNK", chunk)
        assert run.measure(run.train, training=False) == pytest.approx(whole, rel=1e-6)


def test_iterations_stop_within_an_epoch(tmp_path):
    result = training.execute(job(tmp_path, iterations=5, epochs=0), dataset(), CPU)
    assert result["updates"] == 5 and result["history"][-1]["step"] == 5 and "test_loss" in result["history"][-1]


def test_variants_are_paired(tmp_path):
    """Subset, order and initial weights depend on the seed alone."""
    runs = {
        (v, s): training.Run(job(tmp_path, v, s, train_images=20), dataset(), CPU)
        for v in ("relu", "rrelu")
        for s in (0, 1)
    }
    for s in (0, 1):
        a, b = runs["relu", s], runs["rrelu", s]
        assert torch.equal(a.train.images, b.train.images)
        assert torch.equal(batches.epoch(a.train, s, 3, CPU).order, batches.epoch(b.train, s, 3, CPU).order)
    assert not torch.equal(runs["relu", 0].train.images, runs["relu", 1].train.images)
    orders = [batches.epoch(runs["relu", 0].train, 0, n, CPU).order for n in (0, 1)]
    assert not torch.equal(*orders) and all(sorted(o.tolist()) == list(range(20)) for o in orders)


def test_validation_images_are_never_trained_on():
    p = dataclasses.replace(TINY, validation_images=10, train_images=30, split="validation")
    train, held_out = batches.subset(43, p, 0)
    other, same = batches.subset(43, p, 1)
    assert not set(train) & set(held_out) and len(train) == 30 and len(held_out) == 10
    assert list(held_out) == list(same) and list(train) != list(other)
    with pytest.raises(ValueError, match="at most 43"):
        batches.subset(43, dataclasses.replace(p, train_images=34), 0)


def test_train_mode_measures_with_dropout_and_leaves_the_model_alone(tmp_path):
    run = training.Run(job(tmp_path, network="inception", law="slope", dropout=0.5), dataset(), CPU)
    run.update()
    before = {k: v.clone() for k, v in run.model.state_dict().items() if "num_batches" not in k}
    a, b = (run.measure(run.train, training=True) for _ in range(2))
    assert a == b != run.measure(run.train, training=False)
    assert all(torch.equal(v, run.model.state_dict()[k]) for k, v in before.items())
    assert run.model.training and all(m.momentum == 0.1 for m in run.model.modules() if hasattr(m, "momentum"))


def test_a_diverged_run_ends_says_so_and_is_not_trained_again(tmp_path, monkeypatch):
    result = training.execute(job(tmp_path, "prelu", lr=1e6), dataset(), CPU)
    assert re.fullmatch(r"the training loss is (nan|inf) after \d of 12 updates", result["diverged"])
    assert result["final"] == {} and "train_loss" not in result["history"][-1]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["event"] == "diverged" and log[-1]["why"] == result["diverged"]
    monkeypatch.setattr(training.Run, "update", None)
    assert training.execute(job(tmp_path, "prelu", lr=1e6), dataset(), CPU) == result


@pytest.mark.parametrize("what", ["train", "test"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_is_not_finite_at_its_end_has_diverged(tmp_path, monkeypatch, what, value):
    measure = training.Run.measure

    def lost(run, images, training):
        loss, error, count = measure(run, images, training)
        return (value if images is (run.train if what == "train" else run.report) else loss), error, count

    monkeypatch.setattr(training.Run, "measure", lost)
    result = training.execute(job(tmp_path), dataset(), CPU)
    assert result["diverged"] == f"the {what} loss is {value} after the last update" and result["final"] == {}
    assert ("test_loss" in result["history"][-1]) == (what == "train")
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("changes", [{"amp": "bf16"}, {"channels_last": True}, {"epilogue": "eager"}], ids=str)
def test_other_ways_to_run(changes, tmp_path):
    result = training.execute(job(tmp_path, epochs=2, **changes), dataset(), CPU)
    plain = training.execute(job(tmp_path / "plain", epochs=2), dataset(), CPU)
    assert result["final"]["test_loss"] == pytest.approx(plain["final"]["test_loss"], abs=0.1)


def test_crops_and_mirrors():
    pixels = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    as_drawn = batches._cropped(pixels, 2, torch.tensor([[1, 2, 0]]))
    mirrored = batches._cropped(pixels, 2, torch.tensor([[1, 2, 1]]))
    assert as_drawn.tolist() == [[[[6, 7], [10, 11]]]] and mirrored.tolist() == [[[[7, 6], [11, 10]]]]
    assert batches._cropped(pixels, 2, None).tolist() == [[[[5, 6], [9, 10]]]]


# ---- two processes ----

# Gradients are summed in another order: float32 rounding, carried through 12 updates.
TOLERANCE = 2e-4
DETERMINISTIC = ("relu", "leaky5.5", "prelu")


def _ranks(rank, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        found = {v: training.execute(job(out / v, v, dropout=0.0), dataset(), CPU) for v in (*DETERMINISTIC, "rrelu")}
        again = training.execute(job(out / "again", "rrelu", dropout=0.0), dataset(), CPU)
        assert again == found["rrelu"], "the slopes repeat"
        _slopes_are_independent()
        resumed = training.Run(job(out / "resumed", "prelu", dropout=0.0), dataset(), CPU)
        resumed.resume()
        for _ in range(2):  # within the first epoch
            resumed.update()
            seeds = distributed.gathered(torch.tensor(torch.initial_seed() % 2**62))
            assert seeds[0] != seeds[1], "what a rank draws at a step is its own"
        resumed.save()
        assert training.execute(job(out / "resumed", "prelu", dropout=0.0), dataset(), CPU) == found["prelu"]
        files.replace_json(out / f"rank{rank}.json", found)
    finally:
        dist.destroy_process_group()


def _slopes_are_independent():
    """Across ranks and steps: no equal tensors, and correlations within what chance gives (4 sigma)."""
    drawn = []
    layer = training.Layers(training.VARIANTS["rrelu"]).activation(1)
    for step in (7, 8):
        torch.manual_seed(distributed.key(0, batches.STEP, step, distributed.rank()))
        drawn.append(-layer(-torch.ones(1, 1, 100, 100)).flatten())
    mine = torch.stack(drawn)
    everyone = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyone, mine)
    correlation = torch.corrcoef(torch.cat(everyone)) - torch.eye(4)
    assert correlation.abs().max() < 4 / 100


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_equal_one(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_ranks, (str(tmp_path / "store"), tmp_path), nprocs=2)
    two, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert two == other, "both ranks report the same"
    for variant in DETERMINISTIC:
        one = training.execute(job(tmp_path / "one" / variant, variant, dropout=0.0), dataset(), CPU)
        assert two[variant]["final"] == pytest.approx(one["final"], rel=TOLERANCE, abs=TOLERANCE)
        for a, b in zip(two[variant]["history"], one["history"]):
            assert a == pytest.approx(b, rel=TOLERANCE, abs=TOLERANCE)
    assert two["rrelu"]["final"]["test_count"] == 21


def test_shares_are_whole(monkeypatch):
    for ranks in (1, 2, 3, 8):
        monkeypatch.setattr(distributed, "world_size", lambda ranks=ranks: ranks)
        for count in (0, 1, 7, 16):
            parts = []
            for rank in range(ranks):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                parts += distributed.share(list(range(count)))
            assert parts == list(range(count))

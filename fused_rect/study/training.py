"""One run: a variant under a seed, trained, measured after its last update, resumable after any kill.

Everything random is a function of (seed, purpose, step, rank): see :func:`distributed.key`. So a run that goes on from
a checkpoint ends with the bits of one that was never stopped, on the same machine with as many processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import batches, checkpoint, distributed, networks, protocol
from .data import Dataset
from .log import Log
from .protocol import Protocol
from .variants import VARIANTS, Layers

CHUNK = 1000  # images a forward pass in evaluation, over all ranks


@dataclass(frozen=True)
class Job:
    """A run and where its files go. ``evaluate_every`` counts epochs, ``checkpoint_every`` updates (0: never)."""

    protocol: Protocol
    variant: str
    seed: int
    folder: Path
    evaluate_every: int = 10
    checkpoint_every: int = 100
    tensorboard: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"


class Run:
    """The state of one run: model, optimizer, position and what has been recorded."""

    def __init__(self, job: Job, dataset: Dataset, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.job, self.device, self.dtype, p = job, device, dtype, job.protocol
        self.train, self.report = batches.prepare(dataset, p, job.seed, device)
        self.model = new_model(p, job.variant, job.seed, self.train.images.shape[1], dataset.classes)
        self.model.to(device, dtype)
        if p.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(groups(self.model, p), lr=p.lr, momentum=p.momentum)
        self.scaler = torch.amp.grad_scaler.GradScaler(device.type, enabled=p.amp == "fp16")
        self.updates, self.per_epoch = p.updates(len(self.train)), p.batches(len(self.train))
        self.step, self.history = 0, list[dict[str, float]]()
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # of this epoch: log-loss, errors, images
        self.identity = protocol.identity(p, job.variant, job.seed, dataset.fingerprint(), distributed.world_size())
        self.order: batches.Epoch | None = None
        self.diverged: str | None = None  # how, if it has
        self.parallel = self.model

    # ---- resuming ----

    @property
    def path(self) -> Path:
        return self.job.folder / "checkpoint.pt"

    def resume(self) -> bool:
        """Go on from the checkpoint if there is one; rank 0 reads it for all. Then, with many ranks, wrap the model."""
        state = distributed.from_first(checkpoint.load(self.path, self.identity) if distributed.rank() == 0 else None)
        if state is not None:
            try:
                self._take(state)
            except Exception as error:  # load_state_dict has its own ways to say that something is missing
                why = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"{self.path} lacks what a run goes on from ({why}); delete it to start anew"
                ) from error
        self.parallel = distributed.parallel(self.model, self.device)
        return state is not None

    def _take(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        self.sums = state["sums"][distributed.rank()].to(self.device)

    def save(self) -> None:
        sums = distributed.gathered(self.sums)
        if distributed.rank() == 0:
            state = {
                "identity": self.identity, "step": self.step, "history": self.history, "sums": sums.cpu(),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            }  # fmt: skip
            checkpoint.save(self.path, state)

    # ---- training ----

    def update(self) -> Tensor:
        """One step of SGD on one global batch, and its part of the epoch's sums. Returns this rank's loss, a mean."""
        p, number = self.job.protocol, self.step // self.per_epoch
        within = self.step % self.per_epoch
        if self.order is None or within == 0:
            self.order = batches.epoch(self.train, self.job.seed, number, self.device)
        positions = torch.arange(within * p.batch_size, min((within + 1) * p.batch_size, len(self.train)))
        mine = distributed.share(positions).to(self.device)
        index = self.order.order[mine]
        placement = None if self.order.placement is None else self.order.placement[mine]
        rate = p.lr_at(self.step, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        torch.manual_seed(distributed.key(self.job.seed, batches.STEP, self.step, distributed.rank()))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        labels = self.train.labels[index]
        with autocast(p, self.device):
            scores = self.parallel(self.train.inputs(index, placement).to(self.dtype))
        loss = F.cross_entropy(scores.to(self.dtype), labels, reduction="sum")
        # DDP averages over ranks: the sum over the global batch divided by its exact size.
        scaled = loss * (distributed.world_size() / len(positions))
        self.scaler.scale(scaled).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += counts(loss.detach(), scores.detach(), labels)
        self.step += 1
        return scaled.detach()

    def close_epoch(self) -> dict[str, float]:
        """What the epoch's own updates saw (train mode, weights in motion), then its sums are zero again.

        No losses where they are not finite: the run has diverged.
        """
        loss, errors, images = distributed.total(self.sums.clone()).tolist()
        self.sums.zero_()
        if not math.isfinite(loss):
            self.diverged = f"the training loss is {loss} after {self.step:,} of {self.updates:,} updates"
        epochs = self.step / self.per_epoch
        return {
            "epoch": round(epochs, 3),
            "step": self.step,
            **({} if self.diverged else {"train_loss": loss / images, "train_error": errors / images}),
        }

    def measure(self, images: batches.Images, training: bool) -> tuple[float, float, int]:
        """(log-loss, error, count) over exactly the images there are, the weights at rest.

        training=True: dropout and random slopes are on, BatchNorm uses the batch's statistics and keeps its own.
        """
        p = self.job.protocol
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with mode(self.model, training), torch.no_grad():
            for start in range(0, len(images), CHUNK):
                mine = distributed.share(torch.arange(start, min(start + CHUNK, len(images)))).to(self.device)
                seed = distributed.key(self.job.seed, batches.EVALUATION, start, distributed.rank())
                torch.manual_seed(seed)
                labels = images.labels[mine]
                with autocast(p, self.device):
                    scores = self.model(images.inputs(mine).to(self.dtype)).to(self.dtype)
                sums += counts(F.cross_entropy(scores, labels, reduction="sum"), scores, labels)
        loss, errors, count = distributed.total(sums).tolist()
        assert count == len(images), f"counted {count} of {len(images)} images"
        return loss / count, errors / count, int(count)


def counts(loss_sum: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """(log-loss, errors, images) of a batch, as float64 that stays on the device. A NaN score is an error."""
    errors = (scores.argmax(1) != labels).sum() if len(labels) else loss_sum.new_zeros(())
    return torch.stack([loss_sum.double(), errors.double(), loss_sum.new_tensor(len(labels)).double()])


def autocast(p: Protocol, device: torch.device) -> torch.autocast:
    dtype = torch.float16 if p.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=p.amp != "none")


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode that leaves BatchNorm's running statistics alone, then the mode as it was."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept, was = [m.momentum for m in norms], model.training
    try:
        for m in norms:
            m.momentum = 0.0
        model.train(training)
        yield
    finally:
        for m, momentum in zip(norms, kept):
            m.momentum = momentum
        model.train(was)


def new_model(p: Protocol, variant: str, seed: int, in_channels: int, classes: int) -> nn.Module:
    """The network of ``p`` under ``variant`` with the initial weights of ``seed``."""
    layers = Layers(VARIANTS[variant], p.epilogue == "fused", p.law)
    model = networks.build(p.network, layers, in_channels, classes, p.width, p.dropout, p.rectified_scores)
    networks.initialize(model, distributed.key(seed, batches.WEIGHTS), p.init)
    return model


def groups(model: nn.Module, p: Protocol) -> list[dict[str, Any]]:
    """SGD's parameter groups: weights decay; biases, BatchNorm's parameters and PReLU's slopes do not."""
    made: dict[tuple[float, float], list[nn.Parameter]] = {}
    weights = {f"{name}.weight" for name, _ in networks.maps(model)}
    for name, parameter in model.named_parameters():
        last = name.startswith("classifier") and p.last_lr != 1  # its bias too, as the public configuration has it
        of_map = name in weights or name.endswith(".bias")  # else PReLU's slopes or BatchNorm's scale
        factor = 1.0 if not of_map else p.last_lr if last else p.bias_lr if name.endswith(".bias") else 1.0
        made.setdefault((factor, p.weight_decay if name in weights else 0.0), []).append(parameter)
    return [{"params": ps, "factor": factor, "weight_decay": decay} for (factor, decay), ps in made.items()]


def execute(job: Job, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Train ``job`` to its end, or return what an earlier process found, and keep its result beside its log.

    A run whose loss is no longer finite ends there; its result says so and has no final figures. Raises ValueError
    where the folder holds another run or damaged files, OSError where nothing can be written.
    """
    run, path = Run(job, dataset, device), job.folder / "result.json"
    done = distributed.from_first(checkpoint.load_result(path, run.identity) if distributed.rank() == 0 else None)
    if done is not None:
        return done  # type: ignore[no-any-return]
    resumed = run.resume()
    with Log(job.folder, job.name, distributed.rank() == 0, job.tensorboard) as log:
        log.write("resume" if resumed else "start", step=run.step, updates=run.updates, images=len(run.train))
        while run.step < run.updates and not run.diverged:
            run.update()
            last = run.step == run.updates
            if run.step % run.per_epoch == 0 or last:
                _end_epoch(run, log, last)
            if job.checkpoint_every and run.step % job.checkpoint_every == 0 and not last and not run.diverged:
                run.save()
        result = _result(run)
        log.write("diverged", why=run.diverged) if run.diverged else log.write("result", **result["final"])
    if distributed.rank() == 0:
        checkpoint.save_result(path, run.identity, result)
        run.path.unlink(missing_ok=True)
    return result


def _end_epoch(run: Run, log: Log, last: bool) -> None:
    entry = run.close_epoch()
    due = last or (run.step // run.per_epoch) % run.job.evaluate_every == 0
    if due and not run.diverged:
        loss, error, _ = run.measure(run.report, training=False)
        if math.isfinite(loss):
            entry |= {"test_loss": loss, "test_error": error}
    run.history.append(entry)
    log.write("epoch", **entry)


def _result(run: Run) -> dict[str, Any]:
    final = {} if run.diverged else _final(run)
    lost = [name for name, value in final.items() if not math.isfinite(value)]
    if lost:
        run.diverged = f"the {lost[0].replace('_', ' ')} is {final[lost[0]]} after the last update"
    return {
        "variant": run.job.variant,
        "seed": run.job.seed,
        "updates": run.step,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "diverged": run.diverged,
        "final": {} if run.diverged else final,
        "history": run.history,
    }


def _final(run: Run) -> dict[str, float]:
    final: dict[str, float] = {}
    for name, images, training in (
        ("train", run.train, False),
        ("train_mode_train", run.train, True),
        ("test", run.report, False),
    ):
        final[f"{name}_loss"], final[f"{name}_error"], final[f"{name}_count"] = run.measure(images, training)
    return final

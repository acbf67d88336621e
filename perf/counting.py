"""What compiled models move on a GPU, counted: `python -m fused_rect.perf.counting [name ...]`, without a GPU.

`torch.compile(backend="fused_rect")` and plain `torch.compile`, each step's kernels executed as PTX on a CUDA device
made of CPU memory (the package softcuda on PYTHONPATH): kernels launched, bytes of distinct 32-byte sectors that they
read or write, and the peak of live bytes, with and without what convolutions write. What torch's own operations move
(convolutions, matrix products) is not counted; it is the same for both. Bytes are what the memory would have to move,
not time. Exits with 1 where ours moves, launches or holds more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fused_rect import backends, files
from fused_rect import compile as fused_compile

from .blocks import BLOCKS, Block
from .models import MODELS, Model
from .profiling import peers

RESULTS = Path(__file__).with_name("results") / "compiled.json"
RECTIFIERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
}
DTYPES = ("bfloat16", "float32")
PLAIN, OURS = "inductor", "fused_rect"


@dataclass(frozen=True)
class Row:
    """A model's step under both; where no rectifier is ours the two graphs are one, and only plain is counted."""

    name: str
    rectifier: str
    dtype: str
    mode: str
    fused: int  # rectifiers whose forward or backward is ours ...
    rectifiers: int  # ... of so many
    chain: bool
    kernels: tuple[int, int]  # ours, plain
    bytes: tuple[int, int]
    peak: tuple[int, int]
    beside: tuple[int, int]  # the peak beside what convolutions write

    @property
    def ratio(self) -> float:
        return self.bytes[0] / max(self.bytes[1], 1)

    @property
    def peak_ratio(self) -> float:
        return self.peak[0] / max(self.peak[1], 1)

    @property
    def peak_beside(self) -> float:
        return self.beside[0] / max(self.beside[1], 1)

    @property
    def worse(self) -> list[str]:
        """In what ours is worse, to two decimals of plain's; in a peak by more than bits and sums of tiny tensors."""
        found = {"bytes": self.ratio > 1.005, "peak": self.peak_ratio > 1.005 and self.peak[0] - self.peak[1] > 2048}
        return [*(k for k, more in found.items() if more), *["kernels"] * (self.kernels[0] > self.kernels[1])]

    def __str__(self) -> str:
        return (
            f"{self.name:24} {self.rectifier:10} {self.dtype:8} {self.mode:9} {self.fused:2} of {self.rectifiers:2} "
            f"bytes {self.ratio:.3f}  kernels {self.kernels[0]:3} of {self.kernels[1]:3}  peak {self.peak_ratio:.2f}, "
            f"beside convolutions {self.peak_beside:.2f}"
            f"{'  MORE ' + ', '.join(self.worse) if self.worse else ''}"
        )


def step(run: Callable[[Tensor], Any], x: Tensor, training: bool) -> Callable[[], Any]:
    """One step; gradients of the outputs are there before it."""
    if not training:
        return peers.step(run, (x,), (), "inference")
    outputs = _tensors(run(x))
    gradients = [torch.randn_like(t) for t in outputs]
    del outputs

    def train() -> None:
        torch.autograd.backward(_tensors(run(x)), gradients)
        gc.collect()  # what a step leaves in cycles would be freed in the next one, and lower its peak

    return train


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if t.requires_grad]


def counted(model: nn.Module, x: Tensor, backend: str, training: bool, **keywords: Any) -> tuple[Any, int]:
    """A step's kernels, bytes and peak, and its peak beside what convolutions write."""
    count: Any = importlib.import_module("softcuda.counting").count  # beside the package, where it is at hand
    torch._dynamo.reset()
    once = step(torch.compile(model, backend=backend, **keywords), x, training)
    once()  # gradients are there from now on: what a step adds is its own
    beside = count(once).peak
    with convolutions_on_the_device():
        return count(once), beside


@contextlib.contextmanager
def convolutions_on_the_device() -> Iterator[None]:
    """Compiled code's convolutions write device memory, which is counted; the soft device's own write the CPU's."""
    kernels: Any = importlib.import_module("torch._inductor.select_algorithm").extern_kernels

    def there(t: Tensor | None) -> Tensor | None:
        return t if t is None else torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device).copy_(t)

    forward, backward = kernels.convolution, torch.ops.aten.convolution_backward.default
    with (
        mock.patch.object(kernels, "convolution", lambda *a, **k: there(forward(*a, **k))),
        mock.patch.object(
            torch.ops.aten.convolution_backward, "default", lambda *a, **k: tuple(map(there, backward(*a, **k)))
        ),
    ):
        yield


# Launches from Python are bounded by the tensors that they are handed; from C++, which has addresses, by the device's
# memory alone, and the soft device's convolutions write the CPU's.
@mock.patch.object(backends, "prepare", lambda device: None)
def compare(name: str, x: Tensor, mode: str, rectifier: str, about: Block) -> Row:
    training, act = mode == "training", RECTIFIERS.get(rectifier, nn.Identity)

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = about.build(act()).to(x.device, x.dtype).train(training)
        return made.to(memory_format=about.memory_format)  # type: ignore[no-any-return, call-overload]

    with torch.set_grad_enabled(training):
        sites = fused_compile.explain(model(), x)
    plain, plain_beside = counted(model(), x, PLAIN, training, **about.compile)
    ours, beside = counted(model(), x, OURS, training, **about.compile) if sites.fused else (plain, plain_beside)
    return Row(
        name, rectifier, str(x.dtype).removeprefix("torch."), mode, len(sites.fused), len(sites), about.chain,
        (ours.kernels, plain.kernels), (ours.bytes, plain.bytes), (ours.peak, plain.peak), (beside, plain_beside),
    )  # fmt: skip


def rows(names: Iterable[str], rectifiers: Iterable[str], dtypes: Iterable[str], modes: Iterable[str]) -> Iterable[Row]:
    for name, dtype, mode in itertools.product(list(names), list(dtypes), list(modes)):
        about = BLOCKS.get(name) or Block(functools.partial(_whole, MODELS[name]), MODELS[name].shape)
        x = torch.randn(about.shape, device="cuda", dtype=getattr(torch, dtype)).to(memory_format=about.memory_format)
        for rectifier in rectifiers if name in BLOCKS else ["its own"]:
            if rectifier == about.without:
                continue
            yield compare(name, x, mode, rectifier, about)


def _whole(model: Model, _: nn.Module) -> nn.Module:
    return model.build()


def load(path: Path = RESULTS) -> list[Row]:
    """The recorded rows."""
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return [Row(**row | {key: tuple(row[key]) for key in ("kernels", "bytes", "peak", "beside")}) for row in found]


def record(new: list[Row], path: Path = RESULTS) -> None:
    """``new`` beside what is recorded, in place of rows of the same case."""

    def case(row: Row) -> tuple[str, ...]:
        return row.name, row.rectifier, row.dtype, row.mode

    kept = {case(row): row for row in (load(path) if path.exists() else [])} | {case(row): row for row in new}
    lines = ",\n ".join(json.dumps(asdict(kept[key])) for key in sorted(kept))
    files.replace_text(path, f"[{lines}]\n")


def table(rows: list[Row]) -> str:
    """The training steps of ``rows`` in Markdown: bytes in bfloat16 / float32, kernels in bfloat16, of plain's."""
    found = {(row.name, row.rectifier, row.dtype): row for row in rows if row.mode == "training"}

    def cell(name: str, rectifier: str) -> str:
        of = [found.get((name, rectifier, dtype)) for dtype in DTYPES]
        bytes_ = " / ".join("-" if row is None else f"{row.ratio:.2f}" for row in of)
        return bytes_ if of[0] is None else f"{bytes_}, {of[0].kernels[0]} of {of[0].kernels[1]}"

    lines = ["| | ReLU | Leaky ReLU | PReLU | RReLU |", "|---|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(cell(name, r) for r in RECTIFIERS) + " |" for name in BLOCKS]
    models = [f"{name} {cell(name, 'its own')}" for name in MODELS if (name, "its own", DTYPES[0]) in found]
    return "\n".join(lines) + "\n\nModels of others: " + ";\n".join(models) + ".\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-rect-counting", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join([*BLOCKS, *MODELS])}; default: all")
    parser.add_argument("--rectifier", nargs="+", choices=RECTIFIERS, default=list(RECTIFIERS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--mode", nargs="+", choices=("training", "inference"), default=["training", "inference"])
    parser.add_argument("--table", action="store_true", help="print what is recorded as the documents' table, and stop")
    parser.add_argument("--record", action="store_true", help=f"write the rows to {RESULTS.name}")
    chosen = parser.parse_args(arguments)
    if chosen.table:
        print(table(load()), end="")
        return 0
    if "softcuda" not in sys.modules:
        return _on_the_soft_device(sys.argv[1:] if arguments is None else arguments)
    found: list[Row] = []
    for row in rows(chosen.names or [*BLOCKS, *MODELS], chosen.rectifier, chosen.dtype, chosen.mode):
        print(row, flush=True)
        found.append(row)
        if chosen.record:
            record([row])
    print(f"{len(found)} cases, {sum(bool(row.worse) for row in found)} of them worse than plain torch.compile")
    return int(any(row.worse for row in found))


def _on_the_soft_device(arguments: list[str]) -> int:
    """The same in a process of its own: the device has to be there before torch looks for one."""
    if importlib.util.find_spec("softcuda") is None:
        print("counting needs the package softcuda on PYTHONPATH; nothing was counted.", file=sys.stderr)
        return 2
    program = (
        "import softcuda; softcuda.install(90); from fused_rect.perf import counting; raise SystemExit(counting.main())"
    )
    return subprocess.run([sys.executable, "-W", "ignore", "-c", program, *arguments], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())

"""`make gpu-check`: what only a GPU can show, in one command, as one JSON and one Markdown file in perf/results/.

The Triton kernels against the eager path on the CPU, the tests that reach them, times against eager torch and
torch.compile, RReLU's training step captured in a CUDA graph, and compute-sanitizer where it is installed. A step that
raises is reported as failed and the others still run. Without a GPU: says so and exits with 2.

    python -m fused_rect.perf.gpu_check [--results FOLDER] [--only STEP ...]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fused_rect as fr
from fused_rect import files, rules
from fused_rect.backends import eager
from fused_rect.environment import machine
from fused_rect.rules import Need, Parameters, Rule

from .profiling import cases, cli, records
from .profiling.peers import FUSED
from .profiling.report import print_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
DTYPES = ("float32", "bfloat16", "float16")
# Rules, and whether they learn one slope for all channels. Slopes of either sign.
RULES = (
    *((Rule.default(name), False) for name in rules.RULES),
    *((Rule.default(name), True) for name, row in rules.RULES.items() if row.slope == "learned"),
    *((rule, False) for rule in (rules.leaky_relu(-0.5), rules.rrelu(-0.5, 0.5, "slope"))),
)
# Planes of whole vectors, of parts, and smaller than a vector; one row of tiles and several; ragged last vectors.
SHAPES = (
    *((2, 3, 5, 7), (5, 7, 13, 11), (40, 12, 5, 3), (24, 5, 6, 6), (12, 3, 24, 9)),
    *((6, 24, 16, 16), (3, 2, 64, 33), (4, 51, 29, 31), (33, 10)),
)
Report = dict[str, Any]


# ---- the kernels against the eager path ----


def agreement(
    device: str, shapes: Sequence[tuple[int, ...]] = SHAPES, dtypes: Sequence[str] = (*DTYPES, "float64")
) -> Report:
    """Forward, grad_input and the sums of the fused kernels on ``device``, in place, against eager on the CPU."""
    rows = [
        _differences(*case, device=device)
        for case in product(RULES, dtypes, ("contiguous", "channels_last"), shapes)
        if case[2] == "contiguous" or len(case[3]) == 4
    ]
    worst = {key: max(row[key] for row in rows) for key in ("forward", "grad_input", "sums")}
    wrong = [row for row in rows if max(row["forward"], row["grad_input"], row["sums"]) > 1]
    return {"ok": not wrong, "cases": len(rows), "worst, in tolerances": worst, "wrong": wrong}


def _differences(
    rule_and_shared: tuple[Rule, bool], dtype: str, layout: str, shape: tuple[int, ...], device: str
) -> Report:
    """The largest differences over what is allowed: two roundings of the dtype, and for sums those of adding."""
    rule, shared = rule_and_shared
    number = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator, device="cpu").to(number) for _ in range(2))
    bias, weight = (torch.randn(shape[1], generator=generator, device="cpu").to(number) for _ in range(2))
    x[-1] = -bias.view(-1, *[1] * (x.dim() - 2))  # z = 0 in the last example; NaN and infinities in the first
    corner = (0,) * (x.dim() - 2)
    for channel, value in ((0, float("nan")), (shape[1] // 2, float("-inf")), (-1, float("inf"))):
        x[(0, channel, *corner)] = value
    if layout == "channels_last":
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    weight = weight[:1] if shared else weight
    given = [x, g, bias, weight, torch.tensor([-1234567890123456789])]

    def call(module: Any, where: str) -> list[Tensor]:
        x, grad, bias, weight, seed = (t.to(where, copy=True) for t in given)
        parameters = Parameters(bias, weight if rule.learned else None, seed)
        out, bits = x.clone(), torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=where)
        module.forward(out, parameters, rule, out, bits)
        kept = x if rule.keeps_input else bits
        if not rule.keeps_input:
            parameters = parameters._replace(bias=None)
        sums = module.backward(grad, kept, parameters, rule, grad, Need(number, rule.learned))
        return [t.cpu() for t in (bits, out, grad, *sums) if t is not None]

    with fr.backend("triton"):
        fused = call(fr.backends.resolve(torch.device(device).type), device)
    expected = call(eager, "cpu")
    accumulated = 16 * torch.finfo(torch.promote_types(number, torch.float32)).eps
    counts = [0, 0, x.numel() // shape[1], x.numel() // weight.numel()]
    step = torch.finfo(number).eps
    bits_differ = not torch.equal(fused.pop(0), expected.pop(0))
    over = [
        _over(a.double(), b.double(), 2 * step * b.double().abs() + step**2 + accumulated * count**0.5)
        for a, b, count in zip(fused, expected, counts)
    ]
    names = {
        "rule": f"{rule.name} {rule.lower:.3g} {rule.upper:.3g}{', shared' if shared else ''}",
        "dtype": dtype,
        "layout": layout,
        "shape": list(shape),
    }
    return {**names, "forward": float("inf") if bits_differ else over[0], "grad_input": over[1], "sums": max(over[2:])}


def _over(a: Tensor, b: Tensor, allowed: Tensor) -> float:
    """The largest difference, in what is allowed; NaN where the other has none is infinitely wrong."""
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs() / allowed).nan_to_num(nan=float("inf")).max())


# ---- the tests ----


def suite() -> Report:
    """The tests that reach Triton kernels, with the kernels compiled for the GPU and tensors on it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "ptx", "tests"]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "FUSED_RECT_BACKEND": "triton"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    return {"ok": done.returncode == 0, "summary": lines[-1:], "failed": [s for s in lines if s.startswith("FAILED")]}


# ---- times ----


def profile(*arguments: str) -> Report:
    """`fused-rect profile` of bias and rectifier with ``arguments``: its report, and its records."""
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    fixed = ["--part", "epilogue", "--mode", "inference", "training", "--processes", "3", "--budget", "600"]
    options = parser.parse_args([*fixed, *arguments])
    text = io.StringIO()
    frame = cli.measured(cases.asked(options), options, Console(quiet=True))
    print_report(frame, Console(file=text, width=130, **cli.PLAIN))
    missing = frame[(frame.peer == FUSED) & (frame.absent != "")]
    return {"ok": missing.empty, "report": text.getvalue(), "records": records.plain(frame)}


# ---- CUDA graphs ----

Capture = Callable[[Callable[[], None]], Callable[[], None]]


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` captured after warm-up on a side stream; the function returned replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def replays(device: str, capture: Capture = cuda_graph) -> Report:
    """A training step of convolution and RReLU, captured once and replayed: what each replay must do again.

    Every replay has to draw other slopes, use the same ones in forward and backward, and move the weights.
    """
    conv = nn.Conv2d(3, 8, 3, padding=1).to(device)
    assert conv.bias is not None
    bias = conv.bias
    optimizer = torch.optim.SGD(conv.parameters(), lr=1e-3)
    x = torch.randn(4, 3, 16, 16, device=device)
    y, z, slope = (torch.zeros(4, 8, 16, 16, device=device) for _ in range(3))

    def step() -> None:
        raw = F.conv2d(x, conv.weight, None, padding=1)
        out = fr.functional.bias_rrelu(raw, bias, training=True)
        slope.copy_(torch.autograd.grad(out.sum(), raw, retain_graph=True)[0])
        y.copy_(out.detach())
        z.copy_(raw.detach() + bias.detach().view(-1, 1, 1))
        conv.weight.grad, bias.grad = torch.autograd.grad(out.square().mean(), (conv.weight, bias))
        optimizer.step()

    replay = capture(step)
    slopes, weights, agree = [], [conv.weight.detach().clone()], []
    for _ in range(3):
        replay()
        slopes.append(slope.clone())
        weights.append(conv.weight.detach().clone())
        agree.append(torch.allclose(y, z * slope, rtol=1e-5, atol=1e-6))
    negative = [(a < 1) & (b < 1) for a, b in pairwise(slopes)]
    outcome = {
        "other slopes each replay": all(
            float((a != b)[both].float().mean()) > 0.99 for (a, b), both in zip(pairwise(slopes), negative)
        ),
        "same slopes in backward": all(agree),
        "weights move each replay": not any(torch.equal(a, b) for a, b in pairwise(weights)),
    }
    return {"ok": all(outcome.values()), **outcome}


# ---- compute-sanitizer ----


def sanitizer() -> Report:
    """`agreement` on small shapes under memcheck, racecheck and initcheck."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": None, "why": "compute-sanitizer is not on the PATH"}
    code = "from fused_rect.perf.gpu_check import agreement as a; assert a('cuda', [(2, 3, 5, 7), (2, 24, 9, 8)])['ok']"
    found = {}
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", code]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else the allocator's blocks hide overruns
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        found[check] = {"exit status": done.returncode, "summary": done.stdout.strip().splitlines()[-1:]}
    return {"ok": all(check["exit status"] == 0 for check in found.values()), **found}


# ---- the report ----

STEPS: dict[str, Callable[[], Report]] = {
    "agreement": lambda: agreement("cuda"),
    "tests": suite,
    "profile": lambda: profile("--workload", "gpu", "--device", "cuda", "--dtype", *DTYPES, "--compile"),
    "CUDA graph": lambda: replays("cuda"),
    "compute-sanitizer": sanitizer,
}


def check(steps: dict[str, Callable[[], Report]]) -> Report:
    """Each step's outcome; one that raises has failed, with what it raised."""
    report: Report = {}
    for name, step in steps.items():
        start = time.monotonic()
        try:
            report[name] = step()
        except Exception as error:
            report[name] = {"ok": False, "raised": f"{type(error).__name__}: {error}"}
        report[name]["seconds"] = round(time.monotonic() - start, 1)
        print(f"{name}: {_verdict(report[name])} ({report[name]['seconds']} s)", flush=True)
    return report


def _verdict(step: Report) -> str:
    return {True: "ok", False: "FAILED", None: "not run"}[step["ok"]]


def markdown(where: Report, report: Report) -> str:
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in where.items()), ""]
    lines += ["| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {_verdict(step)} | {step['seconds']} |" for name, step in report.items()]
    for name, step in report.items():
        lines += ["", f"## {name}", ""]
        told = {key: value for key, value in step.items() if key not in ("ok", "seconds", "records", "report")}
        lines += [f"- {key}: {value}" for key, value in told.items()]
        lines += ["```", step["report"], "```"] if "report" in step else []
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA GPU and torch {torch.__version__} sees none; nothing was run.", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)
    where = machine("cuda")
    report = check({name: STEPS[name] for name in options.only})
    name = f"gpu-check-{where['target']}-{time.strftime('%Y-%m-%d')}"
    content = json.dumps({"machine": where, "steps": report}, indent=1) + "\n"
    for kind, text in (("json", content), ("md", markdown(where, report))):
        files.replace_text(options.results / f"{name}.{kind}", text)
    print(f"{options.results / name}.json and .md")
    return int(any(step["ok"] is False for step in report.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""`make fuzz`: random cases, each path against the eager path, the float64 specification, or torch's own autograd.

    python tests/fuzz.py [native|triton|autograd ...] [--seed 0] [--first 0] [--count N]

native    the C++ kernels, called through the ops in Python and through those in C++: outputs, bits, gradients, sums
triton    the same of the Triton kernels, in Triton's interpreter; tests/test_fuzz.py on whatever they are run on
autograd  programs of fused calls and tensor operations, in place and not, on views, under no_grad, and what is asked
          of them (backward, twice, double backward, forward mode, vmap, checkpoints), against the same programs of
          the differentiable specification: values, gradients, and who raises

Case n of a seed is the same wherever it is run: a wrong one ends with its number, and --first n --count 1 repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # tests choose by themselves how kernels run, before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from rectifying import LAYOUTS, assert_near, dense, specification
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_rect as fr
from fused_rect import ops, reference
from fused_rect.rules import RULES, Parameters, Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Around zero, at the ends of float32, bfloat16 and float16, and where float16 rounds to infinity or to subnormals.
EDGES = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38, 65504.0, 65520.0, -65519.9, 6e-8, -2e-7)


class Wrong(AssertionError):
    """A case whose results are not those that they should be."""


def must(right: Any, *what: Any) -> None:
    if not right:
        raise Wrong(" ".join(map(str, what)))


def a_rule(rng: random.Random) -> Rule:
    """Any row of the table, with bounds of any sign where it has some."""
    name = rng.choice(list(RULES))
    if name == "leaky_relu":
        slope = rng.choice([0.0, -0.0, 1.0, -1.0, 1e-30, rng.uniform(-2, 2), rng.uniform(0, 0.3)])
        return Rule(name, slope, slope)
    if name == "rrelu":
        lower, upper = sorted(rng.uniform(-1, 1) for _ in range(2))
        return Rule(name, lower, rng.choice([lower, upper]))
    if name == "rrelu_divisor":
        lower, upper = sorted(rng.uniform(0.5, 9) for _ in range(2))
        return Rule(name, lower, upper)
    return Rule.default(name)


def a_shape(rng: random.Random, most: int) -> list[int]:
    """One to five sizes of at most ``most`` elements; now and then some that are none."""
    if rng.random() < 0.02:
        return [rng.choice([0, 3]), rng.randint(1, 4), 0]
    shape, left = [], most
    for _ in range(rng.choice([1, 2, 2, 3, 4, 4, 4, 5])):
        size = rng.choice([1, 2, 3, rng.randint(1, 9), rng.randint(1, 70), rng.randint(1, 2100)])
        shape.append(max(1, min(size, left)))
        left //= shape[-1]
    return shape


def parameters_of(rng: random.Random, rule: Rule, channels: int, dims: int, dtype: torch.dtype) -> Parameters:
    mine = rng.choice([dtype, torch.float32]) if dtype.itemsize == 2 else dtype
    bias = torch.randn(channels).to(mine) if dims > 1 and rng.random() < 0.7 else None
    weight = torch.randn(rng.choice([1, channels])).to(mine) if rule.learned else None
    return Parameters(bias, weight, torch.tensor([rng.randrange(-(2**63), 2**63)]) if rule.random else None)


# ---- values: a path against the specification


def values(path: str, most: int) -> Callable[[random.Random], None]:
    def case(rng: random.Random) -> None:
        shape, dtype, rule = a_shape(rng, most), rng.choice(DTYPES), a_rule(rng)
        edges = rng.random() < 0.3
        z, grad = (torch.randn(shape).to(dtype) for _ in range(2))
        if edges and z.numel():
            for _ in range(rng.randint(1, 9)):
                z.view(-1)[rng.randrange(z.numel())] = rng.choice(EDGES)
        if len(shape) > 1:
            z, grad = (LAYOUTS[rng.choice(list(LAYOUTS))](t) for t in (z, grad))
        parameters = parameters_of(rng, rule, shape[1] if len(shape) > 1 else 1, len(shape), dtype)
        threads = torch.get_num_threads()
        torch.set_num_threads(rng.choice([1, 2, 3]))
        try:
            with fr.backend(path):
                compare(rng, z, grad, parameters, rule, edges, path)
        finally:
            torch.set_num_threads(threads)

    return case


def compare(
    rng: random.Random, z: Tensor, grad: Tensor, parameters: Parameters, rule: Rule, edges: bool, path: str
) -> None:
    dtypes = [None if p is None else (p.dtype, len(p)) for p in parameters]
    said = f"{tuple(z.shape)} {z.stride()} {z.dtype} {rule} {dtypes}"
    arguments = (*parameters, *rule)
    y = ops.rectify(z, *arguments)
    same = close(rule) if path == "triton" or (z.dtype == torch.float64 and rule.random) else identical
    laid = torch.empty_like(y).copy_(z)
    shifted = reference.add_bias(laid, parameters.bias)
    with fr.backend("eager"):
        must(same(y, ops.rectify(z, *arguments), shifted), "output", said)
    marked, bits = ops.rectify_bits(z, *arguments)
    must(identical(marked, y), "output beside bits", said)
    must(torch.equal(bits, reference.pack_bits(reference.is_negative(shifted, rule))), "bits", said)
    for op in (ops.rectify_, ops.rectify_bits_):
        written = torch.empty_strided(z.shape, z.stride(), dtype=z.dtype).copy_(z)
        op(written, *arguments)
        must(identical(written, y) or rule.random, "in place", said)
    with torch.autocast(z.device.type):  # where dtypes may differ
        through = ops.run(z, parameters, rule)  # by the ops in C++ where they serve
    must(identical(through, y), "by the shortest way", said)
    gradients(rng, z, laid, grad, parameters, rule, edges, bits, same, said)


def gradients(
    rng: random.Random, z: Tensor, laid: Tensor, grad: Tensor, parameters: Parameters, rule: Rule, edges: bool,
    bits: Tensor, same: Callable[[Tensor, Tensor, Tensor], bool], said: str,
) -> None:  # fmt: skip
    near = close(rule)
    wanted = rng.choice([None, z.dtype if parameters.bias is None else parameters.bias.dtype])
    for kept in (laid,) if rule.learned else (bits, laid):
        given = parameters if kept is laid else parameters._replace(bias=None)
        arguments = (
            grad.contiguous() if kept is laid else torch.empty_like(laid).copy_(grad),
            kept,
            *given,
            *rule,
            wanted,
        )
        got = ops.rectify_backward(*arguments, rule.learned)
        with fr.backend("eager"):
            expected = ops.rectify_backward(*arguments, rule.learned)
        must(same(got[0], expected[0], arguments[0]), "gradient, kept", kept.dtype, said)
        must(got[1].shape == expected[1].shape and got[2].shape == expected[2].shape, "sums' shapes", said)
        if edges or not z.numel():
            continue
        y, exact, _, of_weight = specification(z, *parameters, *rule, grad)
        if same is identical:
            with torch.autocast(z.device.type):
                assert_near(ops.run(z, parameters, rule), y, z.dtype)
            assert_near(got[0], exact, z.dtype)
        must(near(got[0], exact, grad), "gradient and the specification's", said)
        wide = torch.promote_types(torch.float32, z.dtype)
        if wanted is not None:
            others = [d for d in range(z.dim()) if d != 1 or z.dim() < 2]
            assert_sum(got[1], exact.sum(others).view(-1), exact.abs().sum(others).view(-1), wide, said)
        if rule.learned:
            assert_sum(got[2], of_weight, (grad.double() * z.double()).abs().sum() + 1, wide, said)


def assert_sum(got: Tensor, exact: Tensor, size: Tensor, wide: torch.dtype, said: str) -> None:
    """Within the rounding of ``wide`` relative to the magnitude of the terms, and one rounding of its own."""
    own = torch.finfo(got.dtype)
    near = 8 * torch.finfo(wide).eps * size + own.eps * exact.abs().clamp_min(own.smallest_normal)
    overflows = exact.abs() >= 0.99 * own.max
    must((((got.double() - exact).abs() <= near) | overflows).all(), "sum", got, exact, said)


def identical(a: Tensor, b: Tensor, _: Tensor | None = None) -> bool:
    """Equal as numbers, in the signs of zeros and in where NaN is (whose payload is nobody's)."""
    nan = a.isnan()
    numbers = torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0)) and torch.equal(nan, b.isnan())
    return numbers and torch.equal(a.signbit() & ~nan, b.signbit() & ~nan)


def close(rule: Rule) -> Callable[[Tensor, Tensor, Tensor], bool]:
    """Within a few units in the last place, of the slope at its bounds too: a drawn one may be next to 0."""
    bound = 1.0 if rule.slope == "drawn divisor" else max(abs(rule.lower), abs(rule.upper))

    def near(a: Tensor, b: Tensor, factor: Tensor) -> bool:
        a, b, factor, limits = a.double(), b.double(), factor.double(), torch.finfo(a.dtype)
        tolerance = 4 * limits.eps * (b.abs() + bound * factor.abs()) + limits.smallest_normal
        return bool(((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= tolerance)).all())

    return near


# ---- autograd: programs

Step = tuple[str, int, Any]
SHAPE = (3, 4, 5)


def a_program(rng: random.Random) -> list[Step]:
    """Steps (what, on which value, with what); the values are the leaf and what each step gives."""
    steps: list[Step] = [("mul", 0, 1.0)]  # not the leaf itself, which no one may change in place
    for _ in range(rng.randint(1, 6)):
        kind = rng.choice(
            ["rectify"] * 4 + ["rectify_"] * 3 + ["mul", "mul_", "add", "view", "part", "exp", "detach", "no grad"]
        )
        on = rng.randrange(len(steps) + 1) if kind in ("rectify", "mul", "add") else rng.randrange(1, len(steps) + 1)
        if kind.startswith("rectify") or kind == "no grad":
            rule = a_rule(rng)
            steps.append((kind, on, (rule, rng.random() < 0.7, rng.choice([1, SHAPE[1]]), rng.randrange(2**63))))
        else:
            steps.append((kind, on, rng.uniform(-2, 2)))
    return steps


def run(program: list[Step], leaves: dict[str, Tensor], fused: bool) -> Tensor:
    made = [leaves["x"]]
    for kind, on, argument in program:
        value = made[on]
        if kind == "no grad":
            with torch.no_grad():
                made.append(rectified(value, argument, leaves, fused, False))
        elif kind.startswith("rectify"):
            made.append(rectified(value, argument, leaves, fused, kind == "rectify_"))
        elif kind == "mul":
            made.append(value * argument)
        elif kind == "mul_":
            made.append(value.mul_(argument))
        elif kind == "add":
            made.append(value + made[-1] * argument)
        elif kind == "view":
            made.append(value.transpose(0, 2).transpose(0, 2))
        elif kind == "part":
            value[:, 1:3].mul_(argument)
            made.append(value)
        elif kind == "exp":
            made.append((value * 0.1).exp())
        else:
            made.append(value.detach() * argument)
    return sum((value * (0.3 + 0.1 * i) for i, value in enumerate(made) if i), torch.zeros_like(made[0]))


def rectified(value: Tensor, argument: Any, leaves: dict[str, Tensor], fused: bool, in_place: bool) -> Tensor:
    rule, has_bias, slopes, seed = argument
    weight = leaves[f"weight{slopes}"] if rule.learned else None
    parameters = Parameters(leaves["bias"] if has_bias else None, weight, torch.tensor([seed]) if rule.random else None)
    if fused:
        if in_place:
            ops.run_(value, parameters, rule)
        return value if in_place else ops.run(value, parameters, rule)
    drawn = reference.slopes(parameters.seed, dense(value.detach()), rule) if rule.random else None
    y = reference.rectify(value.clone() if in_place else value, parameters, rule, drawn)
    return value.copy_(y) if in_place else y


def asked(rng: random.Random) -> str:
    return rng.choice(["backward", "twice", "double", "jvp", "vmap", "checkpoint"])


def answers(program: list[Step], question: str, seed: int, fused: bool) -> list[Tensor]:
    """What the program answers, all in float64: outputs and gradients of every leaf."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {
        name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for name, shape in {"x": SHAPE, "bias": SHAPE[1:2], "weight1": (1,), f"weight{SHAPE[1]}": SHAPE[1:2]}.items()
    }
    tangents = {
        name: torch.randn(leaf.shape, dtype=torch.float64, generator=generator) for name, leaf in leaves.items()
    }
    if question == "jvp":
        leaves = {name: leaf.detach() for name, leaf in leaves.items()}
        return list(
            torch.func.jvp(
                lambda *of: run(program, dict(zip(leaves, of)), fused), tuple(leaves.values()), tuple(tangents.values())
            )
        )
    if question == "vmap":
        rest = {name: leaf.detach() for name, leaf in leaves.items() if name != "x"}
        some = torch.randn((2, *SHAPE), dtype=torch.float64, generator=generator)
        function = torch.func.grad(lambda x: (run(program, {"x": x, **rest}, fused) ** 2).sum())
        return [torch.func.vmap(function)(some)]
    if question == "checkpoint":
        y = checkpoint(lambda x: run(program, {**leaves, "x": x}, fused), leaves["x"], use_reentrant=False)
    else:
        y = run(program, leaves, fused)
    everyone = list(leaves.values())
    if question == "double":
        first = torch.autograd.grad((y * tangents["x"]).sum(), everyone, create_graph=True, allow_unused=True)
        total = sum((g.pow(2).sum() for g in first if g is not None), y.sum() * 0)
        second = torch.autograd.grad(total, everyone, allow_unused=True, materialize_grads=True)
        return [y.detach(), *(torch.zeros(()) if g is None else g.detach() for g in first), *second]
    for _ in range(2 if question == "twice" else 1):
        (y * tangents["x"]).sum().backward(retain_graph=True)
    return [y.detach(), *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in everyone)]


def autograd(rng: random.Random) -> None:
    program, question, seed = a_program(rng), asked(rng), rng.randrange(2**63)
    if question == "vmap":  # a batch draws other slopes than one example does
        program = [step for step in program if not (isinstance(step[2], tuple) and step[2][0].random)]
        program = [(kind, min(on, i), argument) for i, (kind, on, argument) in enumerate(program)]
    said = f"{question}: {program}"
    path = rng.choice(["native", "eager"])

    def outcome(question: str, fused: bool) -> Any:
        with fr.backend(path if fused else "eager"):
            try:
                return answers(program, question, seed, fused)
            except RuntimeError as error:
                return error

    plain, ours = outcome(question, False), outcome(question, True)
    if question == "checkpoint":
        # Checkpoints don't look at versions: what is overwritten, and would raise, is silently another value.
        plain = outcome("backward", False)
        if isinstance(plain, RuntimeError) or isinstance(outcome("backward", True), RuntimeError):
            return
    if isinstance(ours, RuntimeError):
        learned = any(isinstance(argument, tuple) and argument[0].learned for _, _, argument in program)
        # The input is kept for learned slopes and under transforms, as the table says.
        kept = (learned or question == "vmap") and "modified by an inplace operation" in str(ours)
        must(isinstance(plain, RuntimeError) or kept, "raises", ours, said)
    elif not isinstance(plain, RuntimeError):  # where the specification raises, we may keep less than it does
        for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
            must(torch.allclose(a, b, 1e-9, 1e-9, equal_nan=True), "answer", i, said, a, b)


# ---- the command

KINDS: dict[str, tuple[Callable[[random.Random], None], int]] = {  # kind -> a case, and how many take about 20 s
    "native": (values("native", 40_000), 300),
    "triton": (values("triton", 400), 80),
    "autograd": (autograd, 2000),
}


def fuzz(kind: str, seed: int, first: int, count: int) -> None:
    """Raises Wrong with the number of the first case that is."""
    case, _ = KINDS[kind]
    for number in range(first, first + count):
        rng = random.Random(f"{kind} {seed} {number}")
        torch.manual_seed(rng.randrange(2**63))
        try:
            case(rng)
        except Exception as error:
            repeat = f"python tests/fuzz.py {kind} --seed {seed} --first {number} --count 1"
            raise Wrong(f"{repeat}\n{type(error).__name__}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"of {', '.join(KINDS)}; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, help="cases of each kind; by default about 20 s of each")
    options = parser.parse_args(arguments)
    wrong = 0
    for kind in options.kinds or KINDS:
        if kind not in KINDS:
            parser.error(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        start, count = time.monotonic(), KINDS[kind][1] if options.count is None else options.count
        verdict = "0 wrong"
        with contextlib.suppress(Wrong):
            try:
                fuzz(kind, options.seed, options.first, count)
            except Wrong as error:
                wrong += 1
                verdict = f"WRONG\n{error}"
                raise
        print(f"{kind}, seed {options.seed}: {count} cases, {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

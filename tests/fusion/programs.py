"""Forwards that Hypothesis writes: source text around maps and rectifiers in every spelling."""

import sys
import types
from itertools import count

from hypothesis import strategies as st

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from parts import *


class Net(Parts):
    def forward(self, x, flag=False):
        self.calls += 1
        y = z = x
"""

MAPS = [f"self.{m}" for m in ("conv", "wide", "up", "bare", "scaled", "called", "remembering", "wrapped", "line")]
MAPS += ["self.convs[0]", "self.convs[-1]"]
MAPS += ["F.conv2d", "self.pick", "self.wrapped_helper", "getattr(self, 'conv')"]
RECTIFIERS = [f"self.{m}" for m in ["relu", "over", "leaky", "minus", "prelu", "each", "cur", "acts[1]", "acts[2]"]]
RECTIFIERS += ["F.relu", "torch.relu", "torch.relu_", "outside", "(lambda v: F.leaky_relu(v, self.slope))"]
OTHERS = [
    "self.bn",
    "self.drop",
    "self.same",
    "self.helper",
    "self.row",
    "self.steps",
    "Twice.apply",
    "Same.apply",
    "torch.sigmoid",
]
METHODS = [
    "relu()",
    "relu_()",
    "clone()",
    "contiguous()",
    "detach()",
    "abs()",
    "to(torch.float64)",
    "add_(0.5)",
    "mul_(-1)",
]
METHODS += ["flip(-1)", "transpose(2, 3)", "requires_grad_()", "view(v.shape)", "__getitem__(slice(None))"]
# In place, torch cannot differentiate negative slopes.
SLOPES = ["self.slope", "0", "-0.5", "True", "float(len(self.kept))"]
BETWEEN = [
    "",
    "",
    "w = x.sum()",
    "self.kept.append({0})",
    "{0} = self.same({0})",
    "n, c, h, w = {0}.shape",
    "if flag: {0} = {0} + 1",
    "{0} = self.bn({0})",
    "{0} = self.bn({0})",
    "assert {0}.dim() == 4 and len({0})",
    "self.seen = {0}",
    "q = {0}",
    "{0} = Twice.apply({0})",
    "{0} = self.drop({0})",
]
CURRENT = ["self.relu", "self.leaky", "self.minus", "nn.Identity()", "self.over"]
name = st.sampled_from("xyz")


@st.composite
def expression(draw, depth=2):
    if depth == 0:
        return draw(name)
    inner = draw(expression(depth - 1))
    kind = draw(st.integers(0, 13))
    if kind <= 3:
        return call(draw(st.sampled_from(MAPS)), inner)
    if kind <= 7:
        return call(draw(st.sampled_from(RECTIFIERS)), inner)
    if kind == 8:
        return call(draw(st.sampled_from(OTHERS)), inner)
    if kind == 9:
        method = draw(st.sampled_from(METHODS))
        return f"(lambda v: v.{method})({inner})"
    if kind == 10:
        slope, over = draw(st.sampled_from(SLOPES)), draw(st.booleans())
        return f"F.leaky_relu({inner}, negative_slope={f'abs({slope})' if over else slope}, inplace={over})"
    if kind == 11:
        other = draw(expression(depth - 1))
        form = draw(
            st.sampled_from(
                ["{} + {}", "torch.maximum({}, {})", "torch.cat([{}, {}], 1)[:, :3]", "torch.stack([{}, {}]).mean(0)"]
            )
        )
        return f"({form.format(inner, other)})"
    if kind == 12:
        slope = draw(
            st.sampled_from(["self.prelu.weight", "self.each.weight", "x.new_tensor(0.3)", "self.each.weight.abs()"])
        )
        return f"F.prelu({inner}, {slope})"
    return f"F.leaky_relu({inner} * (s := 0.5), s)"


def call(function, inner):
    return f"F.conv2d({inner}, self.conv.weight, self.conv.bias)" if function == "F.conv2d" else f"{function}({inner})"


@st.composite
def block(draw, indent, depth):
    lines = []
    for _ in range(draw(st.integers(1, 4 if depth == 2 else 2))):
        lines += draw(statement(indent, depth))
    return lines


@st.composite
def statement(draw, indent, depth):
    pad = "    " * indent
    target, source = draw(name), draw(name)
    kind = draw(st.integers(0, 24 if depth else 13))
    if kind <= 4:
        return [f"{pad}{target} = {draw(expression())}"]
    if kind <= 8:
        first = call(draw(st.sampled_from(MAPS)), source)
        second = draw(st.sampled_from(RECTIFIERS))
        between = draw(st.sampled_from(BETWEEN))
        return [
            f"{pad}{target} = {first}",
            *([pad + between.format(target)] if between else []),
            f"{pad}{target} = {second}({target})",
        ]
    if kind == 9:
        return [f"{pad}self.kept.append({draw(expression(1))})"]
    if kind == 10:
        return [f"{pad}self.cur = {draw(st.sampled_from(CURRENT))}"]
    if kind == 11:
        return [f"{pad}self.slope = {draw(st.sampled_from(['0.7', '-0.2', 'self.slope / 2']))}"]
    if kind == 12:
        return [
            f"{pad}{target} = {source}"
            if draw(st.booleans())
            else f"{pad}{target} = {source} + torch.rand_like({source})"
        ]
    if kind == 13:
        return [f"{pad}if (w := {draw(expression(1))}).sum() > 0: {target} = w"]
    body = draw(block(indent + 1, depth - 1))
    if kind == 14:
        other = draw(block(indent + 1, depth - 1))
        test = draw(
            st.sampled_from(["flag", "self.training", "self.calls % 2", "x.mean() > 0", "self.cur is self.relu"])
        )
        return [f"{pad}if {test}:", *body, f"{pad}else:", *other]
    if kind == 15:
        return [f"{pad}for i in range({draw(st.integers(0, 2))}):", *body]
    if kind == 16:
        return [f"{pad}for layer in self.body:", f"{pad}    {target} = layer({target})"]
    if kind == 17:
        return [
            f"{pad}for f, g in zip(self.convs, self.acts):",
            f"{pad}    {target} = f({target})",
            *body,
            f"{pad}    {target} = g({target})",
        ]
    if kind == 18:
        wrong = draw(st.sampled_from(["", "raise ValueError('x')", "y.no_such", "self.conv(y[:, :2])"]))
        after = draw(block(indent + 1, depth - 1))
        tail = draw(
            st.sampled_from([[f"{pad}except ValueError:"], [f"{pad}except Exception as error:"], [f"{pad}finally:"]])
        )
        return [f"{pad}try:", *body, *([f"{pad}    {wrong}"] if wrong else []), *tail, *after]
    if kind == 19:
        mode = draw(st.sampled_from(["torch.no_grad()", "torch.enable_grad()", "torch.autocast('cpu', enabled=False)"]))
        return [f"{pad}with {mode}:", *body]
    if kind == 20:
        result = draw(expression(2))
        return [f"{pad}def inner(y):", f"{pad}    return {result}", f"{pad}{target} = inner({source})"]
    if kind == 21:
        return [
            f"{pad}for v in self.lazily({source}):",
            f"{pad}    {target} = {target} + {draw(st.sampled_from(RECTIFIERS))}(v)",
        ]
    if kind == 22:
        return [f"{pad}{target} = checkpoint(self.helper, {source}, use_reentrant={draw(st.booleans())})"]
    if kind == 23:
        return [
            f"{pad}if {draw(st.sampled_from(['flag', 'self.calls == 2', 'len(self.kept) > 3']))}:",
            f"{pad}    return {draw(expression(1))}",
        ]
    return [f"{pad}{target} = {{'a': [{draw(expression(1))}]}}['a'].pop()"]


@st.composite
def forwards(draw):
    """The body of a forward."""
    lines = draw(block(2, 2))
    last = draw(st.sampled_from(["x", "y + z", "(x, [y, {'z': z}])", "self.conv(y)", "self.relu(self.conv(z))"]))
    return "\n".join(lines) + f"\n        return {last}\n"


_numbers = count()


def imported(body):
    """The class `Net` with that body of its forward, in a module that pickle finds."""
    module = types.ModuleType(f"written_{next(_numbers)}")
    sys.modules[module.__name__] = module
    exec(HEAD + body, module.__dict__)
    return module.Net

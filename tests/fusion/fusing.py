"""What the tests of fuse share: models, and a count of the fused calls that run."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket._qualified_op_name.split("::")[-1]] += 1
        return func(*args, **(kwargs or {}))


def fused_calls(model, *inputs):
    with Ops() as ops, torch.no_grad():
        model(*inputs)
    return ops.count["rectify_"] + ops.count["rectify"]


class Attributes(nn.Module):
    """One shared rectifier, nested calls, statements, functional spellings, a loop and a branch."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.rest = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.lrelu = nn.LeakyReLU(0.2, inplace=True)
        self.prelu = nn.PReLU(4)

    def forward(self, x, scale: float = 2.0, *, twice=True):
        x = self.lrelu(self.first(x))
        x = self.second(x)
        x = self.prelu(x)
        for conv in self.rest:
            x = F.leaky_relu(conv(x), 0.3, inplace=True)
        if self.training and twice:
            x = x * scale
        x = self.rest[0](x)
        return self.lrelu(x)


def sequential(rectifier=None):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), rectifier or nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.PReLU()
    )


def value_and_gradients(model, x):
    model.zero_grad()
    y = model(x)
    (gx,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    y.square().sum().backward()
    return y, gx, [p.grad.clone() for p in model.parameters()]


def assert_same(model, x, expected, tolerance=1e-12):
    y, gx, grads = value_and_gradients(model, x)
    for a, b in zip((y, gx, *grads), (expected[0], expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def image(*shape):
    return torch.randn(shape or (2, 3, 6, 6), dtype=torch.float64, requires_grad=True)

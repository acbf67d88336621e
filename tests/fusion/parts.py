"""What the forwards that Hypothesis writes are made of: maps, rectifiers and whatever reads a tensor oddly."""

import torch
import torch.nn.functional as F
from torch import nn


class Twice(torch.autograd.Function):
    """Reads its input below torch's functions."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 + ctx.saved_tensors[0] * 0


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Scaled(nn.Conv2d):
    def forward(self, v):
        return F.conv2d(v, self.weight * 0.5, self.bias)


class Called(nn.Conv2d):
    def __call__(self, v):
        return super().__call__(v) * 2


class Remembering(nn.Conv2d):
    last = None

    def forward(self, v):
        self.last = super().forward(v)
        return self.last


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, v):
        return self.inner(v)


class Steps(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


def outside(v, f=F.relu):
    return f(v)


def doubled(method):
    def call(self, v):
        return method(self, v) * 2

    return call


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.wide = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(3, 3, 1)
        self.bare = nn.Conv2d(3, 3, 1, bias=False)
        self.scaled, self.called = Scaled(3, 3, 1), Called(3, 3, 1)
        self.remembering, self.wrapped = Remembering(3, 3, 1), Wrapped()
        self.line = nn.Linear(4, 4)
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1), self.conv, nn.Conv2d(3, 3, 1)])
        self.relu, self.over, self.leaky = nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2)
        self.minus, self.prelu, self.each = nn.LeakyReLU(-0.3), nn.PReLU(), nn.PReLU(3)
        self.acts = nn.ModuleList([self.relu, nn.LeakyReLU(0.1, inplace=True), self.prelu])
        self.bn, self.drop, self.same = nn.BatchNorm2d(3), nn.Dropout(0.3), nn.Identity()
        tail = nn.BatchNorm2d(3), nn.LeakyReLU(0.1)
        self.row = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), *tail)
        self.steps = Steps(nn.Tanh(), nn.ReLU(), nn.Conv2d(3, 3, 1))
        self.body = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.PReLU(3)])
        self.cur, self.slope, self.calls, self.kept = self.leaky, 0.3, 0, []
        for p in self.parameters():
            nn.init.normal_(p, std=0.6)

    def helper(self, v):
        return self.relu(self.conv(v))

    def lazily(self, v):
        yield self.conv(v)
        yield self.cur(v)

    def pick(self, v):
        self.cur = self.acts[self.calls % 3]
        return self.conv(v)

    @doubled
    def wrapped_helper(self, v):
        return self.up(v)

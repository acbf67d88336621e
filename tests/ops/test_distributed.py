"""DDP, FSDP2 and DTensor on two gloo processes give the numbers of one process."""

import copy
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fused_rect as fr

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
RANKS = 2


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        fr.nn.ConvReLU2d(3, 4, 3),
        fr.nn.ConvLeakyReLU2d(4, 4, 1, negative_slope=0.2),
        fr.nn.ConvPReLU2d(4, 4, 1, num_parameters=4),
    ).double()


def batch():
    torch.manual_seed(1)
    return torch.randn(4, 3, 6, 6, dtype=torch.float64)


def expected_gradients():
    plain = model()
    plain(batch()).square().mean().backward()
    return [p.grad for p in plain.parameters()]


def _close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def _ddp(rank):
    wrapped = nn.parallel.DistributedDataParallel(model())
    wrapped(batch().chunk(RANKS)[rank]).square().mean().backward()
    for p, expected in zip(wrapped.parameters(), expected_gradients(), strict=True):
        _close(p.grad, expected)


def _ddp_rrelu(rank):
    x = batch()
    torch.manual_seed(10 + rank)
    layer = nn.parallel.DistributedDataParallel(fr.nn.ConvRReLU2d(3, 4, 1).double())
    y = layer(x)
    z = layer.module[0](x)
    y.sum().backward()
    slopes = [torch.empty_like(y) for _ in range(RANKS)]
    dist.all_gather(slopes, (y / z).detach())
    assert not torch.equal(*slopes), "each rank draws its own slopes"
    _close(layer.module[0].bias.grad, torch.stack(slopes).sum((1, 3, 4)).mean(0))


def _penalized(critic, x, with_loss):
    """R1 (Mescheder et al. 2018), alone or beside the critic's loss, as WGAN-GP has it (Gulrajani et al. 2017)."""
    x = x.clone().requires_grad_()
    score = critic(x)
    (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean() + (score.mean() if with_loss else 0)


def _gradient_penalties(rank):
    """DDP refuses parameters without a gradient: where torch's pair has zeros, ours must have zeros."""
    for rectifier in ("ReLU", "LeakyReLU", "PReLU"):
        for with_loss in (False, True):
            torch.manual_seed(0)
            plain = nn.Sequential(
                nn.Conv2d(3, 4, 3), getattr(nn, rectifier)(), nn.Conv2d(4, 4, 1), getattr(nn, rectifier)()
            )
            fused = nn.Sequential(*(getattr(fr.nn, f"Conv{rectifier}2d")(*args) for args in ((3, 4, 3), (4, 4, 1))))
            models = []
            for pairs in (plain, fused, fr.fuse(copy.deepcopy(plain))):
                pairs.load_state_dict(dict(zip(pairs.state_dict(), plain.state_dict().values())))
                body = nn.Sequential(pairs, nn.Flatten(), nn.AvgPool1d(64)).double()
                models.append(nn.parallel.DistributedDataParallel(body))
            for wrapped in models:
                for _ in range(2):  # the second forward is where DDP complains of a parameter left out
                    wrapped.zero_grad(set_to_none=True)
                    _penalized(wrapped, batch().chunk(RANKS)[rank], with_loss).backward()
            expected, *others = ([p.grad for p in m.parameters()] for m in models)
            for got in others:
                for a, b in zip(got, expected, strict=True):
                    assert (a is None) == (b is None)
                    if b is not None:
                        _close(a, b)


def _fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(batch().chunk(RANKS)[rank]).square().mean().backward()
    for p, expected in zip(sharded.parameters(), expected_gradients(), strict=True):
        _close(p.grad.full_tensor(), expected)


def _dtensor(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import fused_rect.sharding  # noqa: F401

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(2)
    z, grad = (torch.randn(4, 6, 5, dtype=torch.float64) for _ in range(2))
    bias, slopes, slope = (torch.rand(n, dtype=torch.float64) for n in (6, 6, 1))
    functions = {
        "relu": lambda z, b, w: fr.functional.bias_relu(z, b),
        "leaky": lambda z, b, w: fr.functional.bias_leaky_relu(z, b, 0.2),
        "prelu": fr.functional.bias_prelu,
    }
    for function in functions.values():
        for weight in (slopes, slope):
            for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
                _check_dtensor(function, (z, bias, weight), grad, mesh, placement, Replicate(), distribute_tensor)
            if weight is slopes:
                _check_dtensor(function, (z, bias, weight), grad, mesh, Shard(1), Shard(0), distribute_tensor)

    seed = torch.tensor([5])
    expected = fr.functional.bias_rrelu(z, training=True, seed=seed)
    for placement in (Shard(0), Shard(1), Replicate()):
        spread, everywhere = distribute_tensor(z, mesh, [placement]), distribute_tensor(seed, mesh, [Replicate()])
        _close(fr.functional.bias_rrelu(spread, training=True, seed=everywhere).full_tensor(), expected)


def _check_dtensor(function, tensors, grad, mesh, placement, parameters, distribute):
    plain = [t.clone().requires_grad_() for t in tensors]
    y = function(*plain)
    y.backward(grad)
    spread = [distribute(t, mesh, [p]).requires_grad_() for t, p in zip(tensors, (placement, parameters, parameters))]
    out = function(*spread)
    assert out.placements == (placement,), "no gathering for what needs none"
    out.backward(distribute(grad, mesh, [placement]))
    _close(out.full_tensor(), y)
    for ours, theirs in zip(spread, plain, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            _close(ours.grad.full_tensor(), theirs.grad)


CASES = {
    "DDP": _ddp,
    "DDP rrelu": _ddp_rrelu,
    "DDP penalties": _gradient_penalties,
    "FSDP2": _fsdp2,
    "DTensor": _dtensor,
}


def _rank(rank, case, store):
    torch.set_num_threads(1)
    store = dist.FileStore(store, RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        CASES[case](rank)
        # Gloo aborts a rank whose peer leaves first, even inside its last barrier; the file has no such haste.
        store.add("done", 1)
        while store.add("done", 0) < RANKS:
            time.sleep(0.01)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_on_two_processes(case, tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_rank, (case, str(tmp_path / "store")), nprocs=RANKS)

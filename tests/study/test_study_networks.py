"""The networks' sizes and shapes, fused against plain layers, and weights that all variants of a seed share."""

import dataclasses

import pytest
import torch
from torch import nn

from fused_rect.study import networks, protocol, training
from fused_rect.study.protocol import NIN_CIFAR10, PUBLIC, SMALL, Protocol
from fused_rect.study.variants import VARIANTS, DivisorRReLU, Layers

NARROW = dataclasses.replace(NIN_CIFAR10, width=1 / 16)
SHAPES = {"nin": (1, 32), "ndsb": (1, 70), "inception": (3, 28)}


def model(variant="relu", fused=True, **settings):
    settings = {"network": "nin", "width": 1 / 16, "dropout": 0.0, **settings}
    p = dataclasses.replace(NIN_CIFAR10, epilogue="fused" if fused else "eager", **settings)
    return training.new_model(p, variant, 0, SHAPES[p.network][0], 10)


def images(network="nin", n=2):
    channels, side = SHAPES[network]
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1))


def size(m):
    return sum(p.numel() for p in m.parameters())


@pytest.mark.parametrize("classes, parameters", [(10, 966_986), (100, 984_356)])
def test_nin_is_the_papers(classes, parameters):
    nin = networks.build("nin", Layers(VARIANTS["relu"]), 3, classes, 1.0, 0.5)
    assert size(nin) == parameters
    macs, sides = [], []

    def note(m, _, out):
        macs.append(m.weight.numel() * out.shape[-1] * out.shape[-2])
        sides.append(out.shape[-1])

    for _, m in networks.maps(nin):
        # The fused layers call the convolution's function, not the module, so its shape is read from the pair.
        parent = next(x for x in nin.modules() if isinstance(x, nn.Sequential) and len(x) == 2 and x[0] is m)
        parent.register_forward_hook(lambda s, i, out, m=m: note(m, i, out))
    with torch.no_grad():
        assert nin.eval()(torch.randn(1, 3, 32, 32)).shape == (1, classes)
    assert sides == [32] * 3 + [16] * 3 + [8] * 3, "pooling rounds up: 32, 16, 8"
    if classes == 10:
        assert round(sum(macs) / 1e6, 1) == 222.5
    assert [m.p for m in nin.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_prelu_has_one_slope_a_channel_from_a_quarter():
    nin = networks.build("nin", Layers(VARIANTS["prelu"]), 3, 10, 1.0, 0.5)
    slopes = [m.weight for m in nin.modules() if isinstance(m, nn.PReLU)]
    assert [len(s) for s in slopes] == [192, 160, 96, 192, 192, 192, 192, 192, 10]
    assert all((s == 0.25).all() for s in slopes)


@pytest.mark.parametrize("network", networks.NETWORKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_and_plain_layers_agree(network, variant):
    fused, plain = (model(variant, f, network=network) for f in (True, False))
    assert list(fused.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    x = images(network)
    for mode in (False,) if variant == "rrelu" else (False, True):
        a, b = fused.train(mode)(x), plain.train(mode)(x)
        assert a.shape == (2, 10) and a.std() > 0
        torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * float(q.grad.abs().max()), msg=name)


@pytest.mark.parametrize("law", ["divisor", "slope"])
@pytest.mark.parametrize("fused", [True, False])
def test_rrelu_draws_by_its_law_and_evaluates_at_the_midpoint(law, fused):
    activation = Layers(VARIANTS["rrelu"], fused, law).activation(1)
    z = -torch.ones(1, 1, 200, 200)
    torch.manual_seed(0)
    drawn = -activation.train()(z)
    assert drawn.min() >= 1 / 8 - 1e-6 and drawn.max() <= 1 / 3 + 1e-6
    mean, sd = (0.1962, 0.056) if law == "divisor" else (0.2292, 0.060)
    assert abs(drawn.mean() - mean) < 1e-3 and abs(drawn.std() - sd) < 1e-3
    torch.testing.assert_close(-activation.eval()(z), torch.full_like(z, 1 / 5.5 if law == "divisor" else 11 / 48))


def test_plain_divisor_rrelu_has_the_gradient_of_its_slopes():
    z = torch.randn(100, requires_grad=True)
    y = DivisorRReLU()(z)
    y.sum().backward()
    torch.testing.assert_close(z.grad, (y / z).detach())


def test_scores_without_a_rectifier_keep_the_weights():
    whole = model("prelu")
    bare = training.new_model(dataclasses.replace(NARROW, rectified_scores=False), "prelu", 0, 1, 10)
    assert set(whole.state_dict()) - set(bare.state_dict()) == {"classifier.1.weight"}
    assert torch.equal(whole.classifier[0].weight, bare.classifier[0].weight)
    assert (bare(images()) < 0).any() and (model("relu")(images()) >= 0).all()


def test_leaky_slopes():
    assert VARIANTS["leaky100"].negative_slope == 1 / 100
    assert VARIANTS["leaky5.5"].negative_slope == pytest.approx(2 / 11)


def test_all_variants_of_a_seed_start_from_the_same_weights():
    first = dict(networks.maps(model("relu")))
    for variant in VARIANTS:
        for name, m in networks.maps(model(variant)):
            assert torch.equal(m.weight, first[name].weight) and not m.bias.any()
    other = training.new_model(NARROW, "relu", 1, 1, 10)
    assert not torch.equal(dict(networks.maps(other))["classifier.0"].weight, first["classifier.0"].weight)


@pytest.mark.parametrize("init, std", [("0.05", 0.05), ("he", (2 / 2400) ** 0.5)])
def test_initial_weights(init, std):
    nin = networks.build("nin", Layers(VARIANTS["relu"]), 3, 10, 1.0, 0.5)
    networks.initialize(nin, 0, init)
    weight = dict(networks.maps(nin))["features.5.0"].weight.detach()  # 5 x 5 over 96 channels
    assert weight.std() == pytest.approx(std, rel=0.01) and abs(weight.mean()) < std / 100


def test_solver_groups():
    nin = model("prelu")
    found = training.groups(nin, NIN_CIFAR10)
    where = {id(p): (g["factor"], g["weight_decay"]) for g in found for p in g["params"]}
    named = {name: where[id(p)] for name, p in nin.named_parameters()}
    assert len(where) == len(named), "every parameter in one group"
    assert named["features.0.0.weight"] == (1.0, 1e-4)
    assert named["features.0.0.bias"] == (2.0, 0.0)
    assert named["features.0.1.weight"] == (1.0, 0.0), "PReLU's slopes have no weight decay"
    assert named["classifier.0.weight"] == (0.1, 1e-4) and named["classifier.0.bias"] == (0.1, 0.0)


def test_the_learning_rate_drops_at_100k_of_120k():
    assert [NIN_CIFAR10.lr_at(step, 120_000) for step in (0, 99_999, 100_000)] == pytest.approx([0.1, 0.1, 0.01])
    inception = PUBLIC["inception"]
    assert [inception.lr_at(s, 460) for s in (389, 390)] == pytest.approx([0.05, 0.01])


def test_public_settings():
    assert protocol.deviations(NIN_CIFAR10) == []
    assert protocol.deviations(PUBLIC["inception"]) == []
    cifar100 = protocol.public("nin", "cifar-100")
    assert (cifar100.lr, cifar100.weight_decay) == (0.01, 1e-3) and protocol.deviations(cifar100) == []


def test_every_departure_is_reported():
    lines = protocol.deviations(dataclasses.replace(SMALL, data="digits"))
    changed = {f.name for f in dataclasses.fields(Protocol) if getattr(SMALL, f.name) != getattr(NIN_CIFAR10, f.name)}
    assert {line.split(":")[0].replace(" ", "_") for line in lines} == changed | {"data"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"network": "resnet"}, "resnet"),
        ({"lr": 0.0}, "lr"),
        ({"dropout": 1.0}, "dropout"),
        ({"iterations": 0}, "epochs"),
        ({"split": "validation"}, "validation_images"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NIN_CIFAR10, **settings)


def test_plankton_network_names_the_size_it_takes():
    with pytest.raises(ValueError, match=r"70 x 70.*--image 70"):
        model(network="ndsb")(torch.randn(1, 1, 64, 64))

"""A fused model beside what else is done to models: other tensors, other classes, compilers, checkpoints, shards."""

import copy
import dataclasses
import functools
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from fusing import Attributes, fused_calls, sequential
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fused_rect as fr
from fused_rect import fusion
from fused_rect.fusion import holders


def jagged():
    return torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)


def nested():
    return torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])


@pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning", "ignore:.*Sparse.*:UserWarning")
@pytest.mark.parametrize(
    ("layers", "make"),
    [
        ((nn.Linear(4, 3), nn.ReLU()), jagged),
        ((nn.Linear(4, 3), nn.ReLU()), nested),
        ((nn.Linear(4, 3), nn.ReLU()), lambda: torch.eye(4).to_sparse_csr()),
        ((nn.Conv2d(4, 3, 1), nn.ReLU()), lambda: torch.randn(1, 4, 5, 5).to_mkldnn()),
        ((nn.Conv2d(4, 3, 1), nn.ReLU()), lambda: torch.randn(4, 5, 5)),
        ((nn.Conv2d(4, 3, 1), nn.ReLU()), lambda: torch.randn(0, 4, 5, 5)),
        (
            (nn.Conv2d(4, 3, 1), nn.LeakyReLU(0.1)),
            lambda: torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last),
        ),
        ((nn.Linear(4, 3, dtype=torch.complex64), nn.Tanh()), lambda: torch.randn(2, 4, dtype=torch.complex64)),
        ((nn.Linear(4, 3), nn.ReLU()), lambda: torch.randn(4, device="meta")),
    ],
    ids=["jagged", "nested", "csr", "mkldnn", "unbatched", "empty", "channels_last", "complex", "meta"],
)
def test_tensors_that_torch_takes(layers, make):
    model, x = nn.Sequential(*copy.deepcopy(layers)), make()
    if x.layout is torch._mkldnn:
        for name, parameter in list(model[0].named_parameters()):
            setattr(model[0], name, nn.Parameter(parameter.detach().to_mkldnn(), requires_grad=False))
    model = model.to(x.device)
    fused = fr.fuse(nn.Sequential(*model))
    with torch.no_grad():
        for _ in range(2):
            a, b = fused(x), model(x)
            assert (type(a), a.dtype, a.layout, a.device) == (type(b), b.dtype, b.layout, b.device)
    if x.device.type != "meta" and x.layout is torch.strided and not x.is_nested:
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("features", [(0, 3), (3, 0)])
def test_linear_maps_without_features(features):
    model, x = nn.Sequential(nn.Linear(*features), nn.ReLU()), torch.randn(2, features[0], requires_grad=True)
    expected = model(x)
    torch.testing.assert_close(fr.fuse(model)(x), expected)
    model(x).sum().backward()


# ---- classes ----


class Slotted(nn.Module):
    __slots__ = ("extra",)

    def __init_subclass__(cls, *, needed, **kwargs):
        super().__init_subclass__(**kwargs)


@dataclasses.dataclass
class Act:
    slope: float = 0.2

    def __call__(self, x):
        return F.leaky_relu(x, self.slope)


class Derived(Slotted, needed=True):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.g = nn.Conv2d(3, 3, 1), Act(), nn.Parameter(torch.ones(1))

    @property
    def ready(self):
        raise RuntimeError("call setup() first")

    def __reduce_ex__(self, protocol):
        raise TypeError("not to be copied")

    def forward(self, x):
        return self.act(self.conv(x)) * self.g


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_classes_that_cannot_be_derived_from_and_parametrizations_made_between():
    model, x = Derived(), torch.randn(1, 3, 4, 4)
    y = model(x)
    fr.fuse(model)
    assert fused_calls(model, x) == 1 and len(fusion.report(model)) == 1
    torch.testing.assert_close(model(x), y)
    nn.utils.parametrize.register_parametrization(model.conv, "weight", Double())
    assert fused_calls(model, x) == 1
    expected = model(x)
    torch.testing.assert_close(fr.unfuse(model)(x), expected)
    assert nn.utils.parametrize.is_parametrized(model.conv) and fused_calls(model, x) == 0


class Scaled(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class Half(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 0.5


class Reversed(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


def test_overridden_calls_iteration_and_methods():
    conv = functools.partial(nn.Conv2d, 3, 3, 1)
    patched = nn.Sequential(conv(), nn.ReLU())
    patched[0]._conv_forward = lambda x, weight, bias: x
    x, rest = torch.randn(1, 3, 4, 4), (conv(), nn.ReLU())
    for model in (
        nn.Sequential(Scaled(3, 3, 1), nn.ReLU()),
        nn.Sequential(nn.Tanh(), Half(conv(), nn.ReLU()), *rest),
        Reversed(nn.ReLU(), conv(), nn.ReLU(), nn.Tanh()),
        patched,
    ):
        expected, before = model(x), x.clone()
        torch.testing.assert_close(fr.fuse(model)(x), expected)
        torch.testing.assert_close(model(x), expected)
        assert torch.equal(x, before)


def test_shallow_copies_run_their_own_parameters():
    """As DataParallel's replicas are made."""
    model, x = fr.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), torch.randn(1, 3, 4, 4)
    replica = model._replicate_for_data_parallel()
    conv = model[0]._replicate_for_data_parallel()
    conv._former_parameters = {}
    conv.weight, conv.bias = torch.zeros(3, 3, 1, 1), torch.ones(3)
    replica._modules["0"] = conv
    assert fused_calls(replica, x) == 1 and torch.equal(replica(x), torch.ones(1, 3, 4, 4))


def test_a_wrapped_forward_as_accelerate_makes_it():
    model, x = fr.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), torch.randn(1, 3, 4, 4)
    old = model[0].forward
    model[0].forward = lambda x: old(x + 1)
    expected = F.relu(old(x + 1))
    torch.testing.assert_close(model(x), expected)
    assert fused_calls(model, x) == 1
    torch.testing.assert_close(fr.unfuse(model)(x), expected)


# ---- who reads ----


class Kept(nn.Module):
    """Whoever holds an output keeps its values, and what leaves the model is an ordinary tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x, how):
        z = self.conv(x)
        if how == "attribute":
            self.kept = z
            z = self.act(z)
            return z, self.kept
        if how == "list":
            kept = [z]
            z = self.act(kept[0])
            return z, kept[0]
        if how == "view":
            kept = z[:, 1:]
            z = self.act(z)
            return z, kept
        if how == "closure":
            return self.act(z), (lambda: z)()
        if how == "unread":
            return z, {"z": [z]}["z"][0]
        if how == "no_grad":
            with torch.no_grad():
                z = self.act(z)
            return z, z
        z = self.act(z)
        return z, z


@pytest.mark.parametrize("how", ["attribute", "list", "view", "closure", "unread", "no_grad", "over"])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_that_somebody_holds(how, training):
    model, x = Kept(), torch.randn(2, 3, 4, 4)
    plain = copy.deepcopy(model)
    fr.fuse(model)
    for _ in range(5):
        with torch.set_grad_enabled(training):
            got, expected = model(x, how), plain(x, how)
        for a, b in zip(got, expected):
            assert type(a) is torch.Tensor and a.requires_grad == b.requires_grad and not vars(a)
            torch.testing.assert_close(a, b)


READERS = {
    "second": lambda x, z: x + z,
    "both": lambda x, z: z * z,
    "reversed": lambda x, z: 2 - z,
    "in a list": lambda x, z: torch.cat([x, z]),
    "in a dictionary": lambda x, z: checkpoint(lambda d: d["z"] * 2, {"z": z}, use_reentrant=False),
    "by name": lambda x, z: torch.add(input=x, other=z),
    "in a list by name": lambda x, z: torch.stack(tensors=[z, x]),
    "between": lambda x, z: torch.where(x > 0, z, x),
    "written into": lambda x, z: z + 0 if torch.is_grad_enabled() else torch.mul(x, 2, out=z),
    "as an index": lambda x, z: x[z > 0],
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("grad", [True, False])
def test_whoever_reads_an_output_reads_an_ordinary_tensor(reader, grad):
    """Wherever it stands among the arguments, and a rectifier that comes later is not the first."""
    conv, x = nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            z = self.conv(x)
            y = reader(x, z)
            return type(y), type(z), y, F.relu(z)

    with torch.set_grad_enabled(grad):
        expected = Model()(x)
        for _ in range(2):
            got = fr.fuse(Model())(x)
            assert got[:2] == expected[:2] == (torch.Tensor, torch.Tensor)
            torch.testing.assert_close(got[2:], expected[2:])
    fr.unfuse(conv)


class Statements(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.LeakyReLU(0.1)

    def forward(self, x, same):
        x = self.conv(x)
        before = id(x)
        x = self.act(x)
        same.append(id(x) == before)
        x = self.conv(x)
        before = id(x)
        x = F.leaky_relu(x, 0.2)
        same.append(id(x) == before)
        x = self.conv(x)
        before = id(x)
        x = F.leaky_relu(x, negative_slope=0.2)
        same.append(id(x) == before)
        z = self.conv(x)
        y = self.act(z)
        same.append(y is z)
        x = self.conv(x)
        kept = [x]
        x = self.act(x)
        same.append(x is kept[0])
        return y + z


@pytest.mark.parametrize("grad", [True, False])
def test_a_rectifier_that_reads_last_writes_over_the_output(grad):
    """The object is the same where memory is; what another variable, container or hook holds keeps its values."""
    same, x = [], torch.randn(2, 3, 6, 6)
    model = fr.fuse(Statements())
    with torch.set_grad_enabled(grad):
        model(x, same)
    assert same == [True, True, True, False, False]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())
    seen = []
    fr.fuse(model)
    model[2].register_forward_pre_hook(lambda m, args: seen.append(args[0].data_ptr()))
    model[0].register_forward_hook(lambda m, args, output: seen.append(output.data_ptr()))
    with torch.set_grad_enabled(grad):
        model(x)
    assert seen[0] != seen[1]


LAYOUTS = {
    "a part": lambda z: z[..., ::2],
    "transposed": lambda z: z.transpose(2, 3),
    "permuted": lambda z: z.permute(1, 3, 0, 2),
    "expanded": lambda z: z[:, :1].expand_as(z),
    "channels last": lambda z: z.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_map_that_returns_another_layout_has_eagers_strides(lay, inplace, grad):
    class Laid(nn.Conv2d):
        def forward(self, x):
            return lay(super().forward(x))

    model, x = nn.Sequential(Laid(3, 3, 1), nn.LeakyReLU(0.2, inplace)), torch.randn(2, 3, 4, 6)
    results = []
    for run in (copy.deepcopy(model), fr.fuse(model)):
        with torch.set_grad_enabled(grad):
            try:
                y = run(x)
                results.append((y.stride(), y))
            except RuntimeError as error:
                assert inplace and "more than one element" in str(error)
                results.append((str(error), x))
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][0] == results[1][0]
    if not inplace:  # ours would copy what does not lie densely
        assert fused_calls(model, x) == (lay is LAYOUTS["channels last"])


@pytest.mark.parametrize(
    "mapping, shape",
    [(nn.Conv2d(3, 3, 1), (3, 4, 4)), (nn.Linear(4, 4), (2, 3, 4)), (nn.ConvTranspose2d(3, 3, 1), (3, 4, 4))],
)
def test_an_output_that_is_a_view_is_not_written_over(mapping, shape):
    """Autograd would follow its base: a node more, and a result that is a view."""
    x = torch.randn(shape)
    assert mapping(x)._base is not None
    assert fr.fuse(nn.Sequential(mapping, nn.LeakyReLU()))(x)._base is None


@pytest.mark.parametrize("grad", [True, False])
def test_prelu_writes_over_the_output_where_no_backward_reads_it(grad):
    """In place in training, it would copy what its backward reads: a pass more, and no memory less."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 1), nn.PReLU()

        def forward(self, x):
            x = self.conv(x)
            before = x.data_ptr()
            x = self.act(x)
            return x, x.data_ptr() == before

    model = fr.fuse(Model())
    with torch.set_grad_enabled(grad):
        y, same = model(torch.randn(2, 3, 4, 4))
    assert same is not grad and fusion.report(model)[0].fused and y.requires_grad is grad


def keeps(method):
    """``method`` of a map, and another tensor over the memory of what it returns."""

    def call(self, *args):
        kept = method(self, *args)
        self.kept = kept.clone(), kept
        return kept.data

    return call


class Forward(nn.Conv2d):
    forward = keeps(nn.Conv2d.forward)


class Convolved(nn.Conv2d):
    _conv_forward = keeps(nn.Conv2d._conv_forward)


class Mapped(nn.Linear):
    forward = keeps(nn.Linear.forward)


def of_an_instance(name):
    conv = nn.Conv2d(3, 4, 1)
    setattr(conv, name, types.MethodType(keeps(getattr(nn.Conv2d, name)), conv))
    return conv


MAPS = {
    "forward": lambda: Forward(3, 4, 1),
    "_conv_forward": lambda: Convolved(3, 4, 1),
    "linear": lambda: Mapped(5, 4),
    "an instance's forward": lambda: of_an_instance("forward"),
    "an instance's _conv_forward": lambda: of_an_instance("_conv_forward"),
}


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
@torch.no_grad()
def test_memory_that_a_map_keeps_is_not_written_over(make):
    model = fr.fuse(nn.Sequential(make(), nn.ReLU()))
    for _ in range(3):
        y = model(torch.randn(2, 3, 5, 5))
        before, kept = model[0].kept
        assert (kept < 0).any() and torch.equal(kept, before) and torch.equal(y, before.relu())
        assert fusion.report(model)[0].fused


GLOBAL = torch.nn.modules.module


@pytest.mark.parametrize("rectifier", [nn.ReLU(), F.relu, nn.PReLU()])
@pytest.mark.parametrize("measured", [False, True])
@torch.no_grad()
def test_hooks_of_all_modules_see_the_models_own_calls_and_keep_what_they_keep(rectifier, measured, monkeypatch):
    monkeypatch.setattr(holders, "_measured", {})
    model, x, seen, kept = fr.fuse(Held()), torch.randn(2, 3, 4, 4), [], []

    if measured:
        model(x, 1, F.relu)

    def keep(module, args, output):
        seen.append(module)
        if isinstance(output, torch.Tensor):
            kept.append((output.detach(), output.clone()))

    handles = [
        GLOBAL.register_module_forward_hook(keep),
        GLOBAL.register_module_forward_pre_hook(lambda module, args: seen.append(module)),
    ]
    try:
        for _ in range(3):
            model(x, 1, lambda z: rectifier(model.conv(x)))
    finally:
        for handle in handles:
            handle.remove()
    assert {*seen} == {model, model.conv, *([rectifier] if isinstance(rectifier, nn.Module) else [])}
    assert len(kept) >= 6 and all(torch.equal(one, copied) for one, copied in kept)


class Held(nn.Module):
    """So many beside the call hold the output that it reads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, several, rectifier):
        self.kept = [self.conv(x)] * several
        return rectifier(self.kept[0])


READING = (nn.ReLU(), nn.PReLU(), F.relu, functools.partial(F.leaky_relu, negative_slope=0.2), torch.relu)


def values_are_kept(model, x):
    for rectifier in READING:
        for several in range(1, 6):
            expected = rectifier(F.conv2d(x, model.conv.weight, model.conv.bias))
            torch.testing.assert_close(model(x, several, rectifier), expected)
            assert (model.kept[0] < 0).any()


def in_compiled_code_of_another_thread(call):
    """``call()`` while another thread runs what Dynamo compiled; its frame evaluator is that of all threads then."""
    inside, done = threading.Event(), threading.Event()

    @torch.compile(backend="eager")
    def compiled(x):
        inside.set()
        done.wait()
        return x + 1

    thread = threading.Thread(target=compiled, args=(torch.ones(2),))
    thread.start()
    try:
        assert inside.wait(60)
        call()
    finally:
        done.set()
        thread.join()


def looked_at(call):
    """``call()`` under a debugger that keeps each frame's variables."""

    def trace(frame, event, argument):
        assert frame.f_locals is not None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("unusual", [in_compiled_code_of_another_thread, looked_at])
@pytest.mark.parametrize("measured", ["then", "before"])
@torch.no_grad()
def test_what_else_adds_references_lets_nothing_be_written_over(unusual, measured, monkeypatch):
    """Neither while it does nor afterwards, whenever the references of a call are counted first."""
    monkeypatch.setattr(holders, "_measured", {})
    model, x = fr.fuse(Held()), torch.randn(2, 3, 4, 4)
    if measured == "before":
        values_are_kept(model, x)
    unusual(lambda: values_are_kept(model, x))
    values_are_kept(model, x)
    test_a_rectifier_that_reads_last_writes_over_the_output(False)


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 + 0 * ctx.saved_tensors[0]


class Below(nn.Module):
    """A reader that no torch function announces, in the one call or the other."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, below):
        z = self.conv(x)
        return F.relu(Through.apply(z) if below else z)


@pytest.mark.parametrize("order", [(True, False, False, True), (False, True, True, False)])
def test_autograd_functions_read_true_values_and_lose_no_gradient(order):
    model = Below().double()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    fr.fuse(model)
    for below in order:
        results = []
        for m in (model, plain):
            m.zero_grad()
            y = m(x, below)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in m.parameters())])
        torch.testing.assert_close(*results)


# ---- compilers, checkpoints, shards ----


class Regional(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.LeakyReLU(0.1)
        self.block = torch.compile(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), backend="aot_eager", **options)
        self.function = torch.compile(
            lambda x: F.conv2d(F.relu(x), x.new_ones(3, 3, 1, 1)), backend="aot_eager", **options
        )

    def forward(self, x):
        x = self.block(self.conv(x))
        x = self.act(self.conv(x))
        return self.function(self.conv(x))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_parts_see_ordinary_tensors_and_compile_no_more_than_before(fullgraph):
    torch._dynamo.reset()
    model, x = Regional(fullgraph=fullgraph), torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(x)
    torch._dynamo.reset()
    fr.fuse(model)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(model(x), expected)


def exports_strictly(model, x):
    """With a hook, whatever it does: torch 2.9 does not, and says so in several ways."""
    model.register_forward_hook(lambda module, args, output: None)
    try:
        torch.export.export(model, (x,), strict=True)
    except Exception:
        return False
    return True


def test_export_and_function_transforms_see_torchs_own_operations():
    model, x = Attributes().eval(), torch.randn(2, 3, 6, 6)
    expected, strict_too = model(x), exports_strictly(copy.deepcopy(model), x)
    fr.fuse(model)(x)
    for strict in (False, True) if strict_too else (False,):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), expected)
        assert "fused_rect" not in str(program.graph)
    parameters = dict(model.named_parameters())
    call = functools.partial(torch.func.functional_call, model, parameters)
    torch.testing.assert_close(torch.func.vmap(lambda i: call((i[None],))[0])(x), expected)


@pytest.mark.parametrize("inplace", [True, False])
def test_selective_checkpoints_keep_what_convolutions_returned(inplace):
    convolution = torch.ops.aten.convolution.default
    must, prefer = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    contexts = functools.partial(
        create_selective_checkpoint_contexts, lambda ctx, op, *_, **__: must if op is convolution else prefer
    )
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2, inplace=inplace), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def gradients(model):
        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum()
        return torch.autograd.grad(y, [x, *model.parameters()])

    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(gradients(fr.fuse(model)), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_run_the_same_twice(reentrant):
    model, x = fr.fuse(nn.Sequential(sequential(), nn.Conv2d(4, 3, 1), Attributes())), torch.randn(1, 3, 5, 5)
    x.requires_grad_()
    for _ in range(5):
        expected = torch.autograd.grad(model(x).sum(), x)
        y = checkpoint(model, x, use_reentrant=reentrant).sum()
        y.backward() if reentrant else None
        got = (x.grad,) if reentrant else torch.autograd.grad(y, x)
        torch.testing.assert_close(got, expected)
        x.grad = None


@pytest.fixture
def group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_after_or_before_fusing(group):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    x = torch.randn(1, 3, 8, 8)
    for first in ("fuse", "shard"):
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
        expected = model(x)
        for step in (first, *({"fuse", "shard"} - {first})):
            fr.fuse(model) if step == "fuse" else fully_shard(model, mesh=mesh)
        torch.testing.assert_close(model(x), expected)
        model(x).sum().backward()
        model[:1]
        assert hasattr(fr.unfuse(model), "unshard")
        torch.testing.assert_close(model(x), expected)

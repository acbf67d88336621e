"""What the package takes from torch's private side is there, means what it is used for, and stands in one file."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_structure import PACKAGE, sources

from fused_rect import internals

# Inductor's, which compile/ imports when it is used: importing them takes seconds.
OF_INDUCTOR = {
    "torch._inductor": ["list_mode_options"],
    "torch._inductor.compile_fx": ["compile_fx"],
    "torch._inductor.lowering": ["make_fallback"],
    "torch._inductor.graph": ["GraphLowering"],
    "torch._inductor.ir": ["ExternKernel"],
    "torch._inductor.custom_graph_pass": ["CustomGraphPass"],
}
PRIVATE = re.compile(r"\btorch\.(?:\w+\.)*_\w+")
# Public whatever their names: operators, versions; Dynamo's graphs name functions by _C._nn; Inductor's are above.
ELSEWHERE = ("torch.ops.", "torch.__version__", "torch._C._nn", "torch._inductor", "torch._dynamo")


def test_private_names_stand_in_one_file():
    files = [f for f in sources() if "perf" not in f.parts and "study" not in f.parts and f.name != "internals.py"]
    found = [(str(f.relative_to(PACKAGE)), name) for f in files for name in PRIVATE.findall(f.read_text())]
    found = [(file, name) for file, name in found if not name.startswith(ELSEWHERE)]
    assert len(files) > 20 and found == []


@pytest.mark.parametrize("module", OF_INDUCTOR)
def test_inductors_names_are_there(module):
    imported = __import__(module, fromlist=OF_INDUCTOR[module])
    assert [name for name in OF_INDUCTOR[module] if not hasattr(imported, name)] == []


def test_transforms_and_forward_mode_are_noticed():
    seen = []

    def look(x):
        seen.append((internals.transforms_active(), internals.forward_ad_active()))
        return x * 1

    look(torch.ones(1))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(1))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(1))
    assert seen == [(False, False), (True, False), (False, True)]


def test_the_function_of_a_node():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(1, requires_grad=True)
    assert internals.function_of(Twice.apply(x).grad_fn) is Twice
    assert internals.function_of((2 * x).grad_fn) is None and internals.function_of(None) is None


def test_modes_tracing_and_profiling_are_noticed():
    def state():
        return (
            internals.dispatch_modes(),
            internals.function_modes(),
            internals.jit_tracing(),
            internals.profiler_enabled(),
        )

    assert state() == (0, 0, False, False)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert state()[0] == 1
    with torch.overrides.TorchFunctionMode():
        assert state()[1] == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert state()[3]
    seen = []
    torch.jit.trace(lambda x: (seen.append(internals.jit_tracing()), x * 1)[1], torch.ones(1), check_trace=False)
    assert seen == [True]


def test_devices_as_contexts_are_modes_of_functions():
    with torch.device("meta") as context:
        assert internals.function_modes() == 1
    del context
    assert issubclass(internals.DeviceContext, torch.overrides.TorchFunctionMode)
    # In a thread, whose own the default is: in torch 2.9 there is none to ask for, once it was set and set back.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(torch.set_default_device, "meta").result()
        assert type(thread.submit(torch.overrides._get_current_function_mode).result()) is internals.DeviceContext


def test_density_and_overlap():
    t = torch.zeros(2, 3, 4)
    assert internals.is_dense(t) and internals.is_dense(t.permute(2, 0, 1))
    assert not internals.is_dense(t[..., ::2]) and not internals.is_dense(torch.zeros(3).expand(2, 3))
    assert internals.overlaps(t, t[0]) and not internals.overlaps(t, t.clone())
    assert internals.suggested_memory_format(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)) is (
        torch.channels_last
    )


def test_wrappers_are_told_from_tensors_with_memory_of_their_own():
    from torch.testing._internal.two_tensor import TwoTensor

    assert internals.is_wrapper(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not internals.is_wrapper(torch.ones(2)) and not internals.is_wrapper(torch.nn.Parameter(torch.ones(2)))


def test_what_is_stashed_for_a_thread_is_as_referenced_as_before():
    value = object()
    before = sys.getrefcount(value)
    for _ in range(20):
        internals.stash_in_thread("fused_rect_test", value)
    assert internals.get_in_thread("fused_rect_test") is value
    internals.stash_in_thread("fused_rect_test", None)
    assert sys.getrefcount(value) == before


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_are_noticed(kind):
    assert not internals.hooks_on_all()
    handle = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(lambda *_: None)
    assert internals.hooks_on_all()
    handle.remove()
    assert not internals.hooks_on_all()

"""`fused-rect profile` end to end on tiny layers, its workloads, its peers, and our calls in a user's trace."""

import inspect
import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from made_up import report as made_up
from torch import nn

import fused_rect as fr
from fused_rect import cli
from fused_rect.kernels import traffic
from fused_rect.perf import trace
from fused_rect.perf.profiling import peers, records, scaling, workloads
from fused_rect.perf.profiling.memory import kept_bytes
from fused_rect.perf.profiling.workloads import RECTIFIERS, WORKLOADS, Layer, square
from fused_rect.rules import Need, Rule

# One thread: threads that wait for each other take a hundred times longer on a machine that others use too.
TINY = ["--processes", "1", "--rounds", "2", "--threads", "1"]
LAYERS = [(name, layer) for name, workload in WORKLOADS.items() for layer in workload.layers]


def profile(*arguments):
    return cli.main(["profile", *map(str, arguments)])


# ---- workloads ----


@pytest.mark.parametrize("name, layer", LAYERS, ids=[f"{name} {layer.name}" for name, layer in LAYERS])
def test_a_layers_numbers_are_those_of_its_convolution(name, layer):
    layer = replace(layer, rectifier=layer.rectifier or "relu")
    with torch.device("meta"):
        net = layer.network()
        y = net(torch.empty(layer.shape))
    assert tuple(y.shape) == layer.output and len(net) == 2 * layer.depth
    assert layer.flops == 2 * y.numel() * net[0].weight[0].numel() * layer.depth
    assert Layer(**json.loads(json.dumps(layer.arguments()))) == layer


def test_batches_are_halved_to_fit():
    layer = square("a", 128, 3, 32, 192, 5, "relu")
    assert workloads.within(layer, layer.flops / 3).shape[0] == 32
    assert workloads.within(layer, 1).shape[0] == 1


# ---- peers ----


def every_peer(rectifier, part, mode, depth=1, batch=2, **more):
    """Calls, and reasons of those that there are none of."""
    layer = square("a", batch, 3, 8, 3 if depth > 1 else 4, 3, rectifier, depth=depth)
    arguments = {"layout": "contiguous", "dtype": "float64", "device": "cpu"} | more
    return peers.layer(layer.arguments(), part, mode, **arguments)


def calls(*what, **more):
    return {name: run for name, run in every_peer(*what, **more).items() if callable(run)}


@pytest.mark.parametrize("layout", peers.LAYOUTS)
@pytest.mark.parametrize("part, depth", [("layer", 1), ("layer", 3), ("epilogue", 1)])
@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_peers_compute_what_the_fused_call_computes(rectifier, part, depth, layout):
    mode = "inference" if rectifier == "rrelu" else "training"  # its slopes are drawn anew by each call
    runs = calls(rectifier, part, mode, depth, layout=layout)
    expected = first(runs[peers.FUSED]())
    names = {peers.EAGER}
    if part == "layer" and rectifier != "prelu":
        names |= {peers.IN_PLACE}
    elif part == "epilogue":
        in_place = {peers.FUSED_IN_PLACE, peers.IN_PLACE} if rectifier != "prelu" else set()
        assert set(runs) == {peers.FUSED, *names, peers.NO_BIAS, *in_place, peers.COPY}
    for name in names:
        torch.testing.assert_close(first(runs[name]()), expected)
    assert (expected < 0).any() or rectifier == "relu"
    if layout == "channels_last":
        assert expected.is_contiguous(memory_format=torch.channels_last)


def first(made):
    return made[0] if isinstance(made, list) else made


@pytest.mark.parametrize("mode", peers.MODES)
@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_calls_in_place_rewrite_one_output_that_stays_as_it_is(rectifier, mode):
    runs = calls(rectifier, "epilogue", mode)
    names = {peers.FUSED_IN_PLACE, peers.IN_PLACE} & set(runs)
    assert names == {
        "prelu": {peers.FUSED_IN_PLACE} if mode == "inference" else set()
    }.get(rectifier, {peers.FUSED_IN_PLACE, peers.IN_PLACE})  # fmt: skip
    made = [first(runs[name]()) for name in sorted(names) for _ in range(2)]
    assert len({t.data_ptr() for t in made}) == min(1, len(made))
    for t in made:
        assert (t > 0).any() and (t == 0).any() and torch.equal(t, made[0])


def test_without_bias_is_the_rectifier_alone():
    runs = calls("leaky_relu", "epilogue", "inference")
    z = inspect.getclosurevars(runs[peers.NO_BIAS]).nonlocals["inputs"][0]
    torch.testing.assert_close(runs[peers.NO_BIAS](), torch.nn.functional.leaky_relu(z, 0.01))


def test_what_torch_cannot_compute_is_absent_and_ours_is_measured():
    runs = every_peer("rrelu", "epilogue", "training", dtype="float16")
    for name in (peers.EAGER, peers.NO_BIAS, peers.IN_PLACE):
        assert "NotImplementedError" in runs[name]
    assert all(t.dtype == torch.float16 for t in runs[peers.FUSED]())


@pytest.mark.parametrize("rectifier", ("relu", "leaky_relu", "rrelu"))
def test_onednn_infers_what_the_fused_layer_infers(rectifier):
    runs = calls(rectifier, "layer", "inference", dtype="float32")
    torch.testing.assert_close(runs[peers.ONEDNN](), runs[peers.FUSED]())


@pytest.fixture
def dynamo():
    """Builders of a measuring process set it up for that process."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


@pytest.mark.exhaustive
def test_compiled_peers_where_they_are_asked_for(dynamo):
    runs = calls("leaky_relu", "layer", "inference", compiled=peers.COMPILERS)
    for name in peers.COMPILERS:
        torch.testing.assert_close(runs[name](), runs[peers.EAGER]())


def test_compiled_peers_are_compiled_in_whatever_number_of_cases(dynamo, monkeypatch):
    """torch stops compiling a function at eight versions of it, and runs it as it is without a word."""
    compile, versions = torch.compile, []
    monkeypatch.setattr(peers.torch, "compile", lambda f: compile(f, backend=lambda gm, x: versions.append(1) or gm))
    for n in range(10):
        runs = calls("relu", "epilogue", "inference", batch=n + 2, compiled=[peers.COMPILED])
        runs[peers.COMPILED]()
        assert len(versions) == n + 1


def test_a_peer_that_torch_runs_as_it_is_is_absent(dynamo, monkeypatch):
    monkeypatch.setattr(peers.torch, "compile", torch.compiler.disable)
    runs = every_peer("relu", "epilogue", "inference", compiled=[peers.COMPILED])
    assert runs[peers.COMPILED] == "torch.compile would run it as it is"


def test_more_versions_than_torch_compiles_are_an_error_in_a_measuring_process(dynamo):
    assert not torch._dynamo.config.fail_on_recompile_limit_hit
    calls("relu", "epilogue", "inference", compiled=[peers.FUSED_COMPILED])
    assert torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.parametrize("rectifier, kept", [("leaky_relu", 1 / 8), ("prelu", 0), ("rrelu", 1 / 8)])
def test_a_training_step_moves_what_its_forward_and_its_backward_move(rectifier, kept):
    """Of 16-bit elements: read and written in each pass, with a bit each or, of PReLU, read again."""
    layer = square("a", 2, 64, 64, 64, 1, rectifier)
    inference, forward, training = (
        records.work(layer, "epilogue", mode, 2)[0] / math.prod(layer.output)
        for mode in ("inference", "forward", "training")
    )
    assert inference == pytest.approx(4, abs=1e-3) and forward == pytest.approx(4 + kept, abs=1e-3)
    assert training - forward == pytest.approx(4 + (kept or 2), abs=1e-3)


@pytest.mark.parametrize("rectifier, tensors", [("relu", 1), ("leaky_relu", 2), ("prelu", 2), ("rrelu", 3)])
def test_kept_bytes_count_what_eager_and_fused_keep(rectifier, tensors):
    runs = calls(rectifier, "layer", "training")
    output = 2 * 4 * 8 * 8 * 8
    slope = 8 if rectifier == "prelu" else 0  # eager keeps a view of it
    assert kept_bytes(runs[peers.EAGER]) == tensors * output + slope
    bits = output // 8 // 8  # one for each element of 8 bytes
    ours = {"prelu": 2 * output, "rrelu": output + bits + 8}.get(rectifier, output + bits)
    assert kept_bytes(runs[peers.FUSED]) == ours


# ---- the command ----


def test_the_files_hold_the_same_records(tmp_path, capsys):
    files = {kind: tmp_path / f"a.{kind}" for kind in ("json", "csv", "html")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    assert profile("--shape", "2,3,64,64", "--rectifier", "prelu", *TINY, *options) == 0
    printed = capsys.readouterr().out
    loaded = records.load(files["json"])
    words = loaded.select_dtypes(exclude="number").columns
    read = pd.read_csv(files["csv"], dtype=dict.fromkeys(words, str)).fillna(dict.fromkeys(words, ""))
    pd.testing.assert_frame_equal(loaded, read, check_dtype=False, rtol=1e-12)
    timed = loaded[loaded.absent == ""]
    assert set(timed[timed.part == "layer"].peer) == {peers.FUSED, peers.EAGER, peers.CONVOLUTION, peers.COPY}
    assert (timed.seconds > 0).all() and (timed.seconds_low <= timed.seconds).all()
    assert set(timed[timed.part == "layer"].kept_bytes) >= {2 * 4 * 2 * 3 * 64 * 64}
    for word in ("prelu", "GB/s", "no PReLU in place", "not installed", "add --compile", "One process"):
        assert word in " ".join(printed.split())
    assert "prelu" in files["html"].read_text()
    content = json.loads(files["json"].read_text())
    assert content["environment"]["torch"] == torch.__version__ and "--shape" not in content["environment"]


MODEL = """
import os, time
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2)
    def forward(self, x):
        print("a model that prints")
        return self.act(self.conv(x))

def net():
    return Net()

def with_input():
    return Net(), torch.zeros(1, 3, 8, 8)

if os.environ.get("SLOWED"):
    from fused_rect import backends
    direct = backends.direct
    def slowed(*arguments):
        time.sleep(1e-2)
        return direct(*arguments)
    backends.direct = slowed
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "user_model.py"
    path.write_text(MODEL)
    return path


def test_a_users_model_and_a_slowed_kernel_that_compare_catches(model, tmp_path, monkeypatch, capsys):
    old = tmp_path / "old.json"
    options = ["--model", f"{model}:net", "--shape", "1,3,64,64", "--processes", "1", "--rounds", "7", "--threads", "1"]
    assert profile(*options, "--json", old) == 0
    loaded = records.load(old)
    of = lambda peer: records.one(loaded[loaded.part == "model"], peer)  # noqa: E731
    assert of(peers.FUSED).kept_bytes < of(peers.EAGER).kept_bytes
    printed = capsys.readouterr().out
    assert "1 of 1 sites" in printed and "a model that prints" not in printed
    monkeypatch.setenv("SLOWED", "1")
    assert profile(*options, "--compare", old) == 1
    assert "REGRESSION" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--json", "no/such/folder/a.json"], "--json no/such/folder/a.json cannot be written"),
        (["--csv", "."], "--csv . cannot be written: Is a directory"),
        (["--html", "x" * 300], "cannot be written: File name too long"),
        (["--json", "a", "--csv", "./a"], "--json and --csv name the same file"),
        (["--base", "fused compiled"], "with --compile alone"),
        (["--compare", "absent.json"], "no file of `fused-rect profile --json`"),
        (["--model", "no.such.module:f"], "names nothing"),
        (["--model", "collections:OrderedDict"], "must be a torch.nn.Module"),
        (["--model", "torch.nn:Identity"], "add --shape"),
        (["--model", "torch.nn:Identity", "--scaling", "size"], "one at a time"),
        (["--workload", "nin", "--shape", "1,2,3"], "one at a time"),
        (["--shape", "1,2,3", "--batch", "4"], "--batch: says nothing about --shape"),
        (["--out-channels", "3"], "--out-channels: says nothing about the default workload"),
        (["--scaling", "size", "--part", "layer"], "--part: says nothing about --scaling"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_options_say_what_to_do_before_anything_is_measured(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(records, "collect", lambda *_, **__: pytest.fail("measured"))
    assert profile(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shape", ("1,2", "a,b,c", "1,2,0,4", "1,2,3,4,5,6"))
def test_a_shape_is_three_to_five_positive_sizes(shape, capsys):
    with pytest.raises(SystemExit) as stopped:
        profile("--shape", shape)
    assert stopped.value.code == 2 and "--shape" in capsys.readouterr().err


# ---- scaling ----


def curve(costs, axis="channels", first=1e-3):
    """Records whose fused calls cost ``costs`` copies, each of twice the elements of the one before."""
    frames = [
        made_up((1.0,), workload=f"scaling {axis}", output=f"1x{2**at}x4x4", shape=f"1x{2**at}x4x4").query(
            "part == 'epilogue'"
        )
        for at in range(len(costs))
    ]
    for at, (frame, cost) in enumerate(zip(frames, costs)):
        frame.loc[:, ["seconds"]] = first * 2**at
        for name in ("ratio", "ratio_low", "ratio_high"):
            frame.loc[frame.peer == peers.COPY, name] = frame.loc[frame.peer == peers.COPY, name] * 2 / cost
    (found,) = scaling.curves(pd.concat(frames))
    return [(p.x, p.note) for p in found.points]


def test_a_point_that_costs_more_is_flagged_and_only_that():
    assert curve([2, 2, 2.1, 3, 1.9]) == [(1, ""), (2, ""), (4, ""), (8, "not flat"), (16, "")]
    assert {note for _, note in curve([2, 2.1, 2, 1.9])} == {""}


def test_small_tensors_are_launch_bound_and_not_flagged():
    assert [note for _, note in curve([9, 5, 2, 2, 2], axis="size")] == ["launch-bound"] * 2 + [""] * 3


def test_every_axis_has_points_of_its_own():
    for axis in scaling.AXES:
        layers = scaling.points(axis, 1)
        assert len({(layer.shape, threads) for layer, threads in layers}) == len(layers)
    assert scaling.thread_counts()[0] == 1


def test_a_scaling_run_measures_and_prints_its_curve(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "points", lambda axis, threads: [(scaling._map(1, c, 8, 8), 1) for c in (1, 3)])
    assert profile("--scaling", "channels", *TINY) == 0
    assert "ns / element" in capsys.readouterr().out


# ---- traces ----


def test_a_trace_of_a_training_step_shows_our_calls_with_bytes_and_flops():
    net = fr.fuse(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 4, 1), nn.PReLU(4), nn.Conv2d(4, 2, 1), nn.RReLU()
        )
    )
    x = torch.randn(2, 3, 10, 10)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        net(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fused_rect::rectify", "fused_rect::rectify_", "fused_rect::rectify_backward"} <= names
    rows = trace.table(profile).set_index(["name", "rectifier"])
    expected = {}
    for name, size, channels in (("leaky_relu", 1024, 8), ("prelu", 512, 4), ("rrelu", 256, 2)):
        rule = Rule.default(name)
        # The convolution adds its bias, and sums its gradient; whether bits are made a trace does not say.
        weight = channels if rule.learned else 0
        forward = "fused_rect::rectify" if rule.learned else "fused_rect::rectify_"
        expected[forward, name] = traffic.rectify(rule, size, 4, weight=weight)
        expected["fused_rect::rectify_backward", name] = traffic.rectify(
            rule, size, 4, backward=True, bits=not rule.learned, weight=weight, need=Need(None, rule.learned)
        )
    assert set(rows.index) == set(expected)
    for key, call in expected.items():
        assert (rows.bytes[key], rows.flops[key], rows.calls[key]) == (call.bytes, call.flops, 1)
    assert (rows["GB/s"] > 0).all()


def test_a_trace_without_shapes_says_how_to_get_them():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fr.functional.bias_relu(torch.randn(1, 2, 3))
    with pytest.raises(ValueError, match="record_shapes=True"):
        trace.table(profile)

"""Static inspection: the readers of machine code, the roofline model, and the gate that holds the kernels' figures."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st

from fused_rect import cli
from fused_rect.perf.inspection import amdgcn, gate, instructions, roofline, sass, tritons
from fused_rect.perf.inspection.compiling import Step
from fused_rect.perf.inspection.instructions import Code, Instruction

SASS = """
 Function k:
  REG:40 STACK:8 SHARED:0 LOCAL:4 CONSTANT[0]:552
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.WIDE.U32 R2, R0, 0x10, R4 ;
        /*0020*/              @!P0 LDG.E.128 R8, [R2.64] ;
        /*0030*/                   LDG.E.128 R12, [R2.64+0x10] ;
        /*0040*/                   IMAD.MOV.U32 R5, RZ, RZ, R6 ;
        /*0050*/                   FADD R8, R8, R5 ;
        /*0060*/                   LDG.E.128 R16, [R2.64+0x20] ;
        /*0070*/                   FADD R12, R13, R16.reuse ;
        /*0080*/                   STG.E.128 [R2.64], R12 ;
        /*0090*/               @P0 EXIT ;
        /*00a0*/                   LDG.E.U16 R9, [R2.64] ;
        /*00b0*/                   STG.E.U16 [R2.64], R9 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
        /*00e0*/                   NOP;
"""


def test_sass_is_counted_by_class_on_the_main_path():
    found = sass.parse(SASS, "k", shared=64)
    assert (found.registers, found.spills, found.shared) == (40, 12, 64)
    assert (found.widest("load"), found.widest("store")) == (16, 16)
    assert len(found.instructions) == 13  # without the padding
    expected = {"move": 2, "wide multiply": 1, "load": 3, "float": 2, "store": 1, "control": 1}
    assert instructions.classes(found.main_path()) == expected  # and without the two-byte accesses of the last elements
    assert [i.opcode for i in found.dearest_path()][-3:] == ["LDG.E.U16", "STG.E.U16", "EXIT"]
    assert (found.body()[0].opcode, found.body()[-1].opcode) == ("LDG.E.128", "STG.E.128")
    assert found.in_flight() == 32  # the third load waits for the first one's use


def test_in_flight_ends_where_a_load_is_overwritten():
    listing = SASS.replace("FADD R8, R8, R5", "MOV R8, R5")
    assert sass.parse(listing, "k").in_flight() == 32
    assert sass.parse(SASS.replace("FADD R8, R8, R5", "FADD R7, R6, R5"), "k").in_flight() == 48


def test_a_listing_without_resource_usage_is_refused():
    with pytest.raises(ValueError, match="resource usage of k"):
        sass.parse("nothing", "k")


AMDGCN = """
k:
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
.LBB0_1:
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\ts_waitcnt vmcnt(0)
\tv_add_f32_e32 v0, v1, v2
\tv_mad_u64_u32 v[5:6], s[2:3], v1, s4, 0
\tds_bpermute_b32 v7, v8, v0
\ts_cbranch_scc1 .LBB0_1
\tbuffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen
\ts_endpgm
.Lfunc_end0:
\tv_add_f32_e32 v0, v1, v2
    .vgpr_count: 33
    .private_segment_fixed_size: 8
    .vgpr_spill_count: 2
    .sgpr_spill_count: 3
"""


def test_amdgcn_is_counted_by_class():
    found = amdgcn.parse(AMDGCN, "k", shared=512)
    assert (found.registers, found.spills, found.shared) == (33, 8, 512)
    assert (found.widest("load"), found.widest("store")) == (16, 16)
    counts = instructions.classes(found.main_path())
    assert counts == {"uniform": 1, "load": 1, "float": 1, "wide multiply": 1, "shuffle": 1, "control": 2, "store": 1}
    assert [len(loop) for loop in found.loops()] == [6]


ROW = st.tuples(st.integers(0, 12), st.booleans(), st.booleans(), st.sampled_from([0, 2, 16]))


@given(st.lists(ROW, min_size=1, max_size=12))
def test_the_main_path_is_the_best_of_all_paths(rows):
    """Against every path of random forward control flow: most widest accesses, then fewest instructions."""
    size = len(rows)
    program = tuple(
        Instruction(
            "X", "", "load" if width else "integer", "", width, n + t if 0 < t < size - n else None, falls, ends
        )
        for n, (t, falls, ends, width) in enumerate(rows)
    )
    widest = max(i.width for i in program)

    def paths(n):
        following = {s for s in (program[n].target, n + 1 if program[n].falls else None) if s is not None and s < size}
        ended = [[n]] if program[n].ends or not following else []
        return ended + [[n, *rest] for s in following for rest in paths(s)]

    def accesses(path):
        return sum(i.width == widest > 0 for i in path)

    every = [[program[n] for n in path] for path in paths(0)]
    code, most = Code("k", program, 0, 0, 0), max(map(accesses, every))
    lengths = [len(path) for path in every if accesses(path) == most]
    assert accesses(code.main_path()) == accesses(code.dearest_path()) == most
    assert (len(code.main_path()), len(code.dearest_path())) == (min(lengths), max(lengths))
    assert accesses(code.other_path()) == most and min(lengths) <= len(code.other_path()) <= max(lengths)


def block(kind, target=None, falls=True):
    return Instruction("X", "", kind, target=target, falls=falls)


def test_the_other_path_turns_once():
    end = Instruction("EXIT", "", "control", falls=False, ends=True)
    code = (block("control", 3), block("main"), end, block("other"), block("control", 6), block("step"), end)
    found = Code("k", code, 0, 0, 0)
    kinds = [[i.kind for i in path] for path in (found.main_path(), found.other_path(), found.dearest_path())]
    assert kinds == [
        ["control", "main", "control"],
        ["control", "other", "control", "control"],
        ["control", "other", "control", "step", "control"],
    ]


def test_a_branch_back_is_a_loop_only_where_it_can_come_again():
    body = block("shared"), block("integer", target=1)
    looped = Code("k", (block("integer"), *body, block("control", falls=False)), 0, 0, 0)
    assert looped.loops() == [list(body)]
    # Code that is merely laid out backward: to 3, back to 1, which ends.
    laid = (block("control", 3, False), block("barrier"), block("control", falls=False), block("control", 1, False))
    backward = Code("k", laid, 0, 0, 0)
    assert backward.loops() == []
    assert [i.kind for i in backward.main_path()] == ["control", "control", "barrier", "control"]


H100 = roofline.GPUS["sm_90"]


def predicted(**changed):
    paths = [(1.0, [Instruction("FADD", "", "float", "fma")] * 300)]
    usual = {"elements": 32, "bytes_per_element": 4.0, "threads": 128, "registers": 32, "shared": 0, "in_flight": 64}
    return roofline.predict(H100, changed.pop("paths", paths), **{**usual, "programs": 10**5, **changed})


def test_the_roofline_model():
    assert predicted().fraction == 1.0 and predicted().bound == "memory"
    assert predicted(registers=33).resident == 12 and predicted(registers=255).resident == 2
    assert predicted(shared=100 * 1024).resident == 2
    # 300 instructions for 4 elements are 75 an element, 2.1 times the 35.4 that the bandwidth leaves time for.
    assert predicted(elements=4) == roofline.Prediction(pytest.approx(35.4 / 75, rel=0.01), "issue", 16, 131072)
    alu = [Instruction("LOP3", "", "integer", "alu")] * 300
    assert predicted(paths=[(1.0, alu)], elements=8).bound == "alu"
    assert predicted(paths=[(1.0, alu)], elements=8).fraction == pytest.approx(35.4 * 8 / 600, rel=0.01)
    half = predicted(paths=[(0.5, []), (0.5, alu)], elements=4)  # every other program takes none
    assert half.bound == "alu" and half.fraction == pytest.approx(35.4 * 8 / 600, rel=0.01)
    # 8 stores of 16 bytes take 16 cycles each of the load-store unit, which leaves what the bytes take as it is.
    store = Instruction("STG", "", "store", "load-store", 16)
    storing = predicted(paths=[(1.0, [store] * 8)], elements=4, bytes_per_element=12.0)
    assert storing.bound == "memory" and storing.fraction == 1.0
    storing = predicted(paths=[(1.0, [store] * 16)], elements=4)
    assert storing.bound == "load-store" and storing.fraction == pytest.approx(35.4 * 4 / 256, rel=0.01)
    starved = predicted(programs=132, in_flight=16)
    assert starved.bound == "in flight" and starved.fraction == pytest.approx(128 * 16 / H100.needed)


def test_needed_bytes_in_flight_are_latency_times_bandwidth():
    assert [round(gpu.needed / 1000) for gpu in roofline.GPUS.values()] == [9, 15, 38]


RECORDED = {
    "instructions": 9.0,
    **dict.fromkeys(gate.MORE_IS_WORSE, 8),
    **dict.fromkeys(gate.LESS_IS_WORSE, 16),
    "classes": {"integer": 6.0, "float": 2.0, "wide multiply": 1.0},
}


def test_the_gate_says_what_is_worse_by_how_much_and_in_which_class():
    assert gate.compare("k", RECORDED, RECORDED) == []
    for figure in gate.MORE_IS_WORSE:
        assert len(gate.compare("k", {**RECORDED, figure: 9}, RECORDED)) == 1
        assert gate.compare("k", {**RECORDED, figure: 7}, RECORDED) == []
    for figure in gate.LESS_IS_WORSE:
        assert len(gate.compare("k", {**RECORDED, figure: 2}, RECORDED)) == 1
        assert gate.compare("k", {**RECORDED, figure: 32}, RECORDED) == []
    longer = {
        **RECORDED,
        "instructions": 9.5,
        "classes": {"integer": 6.25, "float": 2.0, "wide multiply": 1.0, "move": 0.25},
    }
    assert gate.compare("k", longer, RECORDED) == [
        "k: 9.5 instructions per element, recorded 9.0 (integer +0.250, move +0.250)"
    ]
    traded = {**RECORDED, "classes": {"integer": 5.0, "float": 2.0, "wide multiply": 2.0}}
    assert gate.compare("k", traded, RECORDED) == ["k: wide multiply instructions +1.000 per element over 1.0"]
    assert "no figure is recorded" in gate.failures({"new": RECORDED}, {})[0]


def test_figures_are_kept_one_kernel_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "FILE", tmp_path / "figures.json")
    gate.save("3.8.0", {"b": RECORDED, "a": RECORDED})
    gate.save("3.9.0", {"a": RECORDED})
    assert gate.load() == {"3.8.0": {"a": RECORDED, "b": RECORDED}, "3.9.0": {"a": RECORDED}}
    assert len((tmp_path / "figures.json").read_text().splitlines()) == 9


def recorded(version):
    found = gate.load().get(version)
    if found is None:
        pytest.skip(f"no figures for Triton {version}: python -m fused_rect.perf.inspection.gate --record keeps them")
    return found


def test_no_kernel_is_worse_than_its_figure():
    assert gate.failures(gate.measure(gate.QUICK), recorded(gate.installed())) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", tritons.VERSIONS)
def test_every_variant_compiles_and_holds_its_figures(version):
    recorded(version)
    try:
        environment = tritons.environment(version) if version != gate.installed() else None
    except tritons.Unavailable as reason:
        pytest.skip(str(reason))
    command = [sys.executable, "-m", "fused_rect.perf.inspection.gate"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Triton {version}: {len(gate.load()[version])} kernels compiled, 0 figures worse" in done.stdout


@pytest.mark.exhaustive
def test_the_recorded_figures_meet_what_is_promised():
    """128-bit accesses, no spills, no calls, nothing shared in a loop: every elementwise kernel of every version."""
    # What ptxas rather keeps in memory than in one register more, in bytes.
    spilled = {
        ("3.6.0", "sm_100 forward leaky_relu float32 channels_last 32x51x71x73"): 8,
        ("3.6.0", "sm_90 forward leaky_relu float32 channels_last 32x51x71x73"): 8,
        ("3.6.0", "sm_100 forward rrelu_divisor float32 channels_last 32x51x71x73"): 8,
        ("3.8.0", "sm_80 forward rrelu_divisor float32 channels_last 32x51x71x73"): 8,
        ("3.9.0", "sm_80 forward rrelu_divisor float32 channels_last 32x51x71x73"): 8,
        ("3.6.0", "sm_80 forward prelu float16 channels_last 32x64x64x64"): 8,
        **{(v, "sm_90 forward prelu float16 channels_last 32x64x64x64"): 8 for v in tritons.VERSIONS},
    }
    for version, kernels in gate.load().items():
        for name, k in kernels.items():
            if " finish " not in name:
                spills = spilled.get((version, name), 0)
                found = (k["load"], k["store"], k["spills"], k["calls"], k["looped"])
                assert found == (16, 16, spills, 0, 0), (version, name)


def test_a_version_that_pip_cannot_install_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(tritons.Unavailable, match=r"triton==0\.0\.1"):
        tritons.folder("0.0.1")
    assert list((tmp_path / "fused_rect").iterdir()) == []


def test_the_command_prints_the_table_and_the_model(capfd):
    arguments = ["inspect", "--target", "sm_90", "gfx942", "--rectifier", "leaky_relu", "--dtype", "bfloat16"]
    assert cli.main([*arguments, "--layout", "nchw", "--shape", "32x51x71x73"]) == 0
    out = capfd.readouterr().out
    for expected in (
        "forward leaky_relu",
        "backward leaky_relu",
        "finishing sum",
        "32x51x71x73",
        "B/el",
        "H100",
        "no measurement",
    ):
        assert expected in out
    assert "B200" not in out


def test_the_command_prints_json(capfd):
    arguments = ["inspect", "--target", "sm_90", "--rectifier", "relu", "--dtype", "bfloat16", "--layout", "nchw"]
    assert cli.main([*arguments, "--shape", "32x51x71x73", "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert Step(**{**found["step"], "shape": tuple(found["step"]["shape"])}) == Step(
        "sm_90", "relu", "bfloat16", "nchw", (32, 51, 71, 73)
    )
    assert [k["kernel"] for k in found["kernels"]] == ["forward", "backward", "finish"]
    for k in found["kernels"][:2]:
        assert k["instructions"] == pytest.approx(sum(k["by_class"].values()))
        assert 0 < k["fraction"] <= 1


@pytest.mark.parametrize(
    "arguments",
    [["--target", "sm_"], ["--target", "h100"], ["--shape", "32"], ["--shape", "1x0x2"], ["--dtype", "int8"]],
)
def test_bad_arguments_are_refused_before_anything_compiles(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["inspect", *arguments])
    assert exit.value.code == 2
    assert arguments[1] in capsys.readouterr().err

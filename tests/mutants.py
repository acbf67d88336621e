"""The mutants of `make mutants`: one line of code each, changed as a tired programmer might have written it.

A fast test (test_mutation.py) checks that every text to replace still stands in its file exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    file: str
    name: str
    old: str  # occurs once in the file
    new: str
    equivalent: str = ""  # why no test can tell, for a mutant that may survive


KERNELS = "fused_rect/kernels"
PHILOX, RECTIFY, REDUCE, PLAN, LAUNCH = (
    f"{KERNELS}/{name}.py" for name in ("philox", "rectify", "reduce", "plan", "launch")
)
NATIVE, BUILD = f"{KERNELS}/cpu/rectify.cpp", f"{KERNELS}/cpu/build.py"
DIRECT, ORDINARY, LAUNCHES, NODE, LAYERS, CUDA, IN_CPP = (
    f"{KERNELS}/direct/{name}"
    for name in ("direct.cpp", "ordinary.h", "running.h", "autograd.h", "layers.h", "cuda.h", "ops.h")
)
HOST, BINDING = f"{KERNELS}/direct/__init__.py", f"{KERNELS}/compiled.py"
EAGER, BACKENDS = "fused_rect/backends/eager.py", "fused_rect/backends/__init__.py"
DECOMPOSE, SHARDING, BATCHING = "fused_rect/decompose.py", "fused_rect/sharding.py", "fused_rect/ops/batching.py"
DERIVATIVES, OPS = "fused_rect/ops/derivatives.py", "fused_rect/ops/__init__.py"
CHECKPOINT, FOLDER, LOG, RUNNER, FORMATS, STATISTICS, TRAINING = (
    f"fused_rect/study/{name}.py"
    for name in ("checkpoint", "folder", "log", "runner", "formats", "statistics", "training")
)
FILES, CLI = "fused_rect/files.py", "fused_rect/cli.py"
PROFILE, MEASURE, RECORDS, NAMED, PEERS, CLOCKS = (
    f"fused_rect/perf/profiling/{name}.py" for name in ("cli", "measure", "records", "named", "peers", "clocks")
)
GPU_CHECK = "fused_rect/perf/gpu_check.py"
AGREEMENT, LARGE, RUNNING, STEPS, SUITE, TABLES = (
    f"fused_rect/perf/gpu/{name}.py" for name in ("agreement", "large", "running", "steps", "suite", "report")
)
SITES, PLACEMENT, REWRITE, CALLS, INLINE = (
    f"fused_rect/compile/{name}.py" for name in ("sites", "placement", "rewrite", "calls", "inline")
)
FUSING, WAITING, HOLDERS, TWINS, NORMS, READERS = (
    f"fused_rect/fusion/{name}.py" for name in ("__init__", "waiting", "holders", "twins", "norms", "readers")
)
COMPILED = ["tests/compile/test_compile_surroundings.py", "tests/compile/test_compile.py"]
PROFILE_FAULTS = ["tests/profiling/test_profile_faults.py", "tests/profiling/test_perf_measure.py"]
ON_GPU = ["tests/ops/test_direct_on_gpu.py"]
STUDY_FAULTS = ["tests/study/test_study_faults.py"]
UNTRIED = "fused_rect/untried.py"
AUTOGRAD, FUNCTIONAL, REFERENCE = "fused_rect/ops/autograd.py", "fused_rect/functional.py", "fused_rect/reference.py"

# The tests that run first for a file; where all of them pass, REST decides.
FOCUSED = {
    PHILOX: ["tests/kernels/test_philox.py", "tests/kernels/test_kernels.py"],
    RECTIFY: ["tests/kernels/test_kernels.py"],
    REDUCE: ["tests/kernels/test_kernels.py"],
    PLAN: ["tests/kernels/test_plan.py"],
    LAUNCH: ["tests/kernels/test_kernels.py"],
    NATIVE: ["tests/kernels/cpu/test_native.py"],
    **{file: ["tests/ops/test_direct.py", *ON_GPU] for file in (DIRECT, ORDINARY, LAUNCHES, NODE, LAYERS)},
    **dict.fromkeys((CUDA, HOST, BINDING), ON_GPU),
    IN_CPP: ["tests/ops/test_ops_in_cpp.py", "tests/compile/test_compile.py"],
    EAGER: ["tests/kernels/test_kernels.py"],
    DECOMPOSE: ["tests/ops/test_integrations.py"],
    SHARDING: ["tests/ops/test_distributed.py"],
    BATCHING: ["tests/ops/test_integrations.py", "tests/ops/test_ops.py"],
    DERIVATIVES: ["tests/ops/test_ops.py", "tests/ops/test_integrations.py"],
    BUILD: ["tests/kernels/cpu/test_native_build.py"],
    BACKENDS: ["tests/backends"],
    **dict.fromkeys((CHECKPOINT, FOLDER, LOG, RUNNER, FORMATS), STUDY_FAULTS),
    FILES: ["tests/test_files.py"],
    **dict.fromkeys((CLI, PROFILE, MEASURE, RECORDS, NAMED), PROFILE_FAULTS),
    **{file: ["tests/fusion"] for file in (FUSING, WAITING, HOLDERS, TWINS, NORMS, READERS)},
    PEERS: ["tests/profiling/test_profile.py"],
    CLOCKS: ["tests/profiling/test_perf_measure.py"],
    **{file: ["tests/gpu/test_gpu_steps.py"] for file in (AGREEMENT, LARGE, STEPS, SUITE)},
    **{file: ["tests/gpu/test_gpu_check.py"] for file in (GPU_CHECK, RUNNING, TABLES)},
    PLACEMENT: ["tests/compile/test_moves.py"],
    INLINE: ["tests/compile/test_inline.py"],
    **dict.fromkeys((SITES, REWRITE, CALLS), COMPILED),
    STATISTICS: ["tests/study/test_study_report.py"],
    TRAINING: ["tests/study/test_study_training.py"],
    OPS: [
        "tests/ops/test_ops.py",
        "tests/test_functional.py",
        "tests/ops/test_integrations.py",
        "tests/compile",
    ],
    AUTOGRAD: ["tests/ops/test_ops.py", "tests/ops/test_second_order.py", "tests/ops/test_integrations.py"],
    FUNCTIONAL: ["tests/test_functional.py", "tests/test_layers_numbers.py", "tests/ops/test_checkpoint.py"],
    UNTRIED: ["tests/test_untried.py"],
    REFERENCE: ["tests/test_reference.py", "tests/ops/test_ops.py"],
}
REST = ["tests/kernels", "tests/ops/test_direct.py", "tests/gpu/test_gpu_steps.py"]

MUTANTS = [
    # ---- torch.compile
    Mutant(SITES, "modes overlooked", "if modes[source] != modes[node]:", "if modes[source][1] != modes[node][1]:"),
    Mutant(SITES, "another dtype overlooked", "if before.dtype != after.dtype:", "if before.dim() != after.dim():"),
    Mutant(SITES, "a second reader", "if len(source.users) > 1:", "if len(source.users) > 2:"),
    Mutant(PLACEMENT, "readers that fuse cost nothing", "s + s * a.fusing + kept", "s + kept"),
    Mutant(PLACEMENT, "gradients are always there", "(0 if a.ready else 2 * s)", "0"),
    Mutant(PLACEMENT, "launches cost nothing", "more * LAUNCH:", "0:"),
    Mutant(PLACEMENT, "a gradient read again is free", "s * (a.stages == 2)", "0"),
    Mutant(REWRITE, "small ones are ours on CPUs", "elements < placement.MIN_ELEMENTS:", "elements < 0:"),
    Mutant(REWRITE, "a kept ReLU is ours on CPUs", 'found.rectifier == "relu" and any(', "False and any("),
    Mutant(INLINE, "bits in another order", "reverse=True)", "reverse=False)"),
    Mutant(INLINE, "PReLU's bias left out", "y = add_bias(z, bias)", "y = add_bias(z, None)"),
    Mutant(REWRITE, "one seed for all sites", "self.used[device] += 1", "self.used[device] = 1"),
    Mutant(
        REWRITE, "every gradient is our own", "return len(value.users) == 1 and all", "return bool(value.users) or all"
    ),
    Mutant(CALLS, "an absent bias gradient", "of_bias if need_bias else None", "of_bias"),
    # ---- fuse()
    Mutant(FUSING, "others' hooks go too", "if isinstance(hook, Hook)]", "if hook]"),
    Mutant(RECTIFY, "a norm without its mean", "bias -= _look_up(p.mean", "bias += _look_up(p.mean"),
    Mutant(RECTIFY, "a norm that scales nothing", "z *= scale", "z *= 1.0"),
    Mutant(
        RECTIFY, "a norm without its weight", "scale *= _look_up(p.norm_weight", "scale += 0 * _look_up(p.norm_weight"
    ),
    Mutant(NATIVE, "a norm without eps", "std::sqrt(variances[k] + (A)eps)", "std::sqrt(variances[k])"),
    Mutant(NATIVE, "a norm's mean is not scaled", "biases[k] -= means[k] * scales[k]", "biases[k] -= means[k]"),
    Mutant(NORMS, "a norm in training waits", "if training or dispatch_modes()", "if dispatch_modes()"),
    Mutant(NORMS, "a norm that needs gradients waits", "if torch.is_grad_enabled() and any(", "if False and any("),
    Mutant(READERS, "hooks do not look on", "and not has_hooks(module)", ""),
    Mutant(READERS, "an Identity with hooks is passed over", "is nn.Identity and _runs_alone(s)", "is nn.Identity"),
    Mutant(READERS, "a property is looked up", "hasattr(type(owner), callee.name) or ", ""),
    Mutant(READERS, "another variable is read", " and steps[argument].value == variable", ""),
    Mutant(READERS, "a snapshot holds the tensors", "        snapshot.clear()", "        pass"),
    Mutant(READERS, "others' snapshots are cleared", "and _SNAPSHOTS.isdisjoint(code.co_names)", ""),
    Mutant(READERS, "a jump is no border", '"JUMP" in steps[at].name or ', ""),
    Mutant(
        WAITING,
        "a norm waits though its input is held",
        "if not is_last_reader(count, F.batch_norm, frame) or not ",
        "if not ",
    ),
    Mutant(WAITING, "a norm's output is overwritten though it is read later", "not (last or call.in_place)", "False"),
    Mutant(
        WAITING, "tensors of inference mode count their versions", "return None if tensor.is_inference() else", "return"
    ),
    Mutant(
        HOLDERS,
        "prelu is counted through a function",
        "found += torch.prelu(_probe(), one),",
        "found += (lambda t: torch.prelu(t, one))(_probe()),",
    ),
    Mutant(WAITING, "what has been read waits on", 'tensor.__dict__.pop("_fused_rect")', "tensor._fused_rect"),
    Mutant(WAITING, "unread outputs leave the model", "            release_unread()\n", "            pass\n"),
    Mutant(WAITING, "only the first argument is read", "            _release_all(args, kwargs)\n", ""),
    Mutant(WAITING, "a look is a read", "if isinstance(result, _LOOKS) or", "if"),
    Mutant(WAITING, "changed in place is as it was", "and _version(first) == version):", "):"),
    Mutant(WAITING, "BatchNorm in training is folded", 'norm == "evaluation"):', "norm):"),
    Mutant(WAITING, "a hook holds nothing", "        and len(module._forward_hooks) == 1\n", ""),
    Mutant(WAITING, "a hook of all modules holds nothing", "        and not hooks_on_all()\n", ""),
    Mutant(HOLDERS, "hooks of all modules see what is tried", " and not hooks_on_all():", ":"),
    Mutant(WAITING, "a forward of its own gives new memory", "type(module).forward in _FORWARDS", "True"),
    Mutant(WAITING, "small outputs are fused", "    if output.size < least:\n", "    if False:\n"),
    Mutant(
        WAITING,
        "small outputs use up the tries",
        "kind = 3 * module.training + (size < MIN_ELEMENTS) +",
        "kind = 3 * module.training +",
    ),
    Mutant(
        WAITING, "a norm's outputs are no larger", "MIN_ELEMENTS_OF_NORMS if norm else MIN_ELEMENTS", "MIN_ELEMENTS"
    ),
    Mutant(WAITING, "tensors of any layout", "        and _is_dense(output)\n", ""),
    Mutant(HOLDERS, "a variable reads no more", "if count == expected:", "if count >= expected:"),
    Mutant(HOLDERS, "any variable is replaced", "names(after)[0] == name", "True"),
    Mutant(HOLDERS, "counted while calls add references", "return _count(object()) == _HANDED_OVER", "return True"),
    Mutant(TWINS, "over what PReLU's backward reads", "not (call.rule.learned and _needs_grad(call))", "True"),
    Mutant(TWINS, "over what a checkpoint keeps", "return dispatch_modes() == 0 and", "return"),
    Mutant(TWINS, "over a view", "        and call.input._base is None\n", ""),
    Mutant(TWINS, "infinite slopes", "math.isfinite(n)", "n == n"),
    Mutant(TWINS, "slopes of another length", "weight.numel() == input.shape[1]", "True"),
    # ---- versions of torch
    Mutant(UNTRIED, "a patch is newer than its release", "<= NEWEST_TORCH:", "< NEWEST_TORCH:"),
    Mutant(UNTRIED, "no version is newer", "<= NEWEST_TORCH:", ">= (0, 0):"),
    Mutant(UNTRIED, "said of fused_rect's own line", "stacklevel=4", "stacklevel=3"),
    # ---- random slopes
    Mutant(PHILOX, "a round too few", "ROUNDS = tl.constexpr(7)", "ROUNDS = tl.constexpr(6)"),
    Mutant(PHILOX, "a digit of the multiplier", "0xD2511F53", "0xD2511F57"),
    Mutant(PHILOX, "the same key step for both words", "k1 = k1 + 0xBB67AE85", "k1 = k1 + 0x9E3779B9"),
    Mutant(PHILOX, "low half of the other product", "high_0 ^ c3 ^ k1, low_0", "high_0 ^ c3 ^ k1, low_2"),
    Mutant(PHILOX, "the high half twice", "product.to(tl.uint32), (product", "(product >> 32).to(tl.uint32), (product"),
    Mutant(
        PHILOX,
        "the low half twice, in halves",
        "FACTOR, tl.umulhi(word, tl.cast(FACTOR, tl.uint32))",
        "FACTOR, word * FACTOR",
    ),
    Mutant(PHILOX, "the wrong key word", "c3 ^ k1", "c3 ^ k0"),
    Mutant(PHILOX, "the seed's upper half ignored", "tl.load(halves + 1)", "tl.load(halves)"),
    Mutant(PHILOX, "a counter that wraps at 2^32", "high = (counter >> 32).to(tl.uint32)", "high = zero"),
    Mutant(PHILOX, "one counter a vector", "_four(vector * 2 + tl.arange", "_four(vector + tl.arange"),
    Mutant(PHILOX, "the same counter twice", "_four(vector * 2 + 1, key)", "_four(vector * 2, key)"),
    Mutant(
        PHILOX,
        "wrong lanes",
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r1), tl.join(r2, r3))",
    ),
    Mutant(PHILOX, "a bit lost", "V).to(tl.int32, bitcast=True)", "V).to(tl.int32, bitcast=True) >> 1"),
    # ---- the kernel
    Mutant(RECTIFY, "z = 0 on the positive side (relu, rrelu)", "return z <= 0", "return z < 0"),
    Mutant(RECTIFY, "z = 0 on the positive side (leaky, prelu)", "return ~(z > 0)", "return ~(z >= 0)"),
    Mutant(RECTIFY, "NaN on the positive side", "return ~(z > 0)", "return z <= 0"),
    Mutant(
        RECTIFY, "relu that passes negatives on", "tl.where(negative, 0.0, value)", "tl.where(negative, -value, value)"
    ),
    Mutant(
        RECTIFY,
        "the slope itself for slope * z",
        "tl.where(negative, value * slope, value)",
        "tl.where(negative, slope, value)",
    ),
    Mutant(RECTIFY, "the bias lost", "            z += bias", "            z += 0.0 * bias"),
    Mutant(RECTIFY, "wide planes: a place too far", "here = at < end", "here = at <= end"),
    Mutant(RECTIFY, "a plane too early", "return plane, (plane + 1) * inner", "return plane, plane * inner"),
    Mutant(RECTIFY, "no seam inside a vector", "tl.where(end % V == 0,", "tl.where(end % V >= 0,"),
    Mutant(
        RECTIFY,
        "a seam where channels change between two vectors",
        "tl.where(end % V == 0,",
        "tl.where(end % V > V,",
        "a step without a shared vector may choose element by element as well: that takes time, and no result differs",
    ),
    Mutant(RECTIFY, "the step before the seam", "end, seam // ACROSS, key", "end, seam // ACROSS - 1, key"),
    Mutant(
        RECTIFY,
        "the seam's vector as the first channel's",
        "    if SHARED:\n        at +=",
        "    if SHARED:\n        at -=",
    ),
    Mutant(
        RECTIFY,
        "the two channels' sums exchanged",
        "first, second = tl.sum(tl.where(here,",
        "second, first = tl.sum(tl.where(here,",
    ),
    Mutant(RECTIFY, "the first step's sums alone", "(sums[0] + more[0], sums[1] +", "(sums[0], sums[1] +"),
    Mutant(RECTIFY, "the second channel's first step alone", "sums[1] + more[1],", "sums[1],"),
    Mutant(
        RECTIFY,
        "the first channel after the last",
        "tl.where(channel + 1 == count, 0, channel + 1), WEIGHT",
        "channel + 1, WEIGHT",
    ),
    Mutant(RECTIFY, "one slope by channels", '0 if WEIGHT == "one" else channel', "channel"),
    Mutant(
        RECTIFY,
        "no next channel inside a vector",
        "following = tl.where(channel + 1 == count, 0, channel + 1)\n                second",
        "following = channel\n                second",
    ),
    Mutant(
        RECTIFY,
        "channel boundary one late",
        "(plane + 1) * inner - e.position, value",
        "(plane + 1) * inner - e.position + 1, value",
    ),
    Mutant(
        RECTIFY, "one channel for a whole vector", "channel = (e.position + j) //", "channel = (e.position + 0 * j) //"
    ),
    Mutant(
        RECTIFY,
        "the next channel",
        "plane = e.position // inner\n            channel = plane % count",
        "plane = e.position // inner\n            channel = (plane + 1) % count",
    ),
    Mutant(RECTIFY, "no mask at the row's end", "in_row = g < tile.row", "in_row = g >= 0"),
    Mutant(RECTIFY, "rows that overlap", "tl.cast(chunk * ROWS, tl.int64)", "tl.cast(chunk * (ROWS - 1), tl.int64)"),
    Mutant(RECTIFY, "the tail's last element lost", "[None, None, :] < tail", "[None, None, :] < tail - 1"),
    Mutant(RECTIFY, "the tail's channels from 0", "_unsigned(tail_at + zero,", "_unsigned(0 * tail_at + zero,"),
    Mutant(RECTIFY, "the seed ignored", "return philox_key(p.seed)", "return 0, 0"),
    Mutant(RECTIFY, "the divisor as a slope", '        if SLOPE == "drawn divisor":', '        if SLOPE == "no such":'),
    Mutant(
        RECTIFY,
        "scale and middle exchanged",
        "tl.fma(drawn, _number(p.scale, COMPUTE), _number(p.middle, COMPUTE))",
        "tl.fma(drawn, _number(p.middle, COMPUTE), _number(p.scale, COMPUTE))",
    ),
    Mutant(
        RECTIFY,
        "float64 bounds rounded to float32",
        ".to(tl.float64, bitcast=True).to(COMPUTE)",
        ".to(tl.float64, bitcast=True).to(tl.float32).to(COMPUTE)",
    ),
    Mutant(RECTIFY, "the two sums of a segment exchanged", "tl.join(head, rest)", "tl.join(rest, head)"),
    Mutant(
        RECTIFY,
        "a segment's boundary one period late",
        "* V // c.inner + 1) * c.inner",
        "* V // c.inner + 2) * c.inner",
    ),
    Mutant(RECTIFY, "each vector a segment of its own", "((vector - lane % SEGMENT) * V //", "(vector * V //"),
    Mutant(RECTIFY, "absent lanes in the sums", "offset, mask=e.live, other=0)", "offset, mask=e.live, other=1)"),
    Mutant(RECTIFY, "absent lanes on the negative side", 'other=float("inf")', "other=-1.0"),
    Mutant(RECTIFY, "grad_weight of both sides", "tl.where(negative, value * z, 0.0)", "value * z"),
    Mutant(
        RECTIFY,
        "in place: the gradient read again after it was overwritten",
        "        learned = tl.where(negative, value * z, 0.0)",
        "        value = tl.load((t.out if t.grad is None else t.grad) + e.start * V + offset, mask=e.live, other=0)\n"
        "        learned = tl.where(negative, value.to(COMPUTE) * z, 0.0)",
    ),
    # ---- bits
    Mutant(
        RECTIFY, "bits in the wrong order", "tl.uint32) << tl.arange(0, V)", "tl.uint32) << (V - 1 - tl.arange(0, V))"
    ),
    Mutant(RECTIFY, "bits read in the wrong order", "& (1 << place)) != 0", "& (1 << (V // LANES - 1 - place))) != 0"),
    Mutant(RECTIFY, "bits of the positive side", "tl.where(negative, tl.full(", "tl.where(~negative, tl.full("),
    Mutant(
        RECTIFY,
        "bits of the output",
        "negative if WHOLE else negative & e.live",
        "z < 0 if WHOLE else negative & e.live",
    ),
    Mutant(RECTIFY, "unused bits that are set", "negative if WHOLE else negative & e.live", "negative | ~e.live"),
    Mutant(RECTIFY, "the tail's byte lost", "if t.bits is not None:", "if WHOLE and t.bits is not None:"),
    Mutant(
        RECTIFY, "each lane's bits alone", "tl.sum(tl.sum(own, axis=3), axis=2,", "tl.max(tl.sum(own, axis=3), axis=2,"
    ),
    Mutant(
        RECTIFY, "the first lane's bits for all", "own = byte.to(tl.int32) >> (", "own = byte.to(tl.int32) >> 0 * ("
    ),
    Mutant(
        RECTIFY,
        "stale bits where all are positive",
        "mask=e.mask & first)",
        "mask=e.mask & first & (byte != 0))",
    ),
    Mutant(RECTIFY, "bits of the row above", "at = bits + e.start + _byte_of", "at = bits + 0 * e.start + _byte_of"),
    Mutant(
        RECTIFY,
        "bits read of the row above",
        "at = t.bits + e.start + _byte_of",
        "at = t.bits + 0 * e.start + _byte_of",
    ),
    # ---- the finishing sum
    Mutant(REDUCE, "the previous channel's share", "segment * STEP + later", "segment * STEP"),
    Mutant(REDUCE, "a channel that starts a segment", "(segment * UNIT < head)", "(segment * UNIT <= head)"),
    Mutant(
        REDUCE,
        "the last turn left out",
        "chunks * copies * touched, SLOTS)",
        "chunks * copies * touched - SLOTS, SLOTS)",
    ),
    Mutant(REDUCE, "the tail's last element left out", "& (j < tail)", "& (j < tail - 1)"),
    Mutant(REDUCE, "grad_bias for grad_weight", "tl.where(which == 1", "tl.where(which == 0"),
    Mutant(REDUCE, "the tail among the tiles' sums", "partials + (stride - V) + j", "partials + 0 * stride + j"),
    Mutant(
        REDUCE,
        "the first copy of the period alone",
        "(copy * channels + c) * inner",
        "(0 * copy * channels + c) * inner",
    ),
    # ---- the plan
    Mutant(PLAN, "one vector too many", "return self.size // VECTOR", "return -(-self.size // VECTOR)"),
    Mutant(
        PLAN,
        "the last rows left out",
        "return -(-self.rows // (self.depth * self.down))",
        "return max(1, self.rows // (self.depth * self.down))",
    ),
    Mutant(
        PLAN,
        "the last columns left out",
        "return -(-self.row // (self.beside * self.across))",
        "return max(1, self.row // (self.beside * self.across))",
    ),
    Mutant(PLAN, "the tail's place in vectors", "self.vectors % self.row * VECTOR", "self.vectors % self.row"),
    Mutant(PLAN, "rows that are no whole vectors", "least = VECTOR // math.gcd(period, VECTOR)", "least = 1"),
    Mutant(PLAN, "three channels in a vector of two", '"split" if inner > VECTOR', '"split" if inner > VECTOR // 2'),
    Mutant(PLAN, "segments that span three channels", ".bit_length() - 1, 32", ".bit_length(), 32"),
    Mutant(PLAN, "no room for the tail's sums", "(VECTOR if self.tail else 0)", "0"),
    Mutant(PLAN, "offsets that overflow", ">= 2**31", ">= 2**32"),
    Mutant(PLAN, "counters that overflow", "self.size > 2**34", "self.size > 2**35"),
    Mutant(PLAN, "channels in the last dim", "return shape[1], strides[1]", "return shape[1], strides[-1]"),
    # ---- the launches
    Mutant(
        LAUNCH, "the bias's sum forgotten", "need.bias, computed_in(dtype) if need", "None, computed_in(dtype) if need"
    ),
    Mutant(LAUNCH, "one slope's gradient of the first channel", "else per_channel.sum()", "else per_channel[:1]"),
    # ---- the native kernels
    Mutant(NATIVE, "z = 0 on the positive side", "return ~(z > 0);", "return ~(z >= 0);"),
    Mutant(
        NATIVE,
        "NaN on relu's side for every rule",
        "S == zero || random ? Sides::at_most_zero(z) : Sides::not_above_zero(z)",
        "Sides::at_most_zero(z)",
    ),
    Mutant(NATIVE, "a round too few", "constexpr int rounds = 7", "constexpr int rounds = 6"),
    Mutant(NATIVE, "products exchanged", "x1 = p1, x3 = p0;", "x1 = p0, x3 = p1;"),
    Mutant(NATIVE, "the ragged end's first lanes", "std::memcpy(at.out + i, to + skip,", "std::memcpy(at.out + i, to,"),
    Mutant(NATIVE, "a lane too many of the ragged end", "((1ull << rest) - 1) << skip", "((2ull << rest) - 1) << skip"),
    Mutant(NATIVE, "bfloat16 ties away from zero", "u + 0x7fff + ((u >> 16) & 1)", "u + 0x8000"),
    Mutant(NATIVE, "the last piece's part left out", "i <= last; i++) sums[k]", "i < last; i++) sums[k]"),
    Mutant(NATIVE, "the first group of rows alone", "o < groups * columns; o += period", "o < columns; o += period"),
    Mutant(NATIVE, "the next channel", "k = plane % c.channels;", "k = (plane + 1) % c.channels;"),
    Mutant(NATIVE, "the first counters again", "(uint64_t)(from + done + i) / 4", "(uint64_t)(done + i) / 4"),
    Mutant(NATIVE, "the divisor as a slope", "divisor ? 1 / drawn : drawn", "drawn"),
    Mutant(NATIVE, "16 rows summed in float32", "constexpr int deep = 8; ", "constexpr int deep = 80; "),
    Mutant(
        NATIVE, "bits: vectors in the other order", "Sides::bits(m) << n * W;", "Sides::bits(m) << (N - 1 - n) * W;"
    ),
    Mutant(NATIVE, "bits: lanes in the other order", "lane[i] = 1 << i;", "lane[i] = 1 << (W - 1 - i);"),
    Mutant(NATIVE, "bits: the tail lost", "(Sides::bits(m) & live) >> skip << i % 64;", "(uint64_t)0;"),
    Mutant(NATIVE, "bits: unused ones left set", "(Sides::bits(m) & live) >> skip", "Sides::bits(m) >> skip"),
    Mutant(NATIVE, "bits: stale ones kept", "if (shift) words[0] |= *bits;", "words[0] |= *bits;"),
    Mutant(NATIVE, "bits: the former segment's lost", "if (shift) words[0] |= *bits;", ""),
    Mutant(NATIVE, "bits: stale ones of rows", "std::memset(c.bits, 0, ", "std::memset(c.bits, 0, 0 * "),
    Mutant(NATIVE, "bits: read without their shift", "words[i] >> shift | words[i + 1] << (64 - shift);", "words[i];"),
    Mutant(
        NATIVE, "the sides of the kept input's neighbour", "{value, nullptr, y, words", "{value + 1, nullptr, y, words"
    ),
    Mutant(NATIVE, "no bias for the kept input", "W::Step::from_value || !c.bits ? few", "W::Step::from_value ? few"),
    Mutant(NATIVE, "columns that run on behind a line", "column + 64 == columns ? 0", "column + 64 == 0 ? 0"),
    Mutant(NATIVE, "rows streamed wherever they begin", "period % 64 == 0 && period <= widest", "period <= widest"),
    Mutant(NATIVE, "planes streamed wherever they begin", "c.inner % 32 == 0", "c.inner > 0"),
    Mutant(NATIVE, "a segment that ends within a line", "longest / step.columns * step.columns", "longest"),
    Mutant(NATIVE, "the first strip's parameters", "if (strip != at) {", "if (at < 0) {"),
    Mutant(
        NATIVE,
        "a vector left out of the sums",
        "half; half /= 2)",
        "half > 1; half /= 2)",
    ),
    # ---- the ops in C++
    Mutant(ORDINARY, "modes and transforms overlooked", "return (local.included_ - usual).empty() &&", "return"),
    Mutant(ORDINARY, "negated parameters as they lie", "  return plain(parameter) && ", "  return "),
    Mutant(ORDINARY, "tensors with gaps", " || !t.is_non_overlapping_and_dense()) return {};", ") return {};"),
    Mutant(ORDINARY, "a bias of another length", " || bias.size(0) != channels_of(t) ||", " ||"),
    Mutant(LAYERS, "no bump of the version", "input.unsafeGetTensorImpl()->bump_version();", ";"),
    Mutant(ORDINARY, "a parameter inside the input", "parameter.defined() && parameter.is_alias_of(input)", "false"),
    Mutant(NODE, "no bump of a recorded one's", "torch::autograd::impl::bump_version(input);", ";"),
    Mutant(NODE, "the bias's edge for the weight's", "_compute_output(2),", "_compute_output(1),"),
    Mutant(NODE, "the bias of now in backward", "bias.defined() ? bias.clone() : Tensor()", "bias"),
    Mutant(LAYERS, "a bias added twice", "if (bias_added) call->bias = nullptr;", ""),
    Mutant(NODE, "second derivatives lost", "if (!at::GradMode::is_enabled() && !(grad", "if (!(grad"),
    Mutant(NODE, "no zeros of second order", "!record.rule.learned() && at::GradMode", "false && at::GradMode"),
    Mutant(NODE, "PReLU's bias without second order", "if (of_link.defined() && rule.learned())", "if (false)"),
    Mutant(NODE, "bits of another layout", "if (grad.strides() != strides)", "if (false)"),
    Mutant(LAYERS, "a leaf overwritten", "in_place && input.is_leaf() && input.requires_grad()", "in_place && false"),
    Mutant(ORDINARY, "another seed than the one given", "rule.random() && !seed.defined()", "rule.random()"),
    Mutant(ORDINARY, "a device's context listens", "!= (PyTypeObject *)device_context)", "!= nullptr)"),
    Mutant(ORDINARY, "a tangent overlooked", " && !t._fw_grad(0).defined();", ";"),
    Mutant(
        IN_CPP,
        "gradients overlooked",
        "at::GradMode::is_enabled() && torch::autograd::any",
        "false && torch::autograd::any",
    ),
    Mutant(IN_CPP, "another implementation overlooked", "|| !choice->is(input.is_cuda())) return", ") return"),
    Mutant(
        IN_CPP, "bits of another layout", "(!strides.empty() && input.strides() != strides)) return", "false) return"
    ),
    Mutant(IN_CPP, "a gradient of another layout", "if (IN_PLACE && grad.strides() != strides) return false;", ""),
    Mutant(
        LAUNCHES, "one zero for both", "return std::bit_cast<int64_t>(number); };", "return (int64_t)(number * 1e9); };"
    ),
    Mutant(IN_CPP, "a seed of its own", "if (draws(rule, seed) || ", "if ("),
    Mutant(IN_CPP, "symbols read as numbers", "if (!nobody_listens() || !(input.is_cpu()", "if (!(input.is_cpu()"),
    Mutant(NODE, "modes are not asked in backward", "  if (!nobody_listens()) return {};\n", ""),
    Mutant(
        LAYERS,
        "bits of no memory of theirs",
        "if (bits) *bits = new_vector(input, (call->n + 7) / 8",
        "if (bits) *bits = new_vector(input, call->n / 8",
    ),
    # The rest needs softcuda on PYTHONPATH: without it the tests of CUDA tensors are skipped, and these survive.
    Mutant(LAUNCHES, "plans of another layout", "{like.sizes(), like.strides()}", "{like.sizes(), like.sizes()}"),
    Mutant(
        LAUNCHES,
        "plans of other addresses",
        "bits << 8, aligned, (int64_t)c.type",
        "bits << 8, (int64_t)0, (int64_t)c.type",
    ),
    Mutant(LAUNCHES, "plans of other constants", "std::bit_cast<int64_t>(rule.second)})", "(int64_t)0})"),
    Mutant(
        LAUNCHES, "one slope's gradient not summed on", "by_channel : by_channel.sum()", "by_channel : by_channel[0]"
    ),
    Mutant(DIRECT, "hooks overlooked in forward", "choice->is(true) && !hooked()", "choice->is(true)"),
    Mutant(DIRECT, "another implementation is chosen", "input.is_cpu() && choice->is(false)", "input.is_cpu()"),
    Mutant(DIRECT, "mixed dtypes without autocast", "|| under_autocast(input)", "|| true"),
    Mutant(LAUNCHES, "a kernel's own hooks overlooked", "i < PyTuple_GET_SIZE(kernels)", "i < 0"),
    Mutant(LAYERS, "an autocast map as it is", " || under_autocast(input)) return {};", ") return {};"),
    Mutant(DIRECT, "a padded map as it is", " || PyUnicode_Compare(mode, names[10]))", ")"),
    Mutant(LAYERS, "a map's bias added twice", "const bool added = map_adds && of_bias;", "const bool added = false;"),
    Mutant(NODE, "hooks overlooked in backward", "(grad.is_cuda() && ask(", "(false && ask("),
    Mutant(
        CUDA,
        "one plan for all of a hash",
        "count == other.count && std::equal(",
        "true || std::equal(",
        "no two plans of the tests share a hash of 64 bits",
    ),
    Mutant(CUDA, "pointers as numbers", "a.pointer < 0 ? a.value :", "true ? a.value :"),
    Mutant(HOST, "scratch pointers left out", ", *[(-1, 0)] * scratch)", ")"),
    Mutant(HOST, "clusters as plain launches", "metadata.num_ctas != 1 or ", ""),
    Mutant(HOST, "constants as arguments", 'elif type != "constexpr":', "else:"),
    Mutant(HOST, "any stream's handle", "if current.stream_id != number:", "if False:"),
    Mutant(BINDING, "one kernel for all addresses", "t.data_ptr() % ALIGNED == 0)", "True)"),
    Mutant(BINDING, "hooks overlooked", " or hooked() or ", " or "),
    Mutant(BINDING, "hooks of the kernel overlooked", " or kernel.pre_run_hooks:", ":"),
    Mutant(BINDING, "AMD's kernels too", '.backend != "cuda"', '.backend == "none"'),
    # ---- the eager path
    Mutant(EAGER, "grad_weight of the positive side", "masked_fill_(~negative, 0)", "masked_fill_(negative, 0)"),
    Mutant(EAGER, "a 16-bit result that is not stored", "        out.copy_(z)\n", "        pass\n"),
    Mutant(EAGER, "the wrong axis of the sum", "if d != 1]", "if d != 0]"),
    Mutant(
        EAGER,
        "the slope on the positive side",
        "torch.where(negative, g * reference",
        "torch.where(~negative, g * reference",
    ),
    # ---- the specification: bits, and the side of NaN
    Mutant(REFERENCE, "bits in the other order", "torch.arange(8, dtype", "torch.arange(7, -1, -1, dtype"),
    Mutant(REFERENCE, "NaN on the wrong side", "~(z > 0) if rule.nan_is_negative else z <= 0", "~(z > 0)"),
    Mutant(REFERENCE, "bits by shape, not by memory", "F.pad(in_memory(negative)", "F.pad(negative.flatten()"),
    Mutant(REFERENCE, "a lost tail", "-negative.numel() % 8)", "-negative.numel() % 8)[: negative.numel() // 8 * 8]"),
    # ---- the rest of torch around an op
    Mutant(DECOMPOSE, "export: no bias", "None if bias_added else parameters.bias", "None"),
    Mutant(DECOMPOSE, "export: Leaky's own default", "F.leaky_relu(z, rule.constants[0])", "F.leaky_relu(z)"),
    Mutant(SHARDING, "bias everywhere beside sharded channels", "Shard(0) if dim == 1 and", "Shard(0) if dim == 9 and"),
    Mutant(
        SHARDING, "no sum over the batch's shards", "sums = [Partial(), Partial()]", "sums = [Replicate(), Replicate()]"
    ),
    Mutant(SHARDING, "random slopes sharded", "[None] if rule.random else [None,", "[None,"),
    Mutant(BATCHING, "vmap: examples and channels exchanged", "t.transpose(0, 1).flatten(1, 2)", "t.flatten(0, 1)"),
    Mutant(
        BATCHING, "vmap: one slope's gradient not summed", "split[1] = split[1].sum(-1)", "split[1] = split[1][..., 0]"
    ),
    Mutant(BATCHING, "vmap: random slopes folded", "    if rule.random:", "    if False:"),
    Mutant(
        DERIVATIVES,
        "forward mode without the slopes' tangent",
        "    if weight_t is not None:\n        tangent = ",
        "    if False:\n        tangent = ",
    ),
    Mutant(
        DERIVATIVES,
        "double backward: no term of the slopes",
        "else sum_to(torch.where(negative, outer",
        "else 0 * sum_to(torch.where(negative, outer",
    ),
    Mutant(
        DERIVATIVES,
        "double backward: no term of z",
        "result[1] = of_z.to(grad.dtype) if needs[1] else None",
        "result[1] = None",
    ),
    Mutant(
        DERIVATIVES,
        "double backward: none where torch has zeros",
        "else torch.zeros_like(grad)\n    if not kept",
        "else None\n    if not kept",
    ),
    Mutant(
        AUTOGRAD,
        "outer transforms see no derivative",
        "    with torch.enable_grad(), internals.forward_ad_enabled(True),",
        "    with torch.no_grad(),",
    ),
    Mutant(AUTOGRAD, "forward mode overlooked", "if internals.forward_ad_active() or transforms", "if transforms"),
    Mutant(
        AUTOGRAD,
        "second derivatives by no way to z",
        "if anchor is not None and torch.is_grad",
        "if False and torch.is_grad",
    ),
    Mutant(
        AUTOGRAD,
        "the bias's share of z's gradient",
        "of_bias = of_bias + sum_to(of_z, of_bias) if need_bias else None",
        "pass",
    ),
    Mutant(AUTOGRAD, "a bias kept as it will be", "        bias = bias.clone()\n", "        pass\n"),
    Mutant(AUTOGRAD, "bits under vmap", "or transforms_active() or internals.is_wrapper", "or internals.is_wrapper"),
    Mutant(OPS, "bits of another layout", "grad = grad if stride is None else laid_out_as(grad, stride)", "pass"),
    Mutant(
        OPS,
        "stale bits: forward's layout ignored",
        "    source = dense(input, stride)\n",
        "    source = dense(input)\n",
    ),
    Mutant(OPS, "the version not bumped", "    torch.autograd.graph.increment_version(input)\n", ""),
    Mutant(OPS, "a parameter inside the input read as it changes", "internals.overlaps(parameter, input)", "False"),
    Mutant(
        OPS,
        "keys of the first tensor alone",
        "tensors = [t for t in args if isinstance(t, Tensor)]",
        "tensors = [args[0]]",
    ),
    # ---- faults: the build, whose choice it is, the study
    Mutant(BUILD, "a damaged library is loaded", 'path.stem == f"{key}-{_hash(path.read_bytes())}"', "path.stat()"),
    Mutant(BUILD, "what killed builds left stays", "_clear(where, prefix if alone else None)", "_clear(where, None)"),
    Mutant(BUILD, "builds at work are cleared", "(prefix and left.name.startswith(prefix))", "prefix"),
    Mutant(
        BUILD,
        "a failure without a word for it",
        "except Exception as error:  # of the file",
        "except KeyError as error:  #",
    ),
    Mutant(BUILD, "named before it is on the disk", "            _on_disk(out)\n", ""),
    Mutant(BACKENDS, "forced for ever", "internals.stash_in_thread(OWN, previous)", "pass"),
    Mutant(CHECKPOINT, "an unverified checkpoint", "if zlib.crc32(contents) != crc:", "if False:"),
    Mutant(CHECKPOINT, "an unverified result", 'if value.pop("crc32") == _crc(value):', 'if value.pop("crc32"):'),
    Mutant(CHECKPOINT, "another run's checkpoint", "    if found != identity:", "    if not identity:"),
    Mutant(FOLDER, "settings merged", "    if names:", "    if len(names) > 2:"),
    Mutant(FOLDER, "two studies at once", "lock.acquire(timeout=0)", "lock.release()"),
    Mutant(FOLDER, "halves of killed studies stay", 'folder.rglob(".*.part")', 'folder.glob(".*.part")'),
    Mutant(LOG, "another run's log", '["run"] != run:', '["run"] is None:'),
    Mutant(LOG, "a torn line gone on from", "                file.truncate(end)\n", ""),
    Mutant(RUNNER, "runs at work are waited for", "            worker.kill()", "            pass"),
    Mutant(RUNNER, "a study that waits for its parent", "        os._exit(1)", "        return"),
    Mutant(FORMATS, "any format of image", "formats=IMAGE_FORMATS", "formats=None"),
    Mutant(FORMATS, "a huge image", "if image.width * image.height > MOST_PIXELS:", "if image.width < 0:"),
    Mutant(FORMATS, "any name in a pickle", 'if f"{module}.{name}" not in', 'if "" not in'),
    Mutant(FORMATS, "anybody's pickle", 'check_digest(f"{name} of', '(lambda *_: 0)(f"{name} of'),
    Mutant(
        STATISTICS,
        "diverged runs in n",
        'frame["variant"] == variant, column].dropna()',
        'frame["variant"] == variant, column]',
    ),
    Mutant(STATISTICS, "a pair of one", "(wide[b] - wide[a]).dropna()", "(wide[b] - wide[a]).fillna(0.0)"),
    Mutant(TRAINING, "a diverged run trains on", "run.updates and not run.diverged:", "run.updates:"),
    Mutant(
        FUNCTIONAL,
        "the bias added after rounding",
        "if bias is None or not map_adds_bias(rank, device):",
        "if True:",
    ),
    Mutant(
        FUNCTIONAL,
        "PReLU over what backward reads",
        "        rule.keeps_input\n        and torch",
        "        False\n        and torch",
    ),
    Mutant(FUNCTIONAL, "over what a checkpoint caches", "dispatch_modes() > 0)", "dispatch_modes() > 9)"),
    Mutant(FILES, "written under its own name", 'partial.open("xb")', 'path.open("wb")'),
    Mutant(FILES, "halves stay", "            partial.unlink(missing_ok=True)", "            pass"),
    Mutant(CLI, "only some terminals", 'stream.errors in ("strict", "surrogateescape")', 'stream.errors == "replace"'),
    Mutant(PROFILE, "paths are markup", '{"markup": False,', '{"markup": True,'),
    Mutant(PROFILE, "nothing timed is a success", 'status = _failed(f"nothing', '_failed(f"nothing'),
    Mutant(MEASURE, "processes outlive the command", "    os.read(pipe, 1)", "    threading.Event().wait()"),
    Mutant(MEASURE, "a process that left early", "child.returncode or done < len(cases)", "child.returncode"),
    Mutant(RECORDS, "any ratio", "not (0 < ratio < math.inf", "not (ratio < math.inf"),
    Mutant(RECORDS, "control characters", 'c if c.isprintable() else "?"', "c"),
    Mutant(NAMED, "a user's missing import", 'f"{name}.".startswith(f"{missing.name}.")', "missing.name"),
    Mutant(PEERS, "in place of a copy", "lambda leaf, buffer: buffer\n", "lambda leaf, buffer: buffer.clone()\n"),
    Mutant(PEERS, "cases share the limit of versions", "    torch._dynamo.reset()  # else", "    pass  # else"),
    Mutant(PEERS, "silently uncompiled", 'frames["ok"] > before', 'frames["ok"] >= before'),
    Mutant(CLOCKS, "a graph's calls are one", "_events(replay, replays) / calls", "_events(replay, replays)"),
    Mutant(
        CLOCKS,
        "a call is two",
        "                run()\n            spent",
        "                run(), run()\n            spent",
    ),
    # ---- the GPU check
    Mutant(AGREEMENT, "bits are not compared", "not torch.equal(bits, expected_bits)", "False"),
    Mutant(AGREEMENT, "wrong is ok", "max(found.values()) <= 1", "min(found.values()) <= 1"),
    Mutant(LARGE, "the first part only", "range(0, x.numel(), PART)", "range(0, PART, PART)"),
    Mutant(LARGE, "slopes start anew", "torch.arange(start // 4,", "torch.arange(start // 4 * 0,"),
    Mutant(LARGE, "sums are not compared", "wrong == 0 and error < SUMS", "wrong == 0"),
    Mutant(STEPS, "missing peers are ok", '{"ok": not missing, "case"', '{"ok": True, "case"'),
    Mutant(SUITE, "skipped is ok", "running.returncode == 0 and passed", "running.returncode == 0"),
    Mutant(RUNNING, "time hides a failure", "if False in said or (status and not cut):", "if status and not cut:"),
    Mutant(RUNNING, "a dead step is ok", "(status and not cut)", "(status > 0 and not cut)"),
    Mutant(RUNNING, "what it started goes on", "            end(child)", "            child.kill()"),
    Mutant(GPU_CHECK, "the log of another run", 'open(f"{base}.log", "x")', 'open(f"{base}.log", "a")'),
    Mutant(TABLES, "backward with its forward", 'there if mode == "forward" else', "there if mode else"),
]

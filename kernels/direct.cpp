// Calls of the ops without Python in between: the checks, allocations and autograd node of fused_rect/ops in C++, for
// CPU tensors, whose kernel is rectify.cpp's, and for CUDA tensors, whose kernels Triton compiled. What is out of the
// ordinary is left to Python: `rectify` returns None and `rectify_` False, before anything is written. An autograd
// Function in Python costs 25 us of a training step whatever it computes, as much as a small convolution, and a launch
// of Triton's 14, four times the work of a small layer on a GPU.
//
// Built by cpu/build.py against torch's and Python's headers; where that fails, Python serves, more slowly for small
// tensors.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/version.h>

#include <bit>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "cpu/call.h"
#include "cuda.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

int (*kernel)(const Call *) = nullptr;  // rectify.cpp's entry, where CPU tensors are served
PyObject *host = nullptr;               // direct.py's Host, where CUDA tensors are served
PyObject *runtime = nullptr;            // where Triton keeps its hooks,
PyObject *kernels = nullptr;            // and kernels keep their own
PyObject *device_context = nullptr;     // the type of torch.device as a context, which says where new tensors go

// rules.py's Rule, and its number and constants: Python's table hands them over with each call.
struct Rule {
  std::string_view name;
  double lower, upper;
  int64_t slope;
  double first, second;

  bool random() const { return slope >= drawn; }
  bool learned() const { return slope == ::learned; }
};

// What at::empty_strided gives, without the dispatcher for CPU tensors, which takes longer than the allocator.
Tensor new_tensor(const Tensor &like, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) {
  if (like.is_cpu()) return at::detail::empty_strided_cpu(sizes, strides, type);
  return at::empty_strided(sizes, strides, like.options().dtype(type));
}

Tensor new_vector(const Tensor &like, int64_t length, at::ScalarType type) {
  return new_tensor(like, {length}, {1}, type);
}

Maybe maybe(const Tensor &t) { return t.defined() ? Maybe(t) : Maybe(); }

// ---------------------------------------------------------------- what is ordinary

// A mode that sees calls of functions, other than `with torch.device(...)` and `torch.set_default_device(...)`.
bool functions_are_seen() {
  if (!at::impl::torch_function_mode_enabled()) return false;
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); i++)
    if (Py_TYPE(Modes::get_stack_at(i)->ptr(getPyInterpreter())) != (PyTypeObject *)device_context) return true;
  return false;
}

// No function transform, mode, tracer or profiler that would want to see the op itself.
bool nobody_listens() {
  const auto usual = c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - usual).empty() && !functions_are_seen() && !at::hasCallbacks();
}

bool is_excluded(c10::DispatchKey of_cuda, c10::DispatchKey of_cpu, const Tensor &t) {
  return c10::impl::tls_is_dispatch_key_excluded(t.is_cuda() ? of_cuda : of_cpu);
}

bool below_autograd(const Tensor &t) {
  return is_excluded(c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutogradCPU, t);
}

bool under_autocast(const Tensor &t) {
  return !is_excluded(c10::DispatchKey::AutocastCUDA, c10::DispatchKey::AutocastCPU, t);
}

// A dense tensor's keys and no others: not fake, functional, batched, negated, quantized, nested, sparse, of a subclass
// or of another kind of device; and no tangent of forward-mode AD.
template <c10::DeviceType TYPE> bool has_usual_keys(const Tensor &t) {
  constexpr auto autograd_key =
      TYPE == at::kCUDA ? c10::DispatchKey::AutogradCUDA : c10::DispatchKey::AutogradCPU;
  const auto autograd = c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, autograd_key});
  static const auto keys = at::empty({0}, at::TensorOptions(at::kFloat).device(TYPE)).key_set() | autograd;
  return (t.key_set() | autograd) == keys;
}

bool plain(const Tensor &t) {
  const bool usual = t.is_cpu() ? has_usual_keys<at::kCPU>(t) : t.is_cuda() && host && has_usual_keys<at::kCUDA>(t);
  return usual && t.layout() == at::kStrided && !t._fw_grad(0).defined();
}

int type_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return float32;
    case at::kBFloat16: return bfloat16;
    case at::kHalf: return float16;
    case at::kDouble: return float64;
    default: return -1;
  }
}

int64_t channels_of(const Tensor &t) { return t.dim() > 1 ? t.size(1) : 1; }

bool fits(const Tensor &parameter, const Tensor &value) {
  const bool narrow = value.scalar_type() == at::kHalf || value.scalar_type() == at::kBFloat16;
  return plain(parameter) && parameter.is_contiguous() && parameter.device() == value.device() &&
         (parameter.scalar_type() == value.scalar_type() || (narrow && parameter.scalar_type() == at::kFloat));
}

// A call and, on a GPU, its launches.
struct Ready : Call {
  cuda::Planned plan;
};

// The call on a tensor like `t`, if these are tensors that checks.py accepts and that need no copy first.
std::optional<Ready> call_on(const Tensor &t, const Tensor &bias, const Tensor &weight, const Rule &rule) {
  if (!plain(t) || type_of(t.scalar_type()) < 0 || t.numel() == 0 || !t.is_non_overlapping_and_dense()) return {};
  Ready c{};
  c.n = t.numel(), c.channels = 1, c.inner = c.n;
  c.type = type_of(t.scalar_type());
  c.first = rule.first, c.second = rule.second, c.slope = (int)rule.slope;
  c.threads = at::get_num_threads();
  if (bias.defined()) {
    if (t.dim() < 2 || bias.dim() != 1 || bias.size(0) != channels_of(t) || !fits(bias, t)) return {};
    c.bias = bias.const_data_ptr(), c.bias_type = type_of(bias.scalar_type());
  }
  if (rule.learned()) {
    if (!weight.defined() || weight.dim() > 1 || !fits(weight, t)) return {};
    if (weight.numel() != 1 && weight.numel() != channels_of(t)) return {};
    c.weight = weight.const_data_ptr(), c.weight_type = type_of(weight.scalar_type()), c.weights = weight.numel();
  }
  return c;
}

bool add_seed(Call &c, const Tensor &t, const Rule &rule, const Tensor &seed) {
  if (!rule.random()) return true;
  if (!seed.defined() || !plain(seed) || seed.device() != t.device()) return false;
  if (seed.scalar_type() != at::kLong || seed.numel() != 1) return false;
  c.seed = seed.const_data_ptr<int64_t>();
  return true;
}

// random.py's new_seed: the same draw from the same generator. A CPU's is asked itself, in a tenth of the time that
// random_ takes to; a GPU's is torch's to ask, so that CUDA graphs draw anew.
Tensor new_seed(const Tensor &like) {
  constexpr auto most = std::numeric_limits<int64_t>::max();
  const at::AutoDispatchBelowADInplaceOrView below;
  const Tensor seed = new_vector(like, 1, at::kLong);
  if (!like.is_cpu()) return seed.random_(-most - 1, most);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  const uint64_t bits = at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
  *seed.mutable_data_ptr<int64_t>() = (int64_t)(bits % (2 * (uint64_t)most + 1) - most - 1);
  return seed;
}

bool draws(const Rule &rule, const Tensor &seed) { return rule.random() && !seed.defined(); }

// Channels where a parameter or a sum has as many.
void by_channels(Call &c, const Tensor &t) {
  if ((c.bias || c.bias_sum || c.weights > 1) && t.dim() > 1) c.channels = t.size(1), c.inner = t.stride(1);
}

bool overlap(const Tensor &parameter, const Tensor &input) {
  return parameter.defined() && parameter.is_alias_of(input);
}

// ---------------------------------------------------------------- what runs

struct Need {
  std::optional<at::ScalarType> bias;
  bool weight;
};

// What only Python knows, asked with its lock held; its exceptions reach whoever called, in whatever thread.
template <class Question> auto ask(const Question &question) {
  struct Lock {
    PyGILState_STATE state = PyGILState_Ensure();
    ~Lock() { PyGILState_Release(state); }
  } lock;
  try {
    return question(py::handle(host));
  } catch (py::error_already_set &error) {
    error.restore();
    python_error kept;
    kept.persist();
    throw kept;
  }
}

cuda::Launch launch_of(const py::handle &told) {
  const auto t = told.cast<py::tuple>();
  cuda::Launch l{(void *)t[0].cast<uint64_t>(), t[1].cast<unsigned>(), t[2].cast<unsigned>(), t[3].cast<unsigned>(),
                 t[4].cast<unsigned>(), t[5].cast<unsigned>(), {}};
  for (const auto &argument : t[6].cast<py::tuple>()) {
    const auto pair = argument.cast<py::tuple>();
    l.arguments.push_back({pair[0].cast<int64_t>(), pair[1].cast<int64_t>()});
  }
  TORCH_CHECK(l.arguments.size() <= cuda::most_arguments, "a kernel of ", l.arguments.size(), " arguments");
  return l;
}

// Whether the call's launches are known or can be, on a GPU; elsewhere, whether there are kernels. `bits`: forward's,
// which are not there yet. New tensors, absent here too, lie at multiples of 16 bytes, as all memory of torch's does.
bool prepare(Ready &c, const Tensor &like, const Rule &rule, const Need &need, bool bits) {
  if (like.is_cpu()) return kernel;
  const std::array<const void *, 6> given{c.value, c.grad, c.out, c.bias, c.weight, c.seed};
  int64_t there = 0, aligned = 0;
  for (size_t i = 0; i < given.size(); i++)
    there |= (int64_t)(given[i] != nullptr) << i, aligned |= (int64_t)((uintptr_t)given[i] % 16 == 0) << i;
  const int64_t bias_sum = need.bias ? type_of(*need.bias) : -1;
  cuda::Key key;
  for (const int64_t part : {
           (int64_t)like.device().index(), there | (int64_t)bits << 8, aligned, (int64_t)c.type, (int64_t)c.bias_type,
           (int64_t)c.weight_type, c.weights, bias_sum, (int64_t)need.weight, rule.slope,
           std::bit_cast<int64_t>(rule.first), std::bit_cast<int64_t>(rule.second)})
    key.add(part);
  for (const auto numbers : {like.sizes(), like.strides()})
    for (const int64_t number : numbers)
      if (!key.add(number)) return false;
  auto &known = cuda::Known::all();
  c.plan = known.get(known.plans, key, [&]() -> cuda::Planned {
    return ask([&](const py::handle &h) -> cuda::Planned {
      const py::object told = h.attr("plan")(
          like.device().index(), py::cast(like.sizes().vec()), py::cast(like.strides().vec()), c.type, there, aligned,
          bits, c.bias_type, c.weight_type, c.weights, std::string(rule.name), rule.lower, rule.upper, bias_sum,
          need.weight);
      if (told.is_none()) return nullptr;
      const auto t = told.cast<py::tuple>();
      auto plan = std::make_shared<cuda::Plan>();
      for (const auto &launch : t[0].cast<py::tuple>()) plan->launches.push_back(launch_of(launch));
      plan->sums = t[1].cast<int64_t>(), plan->partials = t[2].cast<int64_t>(), plan->channels = t[3].cast<int64_t>();
      return plan;
    });
  });
  return (bool)c.plan;
}

void *current_stream(at::Device device) {
  const auto stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  auto &known = cuda::Known::all();
  return known.get(known.streams, std::pair((int)device.index(), (int64_t)stream.id()), [&] {
    return ask([&](const py::handle &h) {
      return (void *)h.attr("stream")((int)device.index(), (int64_t)stream.id()).cast<uint64_t>();
    });
  });
}

// As launch.py's backward: partial sums, and their sums for each channel; one slope of all channels is summed on.
void launch(const Ready &c, const Tensor &like, const Tensor &grad_weight) {
  const cuda::Plan &plan = *c.plan;
  const c10::DeviceGuard guard(like.device());
  cuda::Pointers pointers{c.value, c.grad, c.out, c.bits, c.bias, c.weight, c.seed};
  Tensor partials, by_channel;
  if (plan.sums) {
    const auto compute = like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    partials = at::empty({plan.sums * plan.partials}, compute);
    const void *weight_sum = c.weight_sum;
    if (weight_sum && (grad_weight.numel() != plan.channels || grad_weight.dtype() != compute.dtype())) {
      by_channel = at::empty({plan.channels}, compute);
      weight_sum = by_channel.const_data_ptr();
    }
    pointers[cuda::partials] = partials.const_data_ptr();
    pointers[cuda::first] = c.bias_sum ? c.bias_sum : weight_sum;
    pointers[cuda::second] = c.bias_sum ? weight_sum : nullptr;
  }
  cuda::need_context(like.device().index());
  void *const stream = current_stream(like.device());
  for (const cuda::Launch &l : plan.launches) cuda::launch(l, pointers, stream);
  if (by_channel.defined()) grad_weight.copy_(grad_weight.numel() == plan.channels ? by_channel : by_channel.sum());
}

void execute(Ready &c, const Tensor &like, const Tensor &grad_weight = {}) {
  if (c.plan) return launch(c, like, grad_weight);
  by_channels(c, like);
  TORCH_CHECK_WITH(
      OutOfMemoryError, kernel(&c) == done, "no memory for the sums of a rectifier on a tensor of ", c.n, " elements");
}

// Whether somebody is told of Triton's launches, or changes how it compiles: compiled.py's `hooked`, and the kernels'
// own hooks. Python's lock is held.
bool hooked() {
  static PyObject *const names[] = {
      PyUnicode_InternFromString("launch_enter_hook"), PyUnicode_InternFromString("launch_exit_hook"),
      PyUnicode_InternFromString("add_stages_inspection_hook")};
  static PyObject *const calls = PyUnicode_InternFromString("calls");
  for (PyObject *const name : names) {
    const auto hook = py::reinterpret_steal<py::object>(PyObject_GetAttr(runtime, name));
    if (!hook) PyErr_Clear();
    if (!hook || hook.is_none()) continue;
    const auto chain = py::reinterpret_steal<py::object>(PyObject_GetAttr(hook.ptr(), calls));
    if (!chain) PyErr_Clear();
    if (!chain || PyObject_Size(chain.ptr()) != 0) return true;
  }
  static PyObject *const own = PyUnicode_InternFromString("pre_run_hooks");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kernels); i++) {
    const auto chain = py::reinterpret_steal<py::object>(PyObject_GetAttr(PyTuple_GET_ITEM(kernels, i), own));
    if (!chain || PyObject_Size(chain.ptr()) != 0) {
      PyErr_Clear();
      return true;
    }
  }
  return false;
}

// ---------------------------------------------------------------- forward and backward

void forward(Ready c, const Tensor &input, const Tensor &out, const Tensor &bits) {
  c.out = out.mutable_data_ptr();
  c.bits = bits.defined() ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  execute(c, input);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients by_dispatcher(
    const Tensor &grad, const Tensor &kept, const Tensor &bias, const Tensor &weight, const Tensor &seed,
    const Rule &rule, const Need &need, at::IntArrayRef strides) {
  using Backward = Gradients(
      const Tensor &, const Tensor &, const Maybe &, const Maybe &, const Maybe &, std::string_view, double, double,
      std::optional<at::ScalarType>, bool, at::OptionalSymIntArrayRef);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fused_rect::rectify_backward", "").typed<Backward>();
  at::OptionalSymIntArrayRef stride;
  if (!rule.learned()) stride = c10::fromIntArrayRefSlow(strides);
  return op.call(grad, kept, maybe(bias), maybe(weight), maybe(seed), rule.name, rule.lower, rule.upper, need.bias,
                 need.weight, stride);
}

// `kept`: the bits, or the input; `strides`: those of the output, whose memory the bits follow.
Gradients backward(
    Tensor grad, const Tensor &kept, const Tensor &bias, const Tensor &weight, const Tensor &seed, const Rule &rule,
    const Need &need, at::IntArrayRef strides) {
  const bool is_bits = kept.scalar_type() == at::kByte;
  const bool fit =
      is_bits ? kept.dim() == 1 && kept.numel() == (grad.numel() + 7) / 8 && kept.is_contiguous() && !rule.learned()
              : kept.scalar_type() == grad.scalar_type() && kept.sizes() == grad.sizes() && kept.strides() == strides;
  std::optional<Ready> found;
  if (fit && plain(kept) && kept.device() == grad.device() && plain(grad) && !at::GradMode::is_enabled() &&
      nobody_listens()) {
    if (grad.strides() != strides)  // an expanded one, say
      grad = at::empty_strided(grad.sizes(), strides, grad.options()).copy_(grad);
    found = call_on(grad, bias, weight, rule);
  }
  if (found) {
    found->grad = grad.const_data_ptr();
    if (is_bits) found->bits = (uint8_t *)kept.const_data_ptr();
    else found->value = kept.const_data_ptr();
  }
  if (!found || !add_seed(*found, grad, rule, seed) || (grad.is_cuda() && ask([](auto) { return hooked(); })) ||
      !prepare(*found, grad, rule, need, is_bits))
    return by_dispatcher(grad, kept, bias, weight, seed, rule, need, strides);
  Ready &c = *found;
  Gradients to{new_tensor(grad, grad.sizes(), grad.strides(), grad.scalar_type()), {}, {}};
  auto &[grad_input, grad_bias, grad_weight] = to;
  if (need.bias) {
    grad_bias = new_vector(grad, channels_of(grad), *need.bias);
    c.bias_sum = grad_bias.mutable_data_ptr(), c.bias_sum_type = type_of(*need.bias);
  }
  if (need.weight) grad_weight = at::empty_like(weight), c.weight_sum = grad_weight.mutable_data_ptr();
  c.out = grad_input.mutable_data_ptr();
  execute(c, grad, grad_weight);
  return to;
}

// Gradients as they are, joined to `anchor`, whose gradient is zeros.
struct Anchored : torch::autograd::Function<Anchored> {
  static variable_list forward(AutogradContext *ctx, const Tensor &anchor, at::TensorList gradients) {
    ctx->save_for_backward({anchor});
    ctx->set_materialize_grads(false);
    variable_list out;
    for (const Tensor &g : gradients) out.push_back(g.view_as(g));
    return out;
  }
  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    const Tensor anchor = ctx->get_saved_variables()[0];
    variable_list out{at::zeros({}, anchor.options()).expand(anchor.sizes())};
    out.insert(out.end(), grads.begin(), grads.end());
    return out;
  }
};

// What a node knows beside its tensors.
struct Record {
  std::string name;
  Rule rule;  // but for its name
  at::ScalarType type;
  std::optional<at::ScalarType> bias_type;  // where there is a bias,
  bool added;                               // which the input may hold already
  c10::SmallVector<int64_t, 10> layout;     // the output's sizes, then its strides

  at::IntArrayRef sizes() const { return at::IntArrayRef(layout).slice(0, layout.size() / 2); }
  at::IntArrayRef strides() const { return at::IntArrayRef(layout).slice(layout.size() / 2); }

  // As numbers, which compiled autograd can hash, and back.
  c10::IValue packed() const {
    std::vector<c10::IValue> values{
        name, rule.lower, rule.upper, rule.slope, rule.first, rule.second, (int64_t)type,
        bias_type ? (int64_t)*bias_type : -1, added};
    for (const int64_t number : layout) values.emplace_back(number);
    return c10::ivalue::Tuple::create(std::move(values));
  }

  static Record of(const c10::IValue &packed) {
    const c10::ArrayRef<c10::IValue> v = packed.toTupleRef().elements();
    Record r{v[0].toStringRef(), {{}, v[1].toDouble(), v[2].toDouble(), v[3].toInt(), v[4].toDouble(), v[5].toDouble()},
             (at::ScalarType)v[6].toInt(), {}, v[8].toBool(), {}};
    if (v[7].toInt() >= 0) r.bias_type = (at::ScalarType)v[7].toInt();
    for (const auto &number : v.slice(9)) r.layout.push_back(number.toInt());
    return r;
  }
};

// ops/autograd.py's _Rectify.backward. `saved`: what is kept, and bias, weight and seed. The node has a second output
// (`of_link` is its gradient) by which second derivatives reach it:
//   beside bits               `anchor`, of no contents: it brings the zeros that torch's own rectifiers give
//   where the input is kept   the bias as forward read it, whatever is done to the bias in between; or, where the input
//                             holds the bias already, that input, whose gradient is the bias's too
variable_list gradients(
    const Record &r, const variable_list &saved, const Tensor &given, const Tensor &of_link, bool need_input,
    bool need_bias, bool need_weight, const Tensor &anchor) {
  const Tensor &kept = saved[0], &bias = saved[1], &weight = saved[2];
  Rule rule = r.rule;
  rule.name = r.name;
  Need need{{}, need_weight};
  if (need_bias) need.bias = r.bias_type;
  Tensor grad = given;
  if (!grad.defined()) grad = at::empty_strided(r.sizes(), r.strides(), kept.options().dtype(r.type)).zero_();
  auto [of_input, of_bias, of_weight] = backward(grad, kept, bias, weight, saved[3], rule, need, r.strides());
  if (anchor.defined()) {
    const auto joined = Anchored::apply(anchor, at::TensorList{of_input, of_bias, of_weight});
    of_input = joined[0], of_bias = joined[1], of_weight = joined[2];
  }
  if (of_link.defined() && rule.learned()) {
    Tensor of_added = of_link;
    if (r.added) {
      std::vector<int64_t> others;
      for (int64_t d = 0; d < of_link.dim(); d++)
        if (d != 1) others.push_back(d);
      of_input = of_input.add(of_link), of_added = of_link.sum(others);
    }
    if (need_bias) of_bias = of_bias.add(of_added.to(of_bias.scalar_type()));
  }
  return {need_input ? std::move(of_input) : Tensor(), need_bias ? std::move(of_bias) : Tensor(),
          need_weight ? std::move(of_weight) : Tensor()};
}

// How compiled autograd calls a Node: by what is in its context.
struct Compiled {
  static constexpr bool is_traceable = false;

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    return gradients(
        Record::of(ctx->saved_data["call"]), ctx->get_saved_variables(), grads[0], grads[1], ctx->needs_input_grad(0),
        ctx->needs_input_grad(1), ctx->needs_input_grad(2), {});
  }
};

// The node of autograd, with edges to input, bias and weight. Function::apply would make it too, 27 us slower a step:
// it packs and describes for compiled autograd what few programs give to it.
struct Node : torch::autograd::CppNode<Compiled> {
  Record record;

  variable_list apply(variable_list &&grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto saved = ctx_.get_saved_variables();
    Tensor anchor;
    if (!record.rule.learned() && at::GradMode::is_enabled()) {
      anchor = at::zeros({}, saved[0].options().dtype(record.type)).expand(record.sizes());
      torch::autograd::impl::set_gradient_edge(anchor, {getptr(), 1});
    }
    return gradients(
        record, saved, grads[0], grads[1], task_should_compute_output(0), task_should_compute_output(1),
        task_should_compute_output(2), anchor);
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs &args) const override {
    auto &self = const_cast<Node &>(*this);
    self.ctx_.saved_data["call"] = record.packed();
    self.is_variable_input_ = {true, true, true};
    CppNode::compiled_args(args);
  }
};

// Nodes are counted by std::shared_ptr up to torch 2.9.
template <class N, class Owner = std::decay_t<decltype(torch::autograd::Edge().function)>> auto new_node() {
  if constexpr (std::is_same_v<Owner, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<N>(new N, [](N *node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>();
}

// Forward with its node. Leaves and views are no outputs here: `run` leaves them to Python.
Tensor record(
    const Tensor &input, const Tensor &bias, const Tensor &weight, const Tensor &seed, const Ready &c, const Rule &rule,
    bool in_place) {
  const auto node = new_node<Node>();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(input, bias, weight));
  node->ctx_.set_materialize_grads(false);
  const bool added = bias.defined() && !c.bias;
  Record &r = node->record;
  r.name = rule.name, r.rule = rule, r.type = input.scalar_type(), r.added = added;
  if (bias.defined()) r.bias_type = bias.scalar_type();

  Tensor out, kept, link, kept_bias;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    out = in_place ? input : new_tensor(input, input.sizes(), input.strides(), r.type);
    if (!rule.learned()) kept = new_vector(input, (c.n + 7) / 8, at::kByte);
    forward(c, input, out, kept);
  }
  if (rule.learned()) {
    const at::AutoGradMode no_history(false);
    if (added) kept = link = at::_unsafe_view(input, input.sizes());
    else kept = input, link = kept_bias = bias.defined() ? bias.clone() : Tensor();
  }
  for (const auto numbers : {out.sizes(), out.strides()}) r.layout.append(numbers.begin(), numbers.end());
  if (in_place) {
    torch::autograd::impl::bump_version(input);
    torch::autograd::impl::rebase_history(input, {node, node->add_input_metadata(input)});
  } else {
    torch::autograd::set_history(out, node);
  }
  if (link.defined()) torch::autograd::set_history(link, node);
  else node->add_input_metadata(out);
  node->ctx_.save_for_backward({kept, kept_bias, weight, seed});
  node->save_variables_to_ctx();
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
  torch::autograd::fire_node_creation_hooks(node);
#endif
  return out;
}

// ---------------------------------------------------------------- calls

std::optional<Tensor> run(
    const Tensor &input, const Tensor &bias, const Tensor &weight, Tensor seed, const Rule &rule, bool bias_added,
    bool in_place) {
  if (!nobody_listens()) return {};
  auto call = call_on(input, bias, weight, rule);
  if (!call || (in_place && (overlap(bias, input) || overlap(weight, input)))) return {};
  if (bias_added) call->bias = nullptr;  // it is there for its gradient alone
  const bool recorded =
      at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad({input, bias, weight});
  // Leaves and views are autograd's difficult cases, and in-place PReLU keeps a copy: all in ops/autograd.py.
  if (recorded && below_autograd(input)) return {};
  if (in_place && input.is_inference() && !c10::InferenceMode::is_enabled()) return {};
  if (recorded && in_place && (rule.learned() || input.is_view())) return {};
  if (recorded && in_place && input.is_leaf() && input.requires_grad()) return {};
  call->value = input.const_data_ptr(), call->out = in_place ? (void *)call->value : nullptr;
  const bool draw = draws(rule, seed);
  // A new seed lies as aligned as this does.
  if (draw) call->seed = (const int64_t *)64;
  else if (!add_seed(*call, input, rule, seed)) return {};
  if (!prepare(*call, input, rule, {}, recorded && !rule.learned())) return {};
  if (draw) seed = new_seed(input), call->seed = seed.const_data_ptr<int64_t>();

  if (recorded) return record(input, bias, weight, seed, *call, rule, in_place);
  const Tensor out = in_place ? input : new_tensor(input, input.sizes(), input.strides(), input.scalar_type());
  forward(*call, input, out, {});
  if (in_place && !input.is_inference()) input.unsafeGetTensorImpl()->bump_version();
  return out;
}

// As run, of a tensor that is there already: what `run` leaves to Python goes there through the dispatcher.
Tensor finished(
    const Tensor &z, const Tensor &bias, const Tensor &weight, Tensor seed, const Rule &rule, bool bias_added) {
  const bool recorded =
      at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad({z, bias, weight});
  const bool in_place = !(recorded && rule.learned());  // whose backward reads z
  if (auto out = run(z, bias, weight, seed, rule, bias_added, in_place)) return *out;
  if (draws(rule, seed)) seed = new_seed(z);
  auto &dispatcher = c10::Dispatcher::singleton();
  using P = const Maybe &;
  using Rectify = Tensor(const Tensor &, P, P, P, std::string_view, double, double, bool);
  using InPlace = void(Tensor &, P, P, P, std::string_view, double, double, bool);
  static const auto rectify = dispatcher.findSchemaOrThrow("fused_rect::rectify", "").typed<Rectify>();
  static const auto rectify_ = dispatcher.findSchemaOrThrow("fused_rect::rectify_", "").typed<InPlace>();
  if (!in_place)
    return rectify.call(z, maybe(bias), maybe(weight), maybe(seed), rule.name, rule.lower, rule.upper, bias_added);
  Tensor out = z;
  rectify_.call(out, maybe(bias), maybe(weight), maybe(seed), rule.name, rule.lower, rule.upper, bias_added);
  return out;
}

// ---------------------------------------------------------------- layers

// A convolution's arguments; none for a linear map.
struct Geometry {
  c10::SmallVector<int64_t, 3> stride, padding, dilation, output_padding;
  bool transposed;
  int64_t groups;
};

// functional.py's `fused`, for maps of tensors that are all of one dtype on one device. `map_adds`: functional.py's
// map_adds_bias; who gets the bias is its share_bias's to say, this is that without transforms and exports.
std::optional<Tensor> mapped(
    const Tensor &input, const Tensor &map_weight, const std::optional<Geometry> &geometry, bool map_adds,
    const Tensor &bias, const Tensor &weight, const Tensor &seed, const Rule &rule) {
  if (!nobody_listens() || below_autograd(input) || under_autocast(input)) return {};
  if (!plain(input) || type_of(input.scalar_type()) < 0) return {};
  for (const Tensor *const t : {&map_weight, &bias, &weight}) {
    if (!t->defined()) continue;
    if (!plain(*t) || t->scalar_type() != input.scalar_type() || t->device() != input.device()) return {};
  }
  const int64_t dims = geometry ? (int64_t)geometry->stride.size() + 2 : 2;
  if (map_weight.dim() != dims || (geometry ? input.dim() != dims : input.dim() < 2)) return {};
  if (bias.defined() && bias.dim() != 1) return {};

  const bool of_bias = bias.defined() && at::GradMode::is_enabled() && bias.requires_grad();
  const Tensor to_map = !map_adds ? Tensor() : of_bias ? bias.variable_data() : bias;
  const Tensor to_rectifier = map_adds && !of_bias ? Tensor() : bias;
  const bool added = map_adds && of_bias;
  Tensor z;
  if (geometry)
    z = at::convolution(
        input, map_weight, maybe(to_map), geometry->stride, geometry->padding, geometry->dilation,
        geometry->transposed, geometry->output_padding, geometry->groups);
  else
    z = at::linear(input, map_weight, maybe(to_map));
  if (z.dim() == dims) return finished(z, to_rectifier, weight, seed, rule, added);
  const auto shape = z.sizes().vec();
  z = at::_unsafe_view(z.contiguous(), {-1, shape.back()});
  return finished(z, to_rectifier, weight, seed, rule, added).view(shape);
}

// ---------------------------------------------------------------- what Python calls

// A tensor of no subclass, or none.
bool tensor_of(PyObject *given, Tensor &tensor) {
  if (given == Py_None) return true;
  if (!THPVariable_CheckExact(given)) return false;
  tensor = THPVariable_Unpack(given);
  return true;
}

double number(PyObject *given) {
  const double value = PyFloat_AsDouble(given);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

// rules.py's Parameters, Rule and numbers.
struct Asked {
  Tensor bias, weight, seed;
  Rule rule;

  // Whether these tensors can be served. The rule's name is Python's to keep.
  bool is(PyObject *parameters, PyObject *of_rule, PyObject *numbers) {
    TORCH_CHECK_TYPE(
        PyTuple_Check(parameters) && PyTuple_Check(of_rule) && PyTuple_Check(numbers) &&
            PyTuple_GET_SIZE(parameters) == 3 && PyTuple_GET_SIZE(of_rule) == 3 && PyTuple_GET_SIZE(numbers) == 3,
        "expected parameters, a rule and its numbers");
    PyObject *const *p = &PyTuple_GET_ITEM(parameters, 0), *const *r = &PyTuple_GET_ITEM(of_rule, 0);
    PyObject *const *n = &PyTuple_GET_ITEM(numbers, 0);
    if (!tensor_of(p[0], bias) || !tensor_of(p[1], weight) || !tensor_of(p[2], seed)) return false;
    const char *name = PyUnicode_AsUTF8(r[0]);
    if (!name) throw python_error();
    rule = {name, number(r[1]), number(r[2]), (int64_t)number(n[0]), number(n[1]), number(n[2])};
    return true;
  }
};

// Whether calls on such a tensor are those of `self`: the kind of device, whose calls may be forced to go another way.
bool is_of(PyObject *self, const Tensor &input) {
  return input.defined() && (self == Py_True ? input.is_cuda() && !hooked() : input.is_cpu());
}

// rectify(input, parameters, rule, numbers, bias_added)
template <bool IN_PLACE> PyObject *called(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "expected input, parameters, rule, numbers, bias_added");
  Tensor input;
  Asked a;
  std::optional<Tensor> out;
  if (tensor_of(given[0], input) && is_of(self, input) && a.is(given[1], given[2], given[3])) {
    const bool bias_added = given[4] == Py_True;
    py::gil_scoped_release others_run;
    out = run(input, a.bias, a.weight, a.seed, a.rule, bias_added, IN_PLACE);
  }
  if constexpr (IN_PLACE) return PyBool_FromLong(out.has_value());
  if (!out) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*out));
  END_HANDLE_TH_ERRORS
}

// Whether `given` is a tuple of whole numbers.
bool sizes_of(PyObject *given, c10::SmallVector<int64_t, 3> &sizes) {
  if (!given || !PyTuple_CheckExact(given)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); i++) {
    PyObject *const item = PyTuple_GET_ITEM(given, i);
    if (!PyLong_CheckExact(item)) return false;
    sizes.push_back(PyLong_AsLongLong(item));
    if (sizes.back() == -1 && PyErr_Occurred()) throw python_error();
  }
  return true;
}

// Of the attributes of one of torch's own modules, a map: what it computes with; false: as Python has it.
struct Map {
  Tensor weight, bias;
  std::optional<Geometry> geometry;

  bool is(PyObject *attributes) {
    static PyObject *const names[] = {
        PyUnicode_InternFromString("_parameters"), PyUnicode_InternFromString("weight"),
        PyUnicode_InternFromString("bias"), PyUnicode_InternFromString("stride"), PyUnicode_InternFromString("padding"),
        PyUnicode_InternFromString("dilation"), PyUnicode_InternFromString("output_padding"),
        PyUnicode_InternFromString("transposed"), PyUnicode_InternFromString("groups"),
        PyUnicode_InternFromString("padding_mode"), PyUnicode_InternFromString("zeros")};
    const auto at = [](PyObject *in, int name) { return PyDict_GetItemWithError(in, names[name]); };
    PyObject *const own = at(attributes, 0);
    if (!own || !PyDict_Check(own)) return false;
    // Absent ones are attributes of another kind: computed ones, say.
    PyObject *const w = at(own, 1), *const b = at(own, 2);
    if (!w || !b || !tensor_of(w, weight) || !tensor_of(b, bias) || !weight.defined()) return false;
    PyObject *const stride = at(attributes, 3);
    if (!stride) return true;  // a linear map
    Geometry &g = geometry.emplace();
    PyObject *const groups = at(attributes, 8), *const mode = at(attributes, 9);
    if (!groups || !PyLong_CheckExact(groups) || !mode || !PyUnicode_Check(mode) || PyUnicode_Compare(mode, names[10]))
      return false;
    g.transposed = at(attributes, 7) == Py_True;
    g.groups = PyLong_AsLongLong(groups);
    if (g.groups == -1 && PyErr_Occurred()) throw python_error();
    return sizes_of(stride, g.stride) && sizes_of(at(attributes, 4), g.padding) &&
           sizes_of(at(attributes, 5), g.dilation) && sizes_of(at(attributes, 6), g.output_padding);
  }
};

// layer(input, attributes of the map, map_adds_bias, parameters, rule, numbers)
PyObject *layer(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 6 && PyDict_Check(given[1]), "expected input, attributes, map_adds_bias, weight, rule, numbers");
  Tensor input;
  Map map;
  Asked a;
  std::optional<Tensor> out;
  if (tensor_of(given[0], input) && is_of(self, input) && map.is(given[1]) && a.is(given[3], given[4], given[5])) {
    const bool map_adds = given[2] == Py_True;
    py::gil_scoped_release others_run;
    out = mapped(input, map.weight, map.geometry, map_adds, map.bias, a.weight, a.seed, a.rule);
  }
  if (!out) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*out));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"rectify", (PyCFunction)(void *)called<false>, METH_FASTCALL, nullptr},
    {"rectify_", (PyCFunction)(void *)called<true>, METH_FASTCALL, nullptr},
    {"layer", (PyCFunction)(void *)layer, METH_FASTCALL, nullptr},
};

}  // namespace

// What direct.py calls, with Python's lock held; until it has, everything is out of the ordinary.
extern "C" {

// (rectify, rectify_, layer) of CPU tensors, or of CUDA tensors.
PyObject *fused_rect_direct(PyObject *is_cuda, PyObject *type_of_device_context) {
  device_context = Py_NewRef(type_of_device_context);
  return Py_BuildValue(
      "(NNN)", PyCFunction_New(&methods[0], is_cuda), PyCFunction_New(&methods[1], is_cuda),
      PyCFunction_New(&methods[2], is_cuda));
}

void fused_rect_direct_cpu(int (*entry)(const Call *)) { kernel = entry; }

// How many plans are kept.
void fused_rect_direct_keep(size_t most) { cuda::Known::all().most = most; }

// Whether CUDA's driver is there.
int fused_rect_direct_cuda(PyObject *h, PyObject *r, PyObject *k) {
  if (!cuda::driver().found) return false;
  if (!host) runtime = Py_NewRef(r), kernels = Py_NewRef(k), host = Py_NewRef(h);
  return true;
}
}

// Calls of the ops without Python in between: the checks, allocations and autograd node of fused_rect/ops in C++, for
// CPU tensors, whose kernel is rectify.cpp's, and for CUDA tensors, whose kernels Triton compiled. What is out of the
// ordinary is left to Python: `rectify` returns None and `rectify_` False, before anything is written. An autograd
// Function in Python costs 25 us of a training step whatever it computes, as much as a small convolution, and a launch
// of Triton's 14, four times the work of a small layer on a GPU.
//
// Built by cpu/build.py against torch's and Python's headers; where that fails, Python serves, more slowly for small
// tensors.
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

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
PyObject *runtime = nullptr;            // where Triton keeps its hooks
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

bool below_autograd(const Tensor &t) {
  return c10::impl::tls_is_dispatch_key_excluded(
      t.is_cuda() ? c10::DispatchKey::AutogradCUDA : c10::DispatchKey::AutogradCPU);
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

// random.py's new_seed: the same draw from the same generator
Tensor new_seed(at::Device device) {
  constexpr auto most = std::numeric_limits<int64_t>::max();
  return at::randint(-most - 1, most, {1}, at::TensorOptions(at::kLong).device(device));
}

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

// Whether somebody is told of Triton's launches, or changes how it compiles: compiled.py's `hooked`. Python's lock is held.
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
  if (fit && plain(kept) && kept.device() == grad.device() && plain(grad) && !at::GradMode::is_enabled() && nobody_listens()) {
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
  Gradients to{at::empty_like(grad), {}, {}};
  auto &[grad_input, grad_bias, grad_weight] = to;
  if (need.bias) {
    grad_bias = at::empty({channels_of(grad)}, grad.options().dtype(*need.bias));
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
    variable_list out{at::zeros_like(ctx->get_saved_variables()[0])};
    out.insert(out.end(), grads.begin(), grads.end());
    return out;
  }
};

// What a node knows beside its tensors, in one tuple of numbers, which compiled autograd can hash.
struct Kept {
  enum { name, lower, upper, slope, first, second, type, bias_type, added, layout };

  static c10::IValue of(const Rule &rule, const Tensor &out, const Maybe &bias, bool bias_added) {
    std::vector<c10::IValue> values;
    values.reserve(layout + 2 * out.dim());
    values.emplace_back(std::string(rule.name)), values.emplace_back(rule.lower), values.emplace_back(rule.upper);
    values.emplace_back(rule.slope), values.emplace_back(rule.first), values.emplace_back(rule.second);
    values.emplace_back((int64_t)out.scalar_type());
    values.emplace_back(bias ? (int64_t)bias->scalar_type() : -1), values.emplace_back(bias_added);
    for (const auto numbers : {out.sizes(), out.strides()})
      for (const int64_t number : numbers) values.emplace_back(number);
    return c10::ivalue::Tuple::create(std::move(values));
  }
};

// ops/autograd.py's _Rectify. Beside the rectified input there may be a second output, by which second derivatives
// reach this node:
//   beside bits               nothing, an empty tensor: it brings the zeros that torch's own rectifiers give
//   where the input is kept   the bias as forward read it, whatever is done to the bias in between; or, where the input
//                             holds the bias already, that input, whose gradient is the bias's too
struct Rectify : torch::autograd::Function<Rectify> {
  static variable_list forward(
      AutogradContext *ctx, const Tensor &input, const Maybe &bias, const Maybe &weight, const Maybe &seed,
      const Ready &c, const Rule &rule, bool in_place) {
    const Tensor out = in_place ? input : at::empty_like(input);
    const Tensor bits = rule.learned() ? Tensor() : at::empty({(c.n + 7) / 8}, input.options().dtype(at::kByte));
    ::forward(c, input, out, bits);
    if (in_place) ctx->mark_dirty({input});
    ctx->set_materialize_grads(false);
    const bool added = bias && !c.bias;
    Tensor kept = bits, link, kept_bias;
    if (!rule.learned()) link = at::empty({0}, input.options());
    else if (added) kept = link = at::_unsafe_view(input, input.sizes());
    else kept = input, link = kept_bias = bias ? bias->clone() : Tensor();
    const Tensor anchor = rule.learned() ? Tensor() : link;
    ctx->save_for_backward({kept, kept_bias, weight.value_or(Tensor()), seed.value_or(Tensor()), anchor});
    ctx->saved_data["call"] = Kept::of(rule, out, bias, added);
    if (link.defined()) return {out, link};
    return {out};
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &kept = saved[0], &bias = saved[1], &weight = saved[2], &anchor = saved[4];
    const c10::ArrayRef<c10::IValue> k = ctx->saved_data["call"].toTupleRef().elements();
    const Rule rule{
        k[Kept::name].toStringView(), k[Kept::lower].toDouble(), k[Kept::upper].toDouble(),
        k[Kept::slope].toInt(), k[Kept::first].toDouble(), k[Kept::second].toDouble()};
    c10::SmallVector<int64_t, 10> layout;
    for (const auto &number : k.slice(Kept::layout)) layout.push_back(number.toInt());
    const auto sizes = at::IntArrayRef(layout).slice(0, layout.size() / 2);
    const auto strides = at::IntArrayRef(layout).slice(layout.size() / 2);
    const bool has_bias = k[Kept::bias_type].toInt() >= 0;
    // Edges count the tensors that were there.
    const bool need_bias = has_bias && ctx->needs_input_grad(1);
    const bool need_weight = weight.defined() && ctx->needs_input_grad(1 + has_bias);
    Need need{{}, need_weight};
    if (need_bias) need.bias = (at::ScalarType)k[Kept::bias_type].toInt();

    Tensor grad = grads[0];
    if (!grad.defined())
      grad = at::empty_strided(sizes, strides, kept.options().dtype((at::ScalarType)k[Kept::type].toInt())).zero_();
    auto [of_input, of_bias, of_weight] = ::backward(grad, kept, bias, weight, saved[3], rule, need, strides);
    if (anchor.defined() && at::GradMode::is_enabled() && anchor.requires_grad()) {
      const auto joined = Anchored::apply(anchor, at::TensorList{of_input, of_bias, of_weight});
      of_input = joined[0], of_bias = joined[1], of_weight = joined[2];
    }
    const Tensor of_link = grads.size() > 1 ? grads[1] : Tensor();
    if (of_link.defined() && rule.learned()) {
      Tensor of_added = of_link;
      if (k[Kept::added].toBool()) {
        std::vector<int64_t> others;
        for (int64_t d = 0; d < of_link.dim(); d++)
          if (d != 1) others.push_back(d);
        of_input = of_input.add(of_link), of_added = of_link.sum(others);
      }
      if (need_bias) of_bias = of_bias.add(of_added.to(of_bias.scalar_type()));
    }
    return {ctx->needs_input_grad(0) ? of_input : Tensor(),
            need_bias ? of_bias : Tensor(),
            need_weight ? of_weight : Tensor(),
            Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// ---------------------------------------------------------------- what Python calls

std::optional<Tensor> run(
    const Tensor &input, const Tensor &bias, const Tensor &weight, Tensor seed, const Rule &rule, bool bias_added,
    bool in_place) {
  if (!nobody_listens()) return {};
  auto call = call_on(input, bias, weight, rule);
  if (!call || (in_place && (overlap(bias, input) || overlap(weight, input)))) return {};
  if (bias_added) call->bias = nullptr;  // it is there for its gradient alone
  const bool record = at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad({input, bias, weight});
  // Leaves and views are autograd's difficult cases, and in-place PReLU keeps a copy: all in ops/autograd.py.
  if (record && below_autograd(input)) return {};
  if (in_place && input.is_inference() && !c10::InferenceMode::is_enabled()) return {};
  if (record && in_place && (rule.learned() || input.is_view())) return {};
  if (record && in_place && input.is_leaf() && input.requires_grad()) return {};
  call->value = input.const_data_ptr(), call->out = in_place ? (void *)call->value : nullptr;
  const bool draw = rule.random() && !seed.defined();
  // A new seed lies as aligned as this does.
  if (draw) call->seed = (const int64_t *)64;
  else if (!add_seed(*call, input, rule, seed)) return {};
  if (!prepare(*call, input, rule, {}, record && !rule.learned())) return {};
  if (draw) seed = new_seed(input.device()), call->seed = seed.const_data_ptr<int64_t>();

  if (record) {
    const Tensor out = Rectify::apply(input, maybe(bias), maybe(weight), maybe(seed), *call, rule, in_place)[0];
    // Nobody asks any more what forward wrote to, but compiled autograd refuses a node that still says so.
    if (in_place) static_cast<torch::autograd::CppNode<Rectify> *>(out.grad_fn().get())->ctx_.mark_dirty({});
    return out;
  }
  const Tensor out = in_place ? input : at::empty_like(input);
  forward(*call, input, out, {});
  if (in_place && !input.is_inference()) input.unsafeGetTensorImpl()->bump_version();
  return out;
}

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

// rectify(input, parameters, rule, numbers, bias_added): rules.py's Parameters, Rule and numbers. `self`: the kind of
// device, whose calls may be forced to go another way.
template <bool IN_PLACE> PyObject *called(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 5 && PyTuple_Check(given[1]) && PyTuple_Check(given[2]) && PyTuple_Check(given[3]) &&
          PyTuple_GET_SIZE(given[1]) == 3 && PyTuple_GET_SIZE(given[2]) == 3 && PyTuple_GET_SIZE(given[3]) == 3,
      "expected input, parameters, rule, numbers, bias_added");
  PyObject *const *p = &PyTuple_GET_ITEM(given[1], 0), *const *r = &PyTuple_GET_ITEM(given[2], 0);
  PyObject *const *n = &PyTuple_GET_ITEM(given[3], 0);
  Tensor input, bias, weight, seed;
  std::optional<Tensor> out;
  const bool cuda = self == Py_True;
  if (tensor_of(given[0], input) && input.defined() && (cuda ? input.is_cuda() && !hooked() : input.is_cpu()) &&
      tensor_of(p[0], bias) && tensor_of(p[1], weight) && tensor_of(p[2], seed)) {
    const char *name = PyUnicode_AsUTF8(r[0]);
    if (!name) throw python_error();
    const Rule rule{name, number(r[1]), number(r[2]), (int64_t)number(n[0]), number(n[1]), number(n[2])};
    const bool bias_added = given[4] == Py_True;
    py::gil_scoped_release others_run;
    out = run(input, bias, weight, seed, rule, bias_added, IN_PLACE);
  }
  if constexpr (IN_PLACE) return PyBool_FromLong(out.has_value());
  if (!out) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*out));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"rectify", (PyCFunction)(void *)called<false>, METH_FASTCALL, nullptr},
    {"rectify_", (PyCFunction)(void *)called<true>, METH_FASTCALL, nullptr},
};

}  // namespace

// What direct.py calls, with Python's lock held; until it has, everything is out of the ordinary.
extern "C" {

// (rectify, rectify_) of CPU tensors, or of CUDA tensors.
PyObject *fused_rect_direct(PyObject *is_cuda, PyObject *type_of_device_context) {
  device_context = Py_NewRef(type_of_device_context);
  return Py_BuildValue("(NN)", PyCFunction_New(&methods[0], is_cuda), PyCFunction_New(&methods[1], is_cuda));
}

void fused_rect_direct_cpu(int (*entry)(const Call *)) { kernel = entry; }

// Whether CUDA's driver is there.
int fused_rect_direct_cuda(PyObject *h, PyObject *r) {
  if (!cuda::driver().found) return false;
  if (!host) runtime = Py_NewRef(r), host = Py_NewRef(h);
  return true;
}
}

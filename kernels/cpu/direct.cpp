// Calls of the ops without Python in between, for small tensors: fused_rect/ops.py's checks, allocations and autograd node in C++.
// What is out of the ordinary is left to Python: `rectify` returns None and `rectify_` false, before anything is written. An autograd
// Function in Python costs 25 us of a training step whatever it computes, as much as a small convolution.
//
// Built by build.py beside rectify.cpp, against torch's headers; where that fails, Python serves, more slowly for small tensors.
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "call.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void (*kernel)(const Call *) = nullptr;

struct Law {
  int rule = -1;
  bool divisor = false;
  double lower, upper;

  Law(std::string_view name, double lower, double upper) : lower(lower), upper(upper) {
    if (name == "relu") rule = relu;
    if (name == "leaky_relu") rule = leaky;
    if (name == "prelu") rule = prelu;
    if (name == "rrelu" || name == "rrelu_divisor") rule = rrelu;
    divisor = name == "rrelu_divisor";
  }
  // rectifiers.py's saves_output
  bool saves_output() const { return rule == relu || divisor || (rule != prelu && lower >= 0); }
};

// ---------------------------------------------------------------- what is ordinary

// No function transform, mode, tracer or profiler that would want to see the op itself.
bool nobody_listens() {
  const auto usual = c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - usual).empty() && !at::impl::torch_function_mode_enabled() && !at::hasCallbacks();
}

bool below_autograd() { return c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradCPU); }

// A dense CPU tensor's keys and no others: not fake, functional, batched, negated, quantized, nested, sparse or a subclass.
bool plain(const Tensor &t) {
  static const auto keys = at::empty({0}, at::kFloat).key_set();
  const auto autograd = c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU});
  return (t.key_set() | autograd) == (keys | autograd) && t.layout() == at::kStrided;
}

int type_of(const Tensor &t) {
  switch (t.scalar_type()) {
    case at::kFloat: return float32;
    case at::kBFloat16: return bfloat16;
    case at::kHalf: return float16;
    case at::kDouble: return float64;
    default: return -1;
  }
}

bool fits(const Tensor &parameter, const Tensor &value) {
  const bool narrow = value.scalar_type() == at::kHalf || value.scalar_type() == at::kBFloat16;
  return plain(parameter) && parameter.is_contiguous() &&
         (parameter.scalar_type() == value.scalar_type() || (narrow && parameter.scalar_type() == at::kFloat));
}

// The call on `value`, if these tensors are ones that checks.py accepts and that need no copy first.
std::optional<Call> call_on(const Tensor &value, const Tensor &bias, const Tensor &weight, const Law &law) {
  if (law.rule < 0 || !plain(value) || type_of(value) < 0 || value.numel() == 0 || !value.is_non_overlapping_and_dense()) return {};
  Call c{};
  c.value = value.const_data_ptr();
  c.n = value.numel(), c.channels = 1, c.inner = c.n;
  c.type = c.bias_type = c.weight_type = type_of(value);
  c.lower = law.lower, c.upper = law.upper, c.rule = law.rule, c.divisor = law.divisor;
  c.threads = at::get_num_threads();
  const int64_t channels = value.dim() > 1 ? value.size(1) : 1;
  if (bias.defined()) {
    if (value.dim() < 2 || bias.dim() != 1 || bias.size(0) != channels || !fits(bias, value)) return {};
    c.bias = bias.const_data_ptr(), c.bias_type = type_of(bias);
  }
  if (law.rule == prelu) {
    if (!weight.defined() || weight.dim() > 1 || (weight.numel() != 1 && weight.numel() != channels) || !fits(weight, value)) return {};
    c.weight = weight.const_data_ptr(), c.weight_type = type_of(weight), c.weights = weight.numel();
  }
  return c;
}

bool add_seed(Call &c, const Maybe &seed) {
  if (c.rule != rrelu) return true;
  if (!seed || !plain(*seed) || seed->scalar_type() != at::kLong || seed->numel() != 1) return false;
  c.seed = seed->const_data_ptr<int64_t>();
  return true;
}

// random.py's new_seed: the same draw from the same generator
Tensor new_seed() {
  constexpr auto most = std::numeric_limits<int64_t>::max();
  return at::randint(-most - 1, most, {1}, at::TensorOptions(at::kLong));
}

void by_channels(Call &c, const Tensor &value, bool wanted) {
  if ((wanted || c.weights > 1) && value.dim() > 1) c.channels = value.size(1), c.inner = value.stride(1);
}

bool overlap(const Tensor &parameter, const Tensor &input) { return parameter.defined() && parameter.is_alias_of(input); }

// ---------------------------------------------------------------- forward and backward

void forward(Call c, const Tensor &input, const Tensor &out) {
  by_channels(c, input, c.bias != nullptr);
  c.out = out.mutable_data_ptr();
  kernel(&c);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients by_dispatcher(
    const Tensor &grad, const Tensor &saved, const Maybe &bias, const Maybe &weight, const Maybe &seed, std::string_view rule, double lower,
    double upper, bool need_bias, bool need_weight) {
  using Backward = Gradients(
      const Tensor &, const Tensor &, const Maybe &, const Maybe &, const Maybe &, std::string_view, double, double, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fused_rect::rectify_backward", "").typed<Backward>();
  return op.call(grad, saved, bias, weight, seed, rule, lower, upper, need_bias, need_weight);
}

Maybe maybe(const Tensor &t) { return t.defined() ? Maybe(t) : Maybe(); }

Gradients backward(
    const Tensor &grad, const Tensor &saved, const Tensor &bias, const Tensor &weight, const Tensor &seed, const std::string &rule,
    double lower, double upper, bool need_bias, bool need_weight) {
  const Law law(rule, lower, upper);
  const bool alike = plain(grad) && grad.scalar_type() == saved.scalar_type() && grad.sizes() == saved.sizes() && grad.strides() == saved.strides();
  std::optional<Call> found;
  if (alike && !at::GradMode::is_enabled() && nobody_listens()) found = call_on(saved, bias, weight, law);
  if (!found || !add_seed(*found, maybe(seed)))
    return by_dispatcher(grad, saved, maybe(bias), maybe(weight), maybe(seed), rule, lower, upper, need_bias, need_weight);
  Call c = *found;
  Gradients to{at::empty_like(saved), {}, {}};
  auto &[grad_input, grad_bias, grad_weight] = to;
  if (need_bias) grad_bias = at::empty_like(bias);
  if (need_weight) grad_weight = at::empty_like(weight);
  if (law.saves_output()) c.bias = nullptr;  // what is saved is the output, whose sign tells the side
  by_channels(c, saved, need_bias || c.bias);
  c.grad = grad.const_data_ptr(), c.out = grad_input.mutable_data_ptr();
  c.bias_sum = need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  c.weight_sum = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  kernel(&c);
  return to;
}

struct Rectify : torch::autograd::Function<Rectify> {
  static Tensor forward(
      AutogradContext *ctx, const Tensor &input, const Maybe &bias, const Maybe &weight, const Maybe &seed, const Call &c,
      const std::string &rule, bool in_place) {
    const Tensor out = in_place ? input : at::empty_like(input);
    ::forward(c, input, out);
    if (in_place) ctx->mark_dirty({input});
    const bool from_output = Law(rule, c.lower, c.upper).saves_output();
    ctx->save_for_backward({from_output ? out : input, bias.value_or(Tensor()), weight.value_or(Tensor()), seed.value_or(Tensor())});
    ctx->saved_data["rule"] = c10::ivalue::Tuple::create({rule, c.lower, c.upper});
    return out;
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &bias = saved[1], &weight = saved[2];
    // Edges count the tensors that were there.
    const bool need_bias = bias.defined() && ctx->needs_input_grad(1), need_weight = weight.defined() && ctx->needs_input_grad(1 + bias.defined());
    const auto &rule = ctx->saved_data["rule"].toTupleRef().elements();
    auto [grad_input, grad_bias, grad_weight] = ::backward(
        grads[0], saved[0], bias, weight, saved[3], rule[0].toStringRef(), rule[1].toDouble(), rule[2].toDouble(), need_bias, need_weight);
    return {ctx->needs_input_grad(0) ? grad_input : Tensor(), need_bias ? grad_bias : Tensor(), need_weight ? grad_weight : Tensor(),
            Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

// ---------------------------------------------------------------- what Python calls

std::optional<Tensor> run(
    const Tensor &input, const Maybe &bias_, const Maybe &weight_, const Maybe &seed_, std::string_view rule, double lower, double upper,
    bool in_place) {
  if (!kernel || !nobody_listens()) return {};
  const Tensor bias = bias_.value_or(Tensor()), weight = weight_.value_or(Tensor());
  const Law law(rule, lower, upper);
  auto call = call_on(input, bias, weight, law);
  if (!call || (in_place && (overlap(bias, input) || overlap(weight, input)))) return {};
  const bool record = at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad({input, bias, weight});
  // Leaves and views are autograd's difficult cases, and in-place PReLU keeps a copy: all in ops.py.
  if (record && below_autograd()) return {};
  if (in_place && input.is_inference() && !c10::InferenceMode::is_enabled()) return {};
  if (record && in_place && (!law.saves_output() || input.is_view() || (input.is_leaf() && input.requires_grad()))) return {};
  const Maybe seed = seed_ || law.rule != rrelu ? seed_ : Maybe(new_seed());
  if (!add_seed(*call, seed)) return {};

  if (record) return Rectify::apply(input, bias_, weight_, seed, *call, std::string(rule), in_place);
  const Tensor out = in_place ? input : at::empty_like(input);
  forward(*call, input, out);
  if (in_place && !input.is_inference()) input.unsafeGetTensorImpl()->bump_version();
  return out;
}

}  // namespace

#define PARAMETERS "Tensor? bias, Tensor? weight, Tensor? seed, str rectifier, float lower, float upper"

TORCH_LIBRARY(fused_rect_direct, m) {
  m.def("rectify(Tensor input, " PARAMETERS ") -> Tensor?",
        [](const Tensor &input, const Maybe &bias, const Maybe &weight, const Maybe &seed, c10::string_view rule, double lower, double upper) {
          return run(input, bias, weight, seed, rule, lower, upper, false);
        });
  m.def("rectify_(Tensor(a!) input, " PARAMETERS ") -> bool",
        [](const Tensor &input, const Maybe &bias, const Maybe &weight, const Maybe &seed, c10::string_view rule, double lower, double upper) {
          return run(input, bias, weight, seed, rule, lower, upper, true).has_value();
        });
}

// Where rectify.cpp's entry is; until it is known, everything is out of the ordinary.
extern "C" void fused_rect_direct(void (*entry)(const Call *)) { kernel = entry; }

// Calls of the ops without Python in between: the checks, allocations and autograd node of fused_rect/ops in C++.
// What is out of the ordinary is left to Python: `rectify` returns None and `rectify_` false, before anything is
// written. An autograd Function in Python costs 25 us of a training step whatever it computes, as much as a small
// convolution.
//
// Built by build.py beside rectify.cpp, against torch's headers; where that fails, Python serves, more slowly for small
// tensors.
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

int (*kernel)(const Call *) = nullptr;

void run_kernel(const Call &c) {
  TORCH_CHECK_WITH(
      OutOfMemoryError, kernel(&c) == done, "no memory for the sums of a rectifier on a tensor of ", c.n, " elements");
}

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

// No function transform, mode, tracer or profiler that would want to see the op itself.
bool nobody_listens() {
  const auto usual = c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  return (local.included_ - usual).empty() && !at::impl::torch_function_mode_enabled() && !at::hasCallbacks();
}

bool below_autograd() { return c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradCPU); }

// A dense CPU tensor's keys and no others: not fake, functional, batched, negated, quantized, nested, sparse or of a
// subclass.
bool plain(const Tensor &t) {
  static const auto keys = at::empty({0}, at::kFloat).key_set();
  const auto autograd = c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU});
  return (t.key_set() | autograd) == (keys | autograd) && t.layout() == at::kStrided;
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
  return plain(parameter) && parameter.is_contiguous() &&
         (parameter.scalar_type() == value.scalar_type() || (narrow && parameter.scalar_type() == at::kFloat));
}

// The call on a tensor like `t`, if these are tensors that checks.py accepts and that need no copy first.
std::optional<Call> call_on(const Tensor &t, const Tensor &bias, const Tensor &weight, const Rule &rule) {
  if (!plain(t) || type_of(t.scalar_type()) < 0 || t.numel() == 0 || !t.is_non_overlapping_and_dense()) return {};
  Call c{};
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

bool add_seed(Call &c, const Rule &rule, const Tensor &seed) {
  if (!rule.random()) return true;
  if (!seed.defined() || !plain(seed) || seed.scalar_type() != at::kLong || seed.numel() != 1) return false;
  c.seed = seed.const_data_ptr<int64_t>();
  return true;
}

// random.py's new_seed: the same draw from the same generator
Tensor new_seed() {
  constexpr auto most = std::numeric_limits<int64_t>::max();
  return at::randint(-most - 1, most, {1}, at::TensorOptions(at::kLong));
}

// Channels where a parameter or a sum has as many.
void by_channels(Call &c, const Tensor &t) {
  if ((c.bias || c.bias_sum || c.weights > 1) && t.dim() > 1) c.channels = t.size(1), c.inner = t.stride(1);
}

bool overlap(const Tensor &parameter, const Tensor &input) {
  return parameter.defined() && parameter.is_alias_of(input);
}

// ---------------------------------------------------------------- forward and backward

void forward(Call c, const Tensor &input, const Tensor &out, const Tensor &bits) {
  by_channels(c, input);
  c.value = input.const_data_ptr(), c.out = out.mutable_data_ptr();
  c.bits = bits.defined() ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  run_kernel(c);
}

struct Need {
  std::optional<at::ScalarType> bias;
  bool weight;
};

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
  std::optional<Call> found;
  if (fit && plain(kept) && plain(grad) && !at::GradMode::is_enabled() && nobody_listens()) {
    if (grad.strides() != strides)  // an expanded one, say
      grad = at::empty_strided(grad.sizes(), strides, grad.options()).copy_(grad);
    found = call_on(grad, bias, weight, rule);
  }
  if (!found || !add_seed(*found, rule, seed))
    return by_dispatcher(grad, kept, bias, weight, seed, rule, need, strides);
  Call &c = *found;
  Gradients to{at::empty_like(grad), {}, {}};
  auto &[grad_input, grad_bias, grad_weight] = to;
  if (need.bias) {
    grad_bias = at::empty({channels_of(grad)}, grad.options().dtype(*need.bias));
    c.bias_sum = grad_bias.mutable_data_ptr(), c.bias_sum_type = type_of(*need.bias);
  }
  if (need.weight) grad_weight = at::empty_like(weight), c.weight_sum = grad_weight.mutable_data_ptr();
  by_channels(c, grad);
  if (is_bits) c.bits = (uint8_t *)kept.const_data_ptr();
  else c.value = kept.const_data_ptr();
  c.grad = grad.const_data_ptr(), c.out = grad_input.mutable_data_ptr();
  run_kernel(c);
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

// Numbers as compiled autograd can hash them, which it cannot lists inside of tuples.
c10::IValue tuple_of(at::IntArrayRef numbers) {
  return c10::ivalue::Tuple::create(std::vector<c10::IValue>(numbers.begin(), numbers.end()));
}

std::vector<int64_t> numbers_of(const c10::IValue &tuple) {
  std::vector<int64_t> numbers;
  for (const auto &number : tuple.toTupleRef().elements()) numbers.push_back(number.toInt());
  return numbers;
}

// ops/autograd.py's _Rectify. Beside the rectified input there may be a second output, by which second derivatives
// reach this node:
//   beside bits               nothing, an empty tensor: it brings the zeros that torch's own rectifiers give
//   where the input is kept   the bias as forward read it, whatever is done to the bias in between; or, where the input
//                             holds the bias already, that input, whose gradient is the bias's too
struct Rectify : torch::autograd::Function<Rectify> {
  static variable_list forward(
      AutogradContext *ctx, const Tensor &input, const Maybe &bias, const Maybe &weight, const Maybe &seed,
      const Call &c, const Rule &rule, bool in_place) {
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
    ctx->saved_data["rule"] = c10::ivalue::Tuple::create(
        {std::string(rule.name), rule.lower, rule.upper, rule.slope, rule.first, rule.second});
    ctx->saved_data["layout"] = c10::ivalue::Tuple::create(
        {tuple_of(out.sizes()), tuple_of(out.strides()), (int64_t)out.scalar_type(),
         bias ? (int64_t)bias->scalar_type() : -1, added});
    if (link.defined()) return {out, link};
    return {out};
  }

  static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &kept = saved[0], &bias = saved[1], &weight = saved[2], &anchor = saved[4];
    const auto &r = ctx->saved_data["rule"].toTupleRef().elements();
    const auto &l = ctx->saved_data["layout"].toTupleRef().elements();
    const Rule rule{
        r[0].toStringView(), r[1].toDouble(), r[2].toDouble(), r[3].toInt(), r[4].toDouble(), r[5].toDouble()};
    const auto sizes = numbers_of(l[0]), strides = numbers_of(l[1]);
    const bool has_bias = l[3].toInt() >= 0;
    // Edges count the tensors that were there.
    const bool need_bias = has_bias && ctx->needs_input_grad(1);
    const bool need_weight = weight.defined() && ctx->needs_input_grad(1 + has_bias);
    Need need{{}, need_weight};
    if (need_bias) need.bias = (at::ScalarType)l[3].toInt();

    Tensor grad = grads[0];
    if (!grad.defined())
      grad = at::empty_strided(sizes, strides, kept.options().dtype((at::ScalarType)l[2].toInt())).zero_();
    auto [of_input, of_bias, of_weight] = ::backward(grad, kept, bias, weight, saved[3], rule, need, strides);
    if (anchor.defined() && at::GradMode::is_enabled() && anchor.requires_grad()) {
      const auto joined = Anchored::apply(anchor, at::TensorList{of_input, of_bias, of_weight});
      of_input = joined[0], of_bias = joined[1], of_weight = joined[2];
    }
    const Tensor of_link = grads.size() > 1 ? grads[1] : Tensor();
    if (of_link.defined() && rule.learned()) {
      Tensor of_added = of_link;
      if (l[4].toBool()) {
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
    const Tensor &input, const Maybe &bias_, const Maybe &weight_, const Maybe &seed_, const Rule &rule,
    bool bias_added, bool in_place) {
  if (!kernel || !nobody_listens()) return {};
  const Tensor bias = bias_.value_or(Tensor()), weight = weight_.value_or(Tensor());
  auto call = call_on(input, bias, weight, rule);
  if (!call || (in_place && (overlap(bias, input) || overlap(weight, input)))) return {};
  if (bias_added) call->bias = nullptr;  // it is there for its gradient alone
  const bool record = at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad({input, bias, weight});
  // Leaves and views are autograd's difficult cases, and in-place PReLU keeps a copy: all in ops/autograd.py.
  if (record && below_autograd()) return {};
  if (in_place && input.is_inference() && !c10::InferenceMode::is_enabled()) return {};
  if (record && in_place && (rule.learned() || input.is_view())) return {};
  if (record && in_place && input.is_leaf() && input.requires_grad()) return {};
  const Maybe seed = seed_ || !rule.random() ? seed_ : Maybe(new_seed());
  if (!add_seed(*call, rule, seed.value_or(Tensor()))) return {};

  if (record) {
    const Tensor out = Rectify::apply(input, bias_, weight_, seed, *call, rule, in_place)[0];
    // Nobody asks any more what forward wrote to, but compiled autograd refuses a node that still says so.
    if (in_place) static_cast<torch::autograd::CppNode<Rectify> *>(out.grad_fn().get())->ctx_.mark_dirty({});
    return out;
  }
  const Tensor out = in_place ? input : at::empty_like(input);
  forward(*call, input, out, {});
  if (in_place && !input.is_inference()) input.unsafeGetTensorImpl()->bump_version();
  return out;
}

}  // namespace

// `slope`, `first` and `second` are the rule's number and constants.
#define ARGUMENTS \
  "Tensor? bias, Tensor? weight, Tensor? seed, str rule, float lower, float upper, " \
  "int slope, float first, float second, bool bias_added"

template <bool IN_PLACE> auto called(
    const Tensor &input, const Maybe &bias, const Maybe &weight, const Maybe &seed, c10::string_view rule, double lower,
    double upper, int64_t slope, double first, double second, bool bias_added) {
  auto out = run(input, bias, weight, seed, {rule, lower, upper, slope, first, second}, bias_added, IN_PLACE);
  if constexpr (IN_PLACE) return out.has_value();
  else return out;
}

TORCH_LIBRARY(fused_rect_direct, m) {
  m.def("rectify(Tensor input, " ARGUMENTS ") -> Tensor?", called<false>);
  m.def("rectify_(Tensor(a!) input, " ARGUMENTS ") -> bool", called<true>);
}

// Where rectify.cpp's entry is; until it is known, everything is out of the ordinary.
extern "C" void fused_rect_direct(int (*entry)(const Call *)) { kernel = entry; }

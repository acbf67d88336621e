// A call of the op, and that of a layer: a map and the rectifier on its output.
#pragma once
#include "autograd.h"

namespace {

// `bits`: where they are wanted beside the output, of a call that is not recorded.
std::optional<Tensor> run(
    const Tensor &input, const Tensor &bias, const Tensor &weight, Tensor seed, const Rule &rule, bool bias_added,
    bool in_place, Tensor *bits = nullptr) {
  if (!nobody_listens()) return {};
  auto call = call_on(input, bias, weight, rule);
  if (!call || (in_place && (overlap(bias, input) || overlap(weight, input)))) return {};
  if (bias_added) call->bias = nullptr;  // it is there for its gradient alone
  const bool recorded =
      gradients_are_wanted() && torch::autograd::any_variable_requires_grad({input, bias, weight});
  // Leaves and views are autograd's difficult cases, and in-place PReLU keeps a copy: all in ops/autograd.py.
  if (recorded && below_autograd()) return {};
  if (in_place && input.is_inference() && !c10::InferenceMode::is_enabled()) return {};
  if (recorded && in_place && (rule.learned() || input.is_view())) return {};
  if (recorded && in_place && input.is_leaf() && input.requires_grad()) return {};
  call->value = input.const_data_ptr(), call->out = in_place ? (void *)call->value : nullptr;
  const bool draw = draws(rule, seed);
  // A new seed lies as aligned as this does.
  if (draw) call->seed = (const int64_t *)64;
  else if (!add_seed(*call, input, rule, seed)) return {};
  if (!prepare(*call, input, rule, {}, bits || (recorded && !rule.learned()))) return {};
  if (draw) seed = new_seed(input), call->seed = seed.const_data_ptr<int64_t>();

  if (recorded) return record(input, bias, weight, seed, *call, rule, in_place);
  const Tensor out = in_place ? input : new_tensor(input, input.sizes(), input.strides(), input.scalar_type());
  if (bits) *bits = new_vector(input, (call->n + 7) / 8, at::kByte);
  forward(*call, input, out, bits ? *bits : Tensor());
  if (in_place && !input.is_inference()) input.unsafeGetTensorImpl()->bump_version();
  return out;
}

// As run, of a tensor that is there already: what `run` leaves to Python goes there through the dispatcher.
Tensor finished(
    const Tensor &z, const Tensor &bias, const Tensor &weight, Tensor seed, const Rule &rule, bool bias_added) {
  const bool recorded =
      gradients_are_wanted() && torch::autograd::any_variable_requires_grad({z, bias, weight});
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
  if (!nobody_listens() || (gradients_are_wanted() && below_autograd()) || under_autocast(input)) return {};
  if (!plain(input) || type_of(input.scalar_type()) < 0) return {};
  for (const Tensor *const t : {&map_weight, &bias, &weight}) {
    if (!t->defined()) continue;
    if (!plain(*t) || t->scalar_type() != input.scalar_type() || t->device() != input.device()) return {};
  }
  const int64_t dims = geometry ? (int64_t)geometry->stride.size() + 2 : 2;
  if (map_weight.dim() != dims || (geometry ? input.dim() != dims : input.dim() < 2)) return {};
  if (bias.defined() && bias.dim() != 1) return {};

  const bool of_bias = bias.defined() && gradients_are_wanted() && bias.requires_grad();
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

}  // namespace

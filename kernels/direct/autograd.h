// Forward and backward, and the node by which autograd reaches the latter: ops/autograd.py's _Rectify in C++.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/version.h>

#include <tuple>

#include "running.h"

namespace {

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

// `kept`: the bits, or the input; `strides`: those of the output, whose memory the bits follow. None: Python's to do.
std::optional<Gradients> backward_here(
    Tensor grad, const Tensor &kept, const Tensor &bias, const Tensor &weight, const Tensor &seed, const Rule &rule,
    const Need &need, at::IntArrayRef strides, bool in_place = false) {
  if (!nobody_listens()) return {};
  const bool is_bits = kept.scalar_type() == at::kByte;
  const bool fit =
      is_bits ? kept.dim() == 1 && kept.numel() == (grad.numel() + 7) / 8 && kept.is_contiguous() && !rule.learned()
              : kept.scalar_type() == grad.scalar_type() && kept.sizes() == grad.sizes() && kept.strides() == strides;
  if (!fit || !plain(kept) || kept.device() != grad.device() || !plain(grad)) return {};
  const at::AutoDispatchBelowADInplaceOrView below;
  if (grad.strides() != strides)  // an expanded one, say
    grad = at::empty_strided(grad.sizes(), strides, grad.options()).copy_(grad);
  auto found = call_on(grad, bias, weight, rule);
  if (!found) return {};
  Ready &c = *found;
  c.grad = grad.const_data_ptr();
  if (is_bits) c.bits = (uint8_t *)kept.const_data_ptr();
  else c.value = kept.const_data_ptr();
  if (in_place) c.out = grad.mutable_data_ptr();
  if (!add_seed(c, grad, rule, seed) || !prepare(c, grad, rule, need, is_bits)) return {};
  Gradients to{in_place ? grad : new_tensor(grad, grad.sizes(), grad.strides(), grad.scalar_type()), {}, {}};
  auto &[grad_input, grad_bias, grad_weight] = to;
  if (need.bias) {
    grad_bias = new_vector(grad, channels_of(grad), *need.bias);
    c.bias_sum = grad_bias.mutable_data_ptr(), c.bias_sum_type = type_of(*need.bias);
  }
  if (need.weight) grad_weight = at::empty_like(weight), c.weight_sum = grad_weight.mutable_data_ptr();
  c.out = grad_input.mutable_data_ptr();
  execute(c, grad, grad_weight);
  if (in_place) grad.unsafeGetTensorImpl()->bump_version();
  return to;
}

Gradients backward(
    const Tensor &grad, const Tensor &kept, const Tensor &bias, const Tensor &weight, const Tensor &seed,
    const Rule &rule, const Need &need, at::IntArrayRef strides) {
  if (!at::GradMode::is_enabled() && !(grad.is_cuda() && ask([](auto) { return hooked(); })))
    if (auto found = backward_here(grad, kept, bias, weight, seed, rule, need, strides)) return *found;
  return by_dispatcher(grad, kept, bias, weight, seed, rule, need, strides);
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

}  // namespace

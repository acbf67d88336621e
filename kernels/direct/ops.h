// The ops themselves, as compiled graphs call them: at the dispatcher's Autograd keys of CPU and CUDA tensors, where no
// derivative is wanted. Everything else goes on to Python's kernels, which are registered for every Autograd key.
#pragma once
#include <ATen/ThreadLocalPythonObjects.h>
#include <torch/library.h>

#include <set>

#include "layers.h"

namespace {

using Stack = torch::jit::Stack;
using Given = c10::ArrayRef<c10::IValue>;

// backends/__init__.py's choice of an implementation: a thread's own, else the process's. Names are compared as
// objects.
struct Choice {
  std::string key;
  PyObject *chosen, *any, *native, *triton;

  bool is(bool is_cuda) const {
    using Own = at::impl::ThreadLocalPythonObjects;
    PyObject *const wanted = Own::contains(key) ? Own::get(key)->ptr(getPyInterpreter()) : chosen;
    return wanted == any || wanted == (is_cuda ? triton : native);
  }
} *choice = nullptr;

Tensor tensor_at(Given given, size_t place) { return given[place].isNone() ? Tensor() : given[place].toTensor(); }

// The rule whose name and bounds begin at `place`.
Rule rule_at(Given given, size_t place) {
  return rule_of(given[place].toStringRef(), given[place + 1].toDouble(), given[place + 2].toDouble());
}

// Whether a layout was asked for, and which; false: as Python has it.
bool layout_at(Given given, size_t place, const Tensor &like, at::DimVector &strides) {
  if (given[place].isNone()) return true;
  if (!given[place].isIntList()) return false;
  strides = given[place].toDimVector();
  return (int64_t)strides.size() == like.dim();
}

// Where C++ serves calls on such tensors, and the call is not one for autograd. Who listens is asked before anything is
// read of a tensor: while a compiler traces, sizes and strides may be symbols, which would become numbers by it.
bool is_ours(const Tensor &input, const variable_list &differentiable) {
  if (!nobody_listens() || !(input.is_cpu() || input.is_cuda()) || !choice->is(input.is_cuda())) return false;
  if (at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(differentiable)) return false;
  return !input.is_cuda() || (host && !ask([](auto) { return hooked(); }));
}

// ops/__init__.py's rectify, rectify_, rectify_bits and rectify_bits_: whether the call is served, with its results.
template <bool IN_PLACE, bool BITS> bool forward_op(Given given, Stack &results) {
  const Tensor input = tensor_at(given, 0), bias = tensor_at(given, 1), weight = tensor_at(given, 2);
  const Tensor seed = tensor_at(given, 3);
  if (!is_ours(input, {input, bias, weight})) return false;
  if constexpr (BITS) {
    at::DimVector strides;
    if (!layout_at(given, 8, input, strides) || (!strides.empty() && input.strides() != strides)) return false;
  }
  const Rule rule = rule_at(given, 4);
  if (draws(rule, seed) || (BITS && rule.learned())) return false;
  Tensor bits;
  auto out = run(input, bias, weight, seed, rule, given[7].toBool(), IN_PLACE, BITS ? &bits : nullptr);
  if (!out) return false;
  if constexpr (!IN_PLACE) results.emplace_back(std::move(*out));
  if constexpr (BITS) results.emplace_back(std::move(bits));
  return true;
}

// ops/__init__.py's rectify_backward, and compile/in_place.py's rectify_backward_.
template <bool IN_PLACE> bool backward_op(Given given, Stack &results) {
  const Tensor grad = tensor_at(given, 0), kept = tensor_at(given, 1), bias = tensor_at(given, 2);
  const Tensor weight = tensor_at(given, 3);
  at::DimVector strides;
  if (!is_ours(grad, {grad, kept, bias, weight}) || !layout_at(given, 10, grad, strides)) return false;
  const Rule rule = rule_at(given, 5);
  if (strides.empty()) {
    const Tensor &like = rule.learned() ? kept : grad;
    strides.assign(like.strides().begin(), like.strides().end());
  }
  if (IN_PLACE && grad.strides() != strides) return false;
  const Need need{given[8].toOptional<at::ScalarType>(), given[9].toBool()};
  auto found = backward_here(grad, kept, bias, weight, tensor_at(given, 4), rule, need, strides, IN_PLACE);
  if (!found) return false;
  // An op cannot return None: an absent gradient is an empty tensor.
  const auto there = [&](Tensor &t) { return t.defined() ? std::move(t) : new_vector(grad, 0, grad.scalar_type()); };
  auto &[of_input, of_bias, of_weight] = *found;
  if constexpr (!IN_PLACE) results.emplace_back(std::move(of_input));
  results.emplace_back(there(of_bias));
  results.emplace_back(there(of_weight));
  return true;
}

// What the dispatcher calls. Others are served by Python's kernel of the other devices' Autograd key or, where the op
// has none, below autograd.
template <bool (*SERVE)(Given, Stack &), bool HAS_AUTOGRAD = true>
void op_of(const c10::OperatorHandle &op, c10::DispatchKeySet keys, Stack *stack) {
  const size_t count = op.schema().arguments().size();
  Stack results;
  if (SERVE(torch::jit::last(*stack, count), results)) {
    torch::jit::drop(*stack, count);
    for (auto &result : results) stack->push_back(std::move(result));
  } else {
    const auto below = keys & c10::after_autograd_keyset;
    op.redispatchBoxed(HAS_AUTOGRAD ? c10::DispatchKeySet(c10::DispatchKey::AutogradOther) : below, stack);
  }
}

// Once for each kind of device; never undone.
void register_ops(c10::DispatchKey key) {
  static auto *const there = new std::set<c10::DispatchKey>;
  if (!there->insert(key).second) return;
  auto &library = *new torch::Library(torch::Library::IMPL, "fused_rect", key, __FILE__, __LINE__);
  using torch::CppFunction;
  library.impl("rectify", CppFunction::makeFromBoxedFunction<op_of<forward_op<false, false>>>());
  library.impl("rectify_", CppFunction::makeFromBoxedFunction<op_of<forward_op<true, false>>>());
  library.impl("rectify_bits", CppFunction::makeFromBoxedFunction<op_of<forward_op<false, true>>>());
  library.impl("rectify_bits_", CppFunction::makeFromBoxedFunction<op_of<forward_op<true, true>>>());
  library.impl("rectify_backward", CppFunction::makeFromBoxedFunction<op_of<backward_op<false>>>());
  library.impl("rectify_backward_", CppFunction::makeFromBoxedFunction<op_of<backward_op<true>, false>>());
}

}  // namespace

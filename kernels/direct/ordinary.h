// What a call may be served with: who listens, which tensors are ordinary, and what a kernel is to be given of them. What
// is out of the ordinary is Python's.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <limits>
#include <optional>
#include <string_view>

#include "../cpu/call.h"
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
PyObject *numbers_of = nullptr;         // rules.py's numbers, of a rule's name and bounds
PyObject *device_context = nullptr;     // the type of torch.device as a context, which says where new tensors go

// rules.py's Rule, and its number and constants.
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

bool below_autograd() { return c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradFunctionality); }

// Whether autograd would record a call, unless it is below autograd. In inference mode it records nothing, whatever
// `torch.enable_grad()` inside of it says.
bool gradients_are_wanted() { return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled(); }

bool under_autocast(const Tensor &t) {
  return !c10::impl::tls_is_dispatch_key_excluded(
      t.is_cuda() ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU);
}

// A dense tensor's keys and no others: not fake, functional, batched, negated, quantized, nested, sparse, of a subclass
// or of another kind of device; and no tangent of forward-mode AD. Asked where nobody listens: a mode would make another
// tensor of the one that is made here.
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

}  // namespace

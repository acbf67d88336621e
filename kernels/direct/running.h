// A kernel run on what it was given: rectify.cpp's entry on CPU tensors, a plan's launches on CUDA tensors.
#pragma once
#include <bit>
#include <string>

#include "ordinary.h"

namespace {

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

// The rule of this name, which is the caller's to keep, and these bounds.
Rule rule_of(std::string_view name, double lower, double upper) {
  using Name = std::tuple<std::string, int64_t, int64_t>;
  using Numbers = std::tuple<int64_t, double, double>;
  static auto *const known = new std::map<Name, Numbers>;
  const auto bits = [](double number) { return std::bit_cast<int64_t>(number); };  // 0 and -0 are two bounds
  const Name key(name, bits(lower), bits(upper));
  const auto [slope, first, second] = cuda::Known::all().get(*known, key, [&] {
    return ask([&](py::handle) { return py::handle(numbers_of)(py::cast(name), lower, upper).cast<Numbers>(); });
  });
  return {name, lower, upper, slope, first, second};
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

}  // namespace

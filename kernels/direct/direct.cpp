// Calls of the ops without Python in between: the checks, allocations and autograd node of fused_rect/ops in C++, for
// CPU tensors, whose kernel is rectify.cpp's, and for CUDA tensors, whose kernels Triton compiled. What is out of the
// ordinary is left to Python: `rectify` returns None and `rectify_` False, before anything is written. An autograd
// Function in Python costs 25 us of a training step whatever it computes, as much as a small convolution, and a launch
// of Triton's 14, four times the work of a small layer on a GPU.
//
// Built by cpu/build.py against torch's and Python's headers; where that fails, Python serves, more slowly for small
// tensors.
#include "ops.h"

namespace {

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

// rules.py's Parameters and Rule.
struct Asked {
  Tensor bias, weight, seed;
  Rule rule;

  // Whether these tensors can be served. The rule's name is Python's to keep.
  bool is(PyObject *parameters, PyObject *of_rule) {
    TORCH_CHECK_TYPE(
        PyTuple_Check(parameters) && PyTuple_GET_SIZE(parameters) == 3 && PyTuple_Check(of_rule) &&
            PyTuple_GET_SIZE(of_rule) == 3,
        "expected parameters and a rule");
    PyObject *const *p = &PyTuple_GET_ITEM(parameters, 0), *const *r = &PyTuple_GET_ITEM(of_rule, 0);
    if (!tensor_of(p[0], bias) || !tensor_of(p[1], weight) || !tensor_of(p[2], seed)) return false;
    const char *name = PyUnicode_AsUTF8(r[0]);
    if (!name) throw python_error();
    rule = rule_of(name, number(r[1]), number(r[2]));
    return true;
  }

  // Whether the parameters have the input's type, or autocast is on: checks.py's check_dtypes.
  bool fit(const Tensor &input) const {
    const auto same = [&](const Tensor &t) { return !t.defined() || t.scalar_type() == input.scalar_type(); };
    return (same(bias) && same(weight)) || under_autocast(input);
  }
};

// Whether calls on such a tensor are those of `self`, the kind of device, and are not forced to go another way.
bool is_of(PyObject *self, const Tensor &input) {
  if (!input.defined() || !choice) return false;
  return self == Py_True ? input.is_cuda() && choice->is(true) && !hooked() : input.is_cpu() && choice->is(false);
}

// rectify(input, parameters, rule, bias_added)
template <bool IN_PLACE> PyObject *called(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "expected input, parameters, rule, bias_added");
  Tensor input;
  Asked a;
  std::optional<Tensor> out;
  if (tensor_of(given[0], input) && is_of(self, input) && a.is(given[1], given[2]) && a.fit(input)) {
    const bool bias_added = given[3] == Py_True;
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

// layer(input, attributes of the map, map_adds_bias, parameters, rule)
PyObject *layer(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 5 && PyDict_Check(given[1]), "expected input, attributes, map_adds_bias, parameters, rule");
  Tensor input;
  Map map;
  Asked a;
  std::optional<Tensor> out;
  if (tensor_of(given[0], input) && is_of(self, input) && map.is(given[1]) && a.is(given[3], given[4])) {
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
PyObject *fused_rect_direct(PyObject *is_cuda, PyObject *type_of_device_context, PyObject *numbers) {
  device_context = Py_NewRef(type_of_device_context), numbers_of = Py_NewRef(numbers);
  return Py_BuildValue(
      "(NNN)", PyCFunction_New(&methods[0], is_cuda), PyCFunction_New(&methods[1], is_cuda),
      PyCFunction_New(&methods[2], is_cuda));
}

void fused_rect_direct_cpu(int (*entry)(const Call *)) { kernel = entry; }

// The ops of CPU tensors, or of CUDA tensors, at the dispatcher; the names are objects that live as long as the process.
void fused_rect_direct_ops(
    int is_cuda, const char *key, PyObject *chosen, PyObject *any, PyObject *native, PyObject *triton) {
  if (!choice) choice = new Choice{key, Py_NewRef(chosen), Py_NewRef(any), Py_NewRef(native), Py_NewRef(triton)};
  register_ops(is_cuda ? c10::DispatchKey::AutogradCUDA : c10::DispatchKey::AutogradCPU);
}

// How many plans are kept.
void fused_rect_direct_keep(size_t most) { cuda::Known::all().most = most; }

// Whether CUDA's driver is there.
int fused_rect_direct_cuda(PyObject *h, PyObject *r, PyObject *k) {
  if (!cuda::driver().found) return false;
  if (!host) runtime = Py_NewRef(r), kernels = Py_NewRef(k), host = Py_NewRef(h);
  return true;
}
}

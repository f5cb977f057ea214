// The Python module: importing it loads the library, which registers the operators. [torch, Python]
#include "common/python.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace tse {

std::vector<PyMethodDef>& python_methods() {
  static std::vector<PyMethodDef> methods;
  return methods;
}

namespace impl {

bool is_tensor(PyObject* o) { return THPVariable_CheckExact(o); }
const at::Tensor& tensor_of(PyObject* o) { return THPVariable_Unpack(o); }
PyObject* to_python(at::Tensor t) { return THPVariable_Wrap(std::move(t)); }
void throw_python_error() { throw python_error(); }
bool is_dtype(PyObject* o) { return THPDtype_Check(o); }
at::ScalarType dtype_of(PyObject* o) { return reinterpret_cast<THPDtype*>(o)->scalar_type; }

PyObject* guarded(PyObject* (*call)(PyObject* const* args), PyObject* const* args) {
  HANDLE_TH_ERRORS
  if (at::impl::torch_function_mode_enabled()) Py_RETURN_NOTIMPLEMENTED;
  return call(args);
  END_HANDLE_TH_ERRORS
}

}  // namespace impl
}  // namespace tse

PyMODINIT_FUNC PyInit__C() {
  auto& methods = tse::python_methods();
  methods.push_back({nullptr, nullptr, 0, nullptr});
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods.data(), nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

// The Python module: importing it loads the library, which registers the operators. [torch, Python]
#include "common/python.h"

namespace tse {

std::vector<PyMethodDef>& python_methods() {
  static std::vector<PyMethodDef> methods;
  return methods;
}

}  // namespace tse

PyMODINIT_FUNC PyInit__C() {
  auto& methods = tse::python_methods();
  methods.push_back({nullptr, nullptr, 0, nullptr});
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods.data(), nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

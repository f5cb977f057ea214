// The short way from Python into the dispatcher. [torch, Python]
//
// torch.ops parses arguments by schema, which costs as much as a small operator. For plain tensors a function of this
// module calls the same operator handle directly; whatever else comes (tensor subclasses, modes) is answered with
// NotImplemented, and the Python function takes torch.ops.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/operator.h"

namespace tse {

// The functions of the Python module, one for each operator of define_public.
std::vector<PyMethodDef>& python_methods();

namespace impl {

template <class T>
struct FromPython;
template <>
struct FromPython<at::Tensor> {
  static bool check(PyObject* o) { return THPVariable_CheckExact(o); }
  static const at::Tensor& convert(PyObject* o) { return THPVariable_Unpack(o); }
};
template <>
struct FromPython<int64_t> {
  static bool check(PyObject* o) {
    int overflow = 1;
    if (PyLong_CheckExact(o)) PyLong_AsLongLongAndOverflow(o, &overflow);
    return overflow == 0;
  }
  static int64_t convert(PyObject* o) {
    const int64_t value = PyLong_AsLongLong(o);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
};
template <>
struct FromPython<double> {
  // Ints, too, where they are exact, and classes derived from float, as NumPy's float64.
  static bool check(PyObject* o) { return PyFloat_Check(o) || FromPython<int64_t>::check(o); }
  static double convert(PyObject* o) { return PyFloat_Check(o) ? PyFloat_AS_DOUBLE(o) : PyLong_AsDouble(o); }
};
template <class T>
struct FromPython<std::optional<T>> {
  static bool check(PyObject* o) { return o == Py_None || FromPython<T>::check(o); }
  static std::optional<T> convert(PyObject* o) {
    return o == Py_None ? std::nullopt : std::optional<T>(FromPython<T>::convert(o));
  }
};
template <>
struct FromPython<c10::SymInt> : FromPython<int64_t> {};
template <>
struct FromPython<std::string_view> {
  static bool check(PyObject* o) { return PyUnicode_CheckExact(o); }
  static std::string_view convert(PyObject* o) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(o, &size);
    if (text == nullptr) throw python_error();
    return {text, static_cast<size_t>(size)};
  }
};

inline PyObject* to_python(at::Tensor t) { return THPVariable_Wrap(std::move(t)); }

template <class... T>
PyObject* to_python(std::tuple<T...> results) {
  const pybind11::object tuple = pybind11::reinterpret_steal<pybind11::object>(PyTuple_New(sizeof...(T)));
  if (!tuple) throw python_error();
  Py_ssize_t i = 0;
  std::apply([&](auto&... r) { (PyTuple_SET_ITEM(tuple.ptr(), i++, to_python(std::move(r))), ...); }, results);
  return tuple.inc_ref().ptr();
}

// Operator<kernel> as a function of positional arguments.
template <auto kernel, class Signature = typename Operator<kernel>::Signature>
struct PythonFunction;
template <auto kernel, class Result, class... Args>
struct PythonFunction<kernel, Result(Args...)> {
  template <size_t... I>
  static PyObject* call_operator(PyObject* const* args, std::index_sequence<I...>) {
    if (!(FromPython<Bare<Args>>::check(args[I]) && ...)) Py_RETURN_NOTIMPLEMENTED;
    const std::tuple<decltype(FromPython<Bare<Args>>::convert(nullptr))...> values(
        FromPython<Bare<Args>>::convert(args[I])...);
    const auto& op = Operator<kernel>::handle();
    Result result;
    {
      const pybind11::gil_scoped_release no_gil;
      result = op.call(std::get<I>(values)...);
    }
    return to_python(std::move(result));
  }

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (count != sizeof...(Args) || at::impl::torch_function_mode_enabled()) Py_RETURN_NOTIMPLEMENTED;
    return call_operator(args, std::index_sequence_for<Args...>());
    END_HANDLE_TH_ERRORS
  }
};

}  // namespace impl

// An operator for users: differentiable, and a function of the Python module.
template <auto kernel, auto autograd>
void define_public(torch::Library& m, const char* name, const std::string& schema) {
  define<kernel>(m, name, schema);
  implement<autograd>(m, name, c10::DispatchKey::Autograd);
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(impl::PythonFunction<kernel>::call));
  python_methods().push_back({name, function, METH_FASTCALL, nullptr});
}

}  // namespace tse

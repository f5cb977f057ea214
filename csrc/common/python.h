// The short way from Python into the dispatcher. [torch, Python]
//
// torch.ops parses arguments by schema, which costs as much as a small operator. For plain tensors a function of this
// module calls the same operator handle directly; whatever else comes (tensor subclasses, modes) is answered with
// NotImplemented, and the Python function takes torch.ops. What needs torch's Python headers, which take five seconds
// to compile, is in python.cpp.
#pragma once
#include <Python.h>

#include <memory>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/operator.h"

namespace tse {

// The functions of the Python module, one for each operator of define_public.
std::vector<PyMethodDef>& python_methods();

namespace impl {

bool is_tensor(PyObject* o);  // of no subclass
const at::Tensor& tensor_of(PyObject* o);
PyObject* to_python(at::Tensor t);
[[noreturn]] void throw_python_error();
bool is_dtype(PyObject* o);
at::ScalarType dtype_of(PyObject* o);
// call(args), with C++ exceptions made Python's; NotImplemented under a mode of torch functions.
PyObject* guarded(PyObject* (*call)(PyObject* const* args), PyObject* const* args);

struct NoGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~NoGil() { PyEval_RestoreThread(state); }
};

template <class T>
struct FromPython;
template <>
struct FromPython<at::Tensor> {
  static bool check(PyObject* o) { return is_tensor(o); }
  static const at::Tensor& convert(PyObject* o) { return tensor_of(o); }
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
    if (value == -1 && PyErr_Occurred()) throw_python_error();
    return value;
  }
};
template <>
struct FromPython<double> {
  // Ints, too, where they are exact, and classes derived from float, as NumPy's float64.
  static bool check(PyObject* o) { return PyFloat_Check(o) || FromPython<int64_t>::check(o); }
  static double convert(PyObject* o) { return PyFloat_Check(o) ? PyFloat_AS_DOUBLE(o) : PyLong_AsDouble(o); }
};
template <>
struct FromPython<at::ScalarType> {
  static bool check(PyObject* o) { return is_dtype(o); }
  static at::ScalarType convert(PyObject* o) { return dtype_of(o); }
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
    if (text == nullptr) throw_python_error();
    return {text, static_cast<size_t>(size)};
  }
};

template <class... T>
PyObject* to_python(std::tuple<T...> results) {
  std::unique_ptr<PyObject, decltype(&Py_DecRef)> tuple(PyTuple_New(sizeof...(T)), Py_DecRef);
  if (tuple == nullptr) throw_python_error();
  Py_ssize_t i = 0;
  std::apply([&](auto&... r) { (PyTuple_SET_ITEM(tuple.get(), i++, to_python(std::move(r))), ...); }, results);
  return tuple.release();
}

// Operator<kernel> as a function of positional arguments.
template <auto kernel, class Signature = typename Operator<kernel>::Signature>
struct PythonFunction;
template <auto kernel, class Result, class... Args>
struct PythonFunction<kernel, Result(Args...)> {
  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != sizeof...(Args)) Py_RETURN_NOTIMPLEMENTED;
    return guarded([](PyObject* const* args) { return call_operator(args, std::index_sequence_for<Args...>()); }, args);
  }

  template <size_t... I>
  static PyObject* call_operator(PyObject* const* args, std::index_sequence<I...>) {
    if (!(FromPython<Bare<Args>>::check(args[I]) && ...)) Py_RETURN_NOTIMPLEMENTED;
    const std::tuple<decltype(FromPython<Bare<Args>>::convert(nullptr))...> values(
        FromPython<Bare<Args>>::convert(args[I])...);
    const auto& op = Operator<kernel>::handle();
    Result result;
    {
      const NoGil no_gil;
      result = op.call(std::get<I>(values)...);
    }
    return to_python(std::move(result));
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

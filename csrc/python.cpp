// The short way from Python into the dispatcher. [torch, Python]
//
// torch.ops parses arguments by schema, which costs as much as a small operator. For plain tensors this module calls
// the same operator handle directly; whatever else comes (tensor subclasses, modes) is answered with NotImplemented,
// and the Python function takes torch.ops. Importing the library also registers the operators.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <optional>
#include <string_view>
#include <tuple>

namespace tse {
namespace {

template <class T>
struct FromPython;
template <>
struct FromPython<const at::Tensor&> {
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
struct FromPython<const std::optional<at::Tensor>&> {
  static bool check(PyObject* o) { return o == Py_None || THPVariable_CheckExact(o); }
  static std::optional<at::Tensor> convert(PyObject* o) {
    return o == Py_None ? std::nullopt : std::optional<at::Tensor>(THPVariable_Unpack(o));
  }
};
template <>
struct FromPython<c10::SymInt> {
  static bool check(PyObject* o) { return FromPython<int64_t>::check(o); }
  static c10::SymInt convert(PyObject* o) { return FromPython<int64_t>::convert(o); }
};
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

PyObject* to_python(at::Tensor t) { return THPVariable_Wrap(std::move(t)); }

template <class... T>
PyObject* to_python(std::tuple<T...> results) {
  const pybind11::object tuple = pybind11::reinterpret_steal<pybind11::object>(PyTuple_New(sizeof...(T)));
  if (!tuple) throw python_error();
  Py_ssize_t i = 0;
  std::apply([&](auto&... r) { (PyTuple_SET_ITEM(tuple.ptr(), i++, to_python(std::move(r))), ...); }, results);
  return tuple.inc_ref().ptr();
}

// One operator, Result(Args...), as a function of positional arguments.
template <const char* kName, class Result, class... Args>
struct Function {
  template <size_t... I>
  static PyObject* call(PyObject* const* args, std::index_sequence<I...>) {
    if (!(FromPython<Args>::check(args[I]) && ...)) Py_RETURN_NOTIMPLEMENTED;
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kName, "").typed<Result(Args...)>();
    const std::tuple<decltype(FromPython<Args>::convert(nullptr))...> values(FromPython<Args>::convert(args[I])...);
    Result result;
    {
      const pybind11::gil_scoped_release no_gil;
      result = op.call(std::get<I>(values)...);
    }
    return to_python(std::move(result));
  }

  static PyObject* from_python(PyObject*, PyObject* const* args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (count != sizeof...(Args) || at::impl::torch_function_mode_enabled()) Py_RETURN_NOTIMPLEMENTED;
    return call(args, std::index_sequence_for<Args...>());
    END_HANDLE_TH_ERRORS
  }

  static PyMethodDef method() {  // the name behind the namespace
    const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(from_python));
    return {std::strchr(kName, ':') + 2, function, METH_FASTCALL, nullptr};
  }
};

constexpr char kCrossEntropy[] = "torch_softmax_ext::cross_entropy";
constexpr char kCrossEntropyWithMetrics[] = "torch_softmax_ext::cross_entropy_with_metrics";
constexpr char kLinearCrossEntropy[] = "torch_softmax_ext::linear_cross_entropy";
constexpr char kSelectiveLogSoftmax[] = "torch_softmax_ext::selective_log_softmax";
constexpr char kSelectiveLogSoftmaxWithEntropy[] = "torch_softmax_ext::selective_log_softmax_with_entropy";
constexpr char kSparsemax[] = "torch_softmax_ext::sparsemax";

}  // namespace
}  // namespace tse

PyMODINIT_FUNC PyInit__C() {
  using at::Tensor;
  using Two = std::tuple<Tensor, Tensor>;
  using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  using OptionalTensor = std::optional<Tensor>;
  using OptionalDouble = std::optional<double>;
  static PyMethodDef methods[] = {
      tse::Function<tse::kCrossEntropy, Tensor, const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                    std::string_view, double, double, OptionalDouble, double>::method(),
      tse::Function<tse::kCrossEntropyWithMetrics, Five, const Tensor&, const Tensor&, const OptionalTensor&, int64_t,
                    std::string_view, double, double, OptionalDouble, double>::method(),
      tse::Function<tse::kLinearCrossEntropy, Tensor, const Tensor&, const Tensor&, const Tensor&,
                    const OptionalTensor&, const OptionalTensor&, int64_t, std::string_view, double, double,
                    OptionalDouble, double, std::optional<c10::SymInt>>::method(),
      tse::Function<tse::kSelectiveLogSoftmax, Tensor, const Tensor&, const Tensor&, double, OptionalDouble>::method(),
      tse::Function<tse::kSelectiveLogSoftmaxWithEntropy, Two, const Tensor&, const Tensor&, double,
                    OptionalDouble>::method(),
      tse::Function<tse::kSparsemax, Tensor, const Tensor&, int64_t>::method(),
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

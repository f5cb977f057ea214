// How an operator is defined and called below autograd, both by the function that is its kernel. [torch]
//
// A kernel takes tensors, then options, and serves CPU, CUDA and Meta: of meta tensors, whose sizes may be symbolic, it
// checks what it checks and returns the shapes. Where its last parameter is a struct of options, the schema has the
// fields of that struct one by one, in the order of its member fields(), a std::tie of all of them.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

namespace tse {

using OptionalTensor = std::optional<at::Tensor>;

// A tensor with memory that no tracer, mode or subclass watches: kernels may be called without the dispatcher.
inline bool is_plain(const at::Tensor& t) {
  // Excluded keys count, too: inside a transform its own is.
  const auto keys = t.key_set() | c10::impl::tls_local_dispatch_key_set().included_;
  constexpr c10::DispatchKeySet kWatchers(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::PythonDispatcher,
       c10::DispatchKey::Functionalize, c10::DispatchKey::PreDispatch, c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched,
       c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
  return (t.is_cpu() || t.is_cuda()) && !keys.has_any(kWatchers);
}
inline bool is_plain(const OptionalTensor& t) { return !t.has_value() || is_plain(*t); }

namespace impl {

template <class T>
using Bare = std::remove_cv_t<std::remove_reference_t<T>>;
template <class T>
constexpr bool kIsTensor = std::is_same_v<Bare<T>, at::Tensor> || std::is_same_v<Bare<T>, OptionalTensor>;
// The type of a field among the arguments of a function that torch registers.
template <class T>
using Argument = std::conditional_t<kIsTensor<T>, const Bare<T>&, Bare<T>>;

// The fields of a struct of options; of whatever else, itself.
template <class T, class = void>
struct FieldsOf {
  static std::tuple<const T&> get(const T& value) { return {value}; }
};
template <class T>
struct FieldsOf<T, std::void_t<decltype(&T::fields)>> {
  static auto get(const T& options) { return options.fields(); }
};
template <class T>
using Fields = decltype(FieldsOf<T>::get(std::declval<const T&>()));

template <class... T>
struct Types {};

// Moves parameters to Head until one is left, whose fields become parameters of their own.
template <auto function, class Result, class Head, class Fields, class Last>
struct Flat;
template <auto function, class Result, class Head, class... Rest>
struct Split;
template <auto function, class Result, class Head, class Last>
struct Split<function, Result, Head, Last> : Flat<function, Result, Head, Fields<Bare<Last>>, Bare<Last>> {};
template <auto function, class Result, class... Head, class A, class B, class... Rest>
struct Split<function, Result, Types<Head...>, A, B, Rest...> : Split<function, Result, Types<Head..., A>, B, Rest...> {
};

// `function` by the arguments of its schema.
template <auto function, class Result, class... Head, class... Field, class Last>
struct Flat<function, Result, Types<Head...>, std::tuple<Field...>, Last> {
  using Signature = Result(Head..., Argument<Field>...);
  using Handle = c10::TypedOperatorHandle<Signature>;
  static Result call(Head... head, Argument<Field>... field) { return function(head..., Last{field...}); }
  static Result call_handle(const Handle& op, Head... head, const Last& last) {
    return std::apply([&](const auto&... field) { return op.call(head..., field...); }, FieldsOf<Last>::get(last));
  }
};

template <auto function, class Signature = decltype(function)>
struct FlatOf;
template <auto function, class Result, class... Parameters>
struct FlatOf<function, Result (*)(Parameters...)> : Split<function, Result, Types<>, Parameters...> {};

}  // namespace impl

// Whether all tensors among the arguments, and in their options, are plain.
template <class... Arguments>
bool all_plain(const Arguments&... arguments) {
  const auto is_plain_field = [](const auto& field) {
    if constexpr (impl::kIsTensor<decltype(field)>) return is_plain(field);
    else return true;
  };
  const auto are_plain = [&](const auto&... field) { return (is_plain_field(field) && ...); };
  return (std::apply(are_plain, impl::FieldsOf<Arguments>::get(arguments)) && ...);
}

template <auto kernel>
struct Operator {
  using Flat = impl::FlatOf<kernel>;
  using Signature = typename Flat::Signature;
  static inline const char* name = nullptr;

  static const typename Flat::Handle& handle() {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow((std::string("torch_softmax_ext::") + name).c_str(), "")
                               .typed<Signature>();
    return op;
  }

  // With all that dispatch does.
  template <class... Arguments>
  static auto dispatch(const Arguments&... arguments) {
    return Flat::call_handle(handle(), arguments...);
  }
  // Below autograd; for plain tensors without the dispatcher, whose time is measurable in small calls.
  template <class... Arguments>
  static auto call(const Arguments&... arguments) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return all_plain(arguments...) ? kernel(arguments...) : dispatch(arguments...);
  }
};

// Arguments of a schema as private operators have them: none has a default or needs its name.
inline std::string without_defaults(std::string schema) {
  if (const size_t star = schema.find("*, "); star != std::string::npos) schema.erase(star, 3);
  for (size_t begin; (begin = schema.find('=')) != std::string::npos;)
    schema.erase(begin, std::min(schema.find(',', begin), schema.size()) - begin);
  return schema;
}

template <auto function>
void implement(torch::Library& m, const char* name, c10::DispatchKey key) {
  m.impl(name, torch::dispatch(key, TORCH_FN(impl::FlatOf<function>::call)));
}

// `schema`: after the name.
template <auto kernel>
void define(torch::Library& m, const char* name, const std::string& schema) {
  Operator<kernel>::name = name;
  m.def((name + schema).c_str(), {at::Tag::pt2_compliant_tag});
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA, c10::DispatchKey::Meta})
    implement<kernel>(m, name, key);
}

}  // namespace tse

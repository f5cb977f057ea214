// Backward of the row maps on CUDA, from their output. [CUDA]
//
// The output is read once by 16 bytes, and kept until the sums of the row are known, in registers or shared memory; of
// grad_output only the vectors that have an element of the support, twice, the second time from cache. The gradient is
// a function of y, g and constants of the row, which are computed of Σ term and Σ s with s = weight(y). A gradient has
//   of_row(p, row)       itself, or what it is for a row
//   kSkipsZeros          zeros of the output have a gradient of 0
//   kCounts              all weights are 1
//   is_inside(y)         whether the element counts; the gradient of others is 0, even where g is infinite. NaN counts
//   weight(y), term(s, g) what is summed of an element: s, and s g or something else
//   constant(sums)       what the gradient needs of them
//   (y, g, constant)     the gradient
//   kSetsApart           the element with the largest weight is left out of the sums: where it has nearly all of the
//                        weight, its g is nearly the mean, and all digits of their difference count
//   is_most(y, s, most)  with kSetsApart: whether a thread sets this element apart; most: the weight of its last one
#pragma once
#include "common/cuda/reduce.cuh"
#include "common/cuda/row.cuh"
#include "common/cuda/support_sum.cuh"
#include "common/exp_sum.h"
#include "common/row_params.h"

namespace tse {

// The sums of a row without the element that is set apart, whose weight is `most` and whose g is `of_most`.
template <class A>
struct ApartTotal {
  double sum, weight;
  A most, of_most;
};
struct JoinApart {
  template <class A>
  __device__ ApartTotal<A> operator()(const ApartTotal<A>& a, const ApartTotal<A>& b) const {
    const bool is_a = a.most > b.most || (a.most == b.most && a.of_most > b.of_most);
    const ApartTotal<A>&larger = is_a ? a : b, &smaller = is_a ? b : a;
    return {(a.sum + b.sum) + double(smaller.most) * double(smaller.of_most), (a.weight + b.weight) + smaller.most,
            larger.most, larger.of_most};
  }
};

// The mean of g, as a sum of two numbers.
template <class A>
struct Mean {
  A hi, lo;
};

// s (g - Σ s g / Σ s), where s = weight(p), an element of Weights, is p^(2 - alpha) on the support.
template <class Weights>
struct WeightedGradient : Weights {
  static constexpr bool kSkipsZeros = true, kSetsApart = !Weights::kCounts;
  __device__ const WeightedGradient& of_row(const RowMapParams&, int64_t) const { return *this; }
  template <class A>
  __device__ static bool is_inside(A p) {
    return !(p <= 0);
  }
  template <class A>
  __device__ static bool is_most(A p, A, A) {
    return p > A(0.5);
  }
  template <class A>
  __device__ static A term(A s, A g) {
    return s * g;
  }
  template <class A>
  __device__ static Mean<A> constant(const ApartTotal<A>& total) {
    const double rest = total.sum - total.of_most * total.weight;
    return {A(total.of_most), A(rest / (total.weight + total.most))};
  }
  template <class A, class S>
  __device__ static Mean<A> constant(const SupportTotal<S, true>& total) {
    return {A(total.sum / S(total.weight)), 0};
  }
  template <class A>
  __device__ A operator()(A p, A g, const Mean<A>& mean) const {
    return this->weight(p) * ((g - mean.hi) - mean.lo);
  }
};

template <class T>
__device__ inline bool all_bits_zero(const Vec<T>& v) {
  const uint4 raw = bits_as<uint4>(v);
  return (raw.x | raw.y | raw.z | raw.w) == 0;
}

template <class T, int kRowThreads, int kVectors, class Gradients>
__global__ void __launch_bounds__(kBlockThreads<kRowThreads>, kBlocksAtLeast<T, kRowThreads, kVectors>)
    row_map_bwd_kernel(RowMapParams p, Gradients gradients, int kept_vectors) {
  using A = Acc<T>;
  TSE_DYNAMIC_SHARED(uint4, kept);
  int turn = 0;
  const int64_t rows = row_count(p.output_rows), g_stride = p.grad_output_rows.stride_n;
  for (int64_t index = first_row<kRowThreads>(); index < rows; index += row_step<kRowThreads>()) {
    const T* const y = static_cast<const T*>(p.output) + row_offset(p.output_rows, index);
    const T* const g = static_cast<const T*>(p.grad_output) + row_offset(p.grad_output_rows, index);
    T* const out = static_cast<T*>(p.grad_input) + row_offset(p.grad_input_rows, index);
    Row<T, kRowThreads, kVectors, 2> row({y, p.output_rows.stride_n}, p.output_rows.n,
                                         kept + threadIdx.x / kRowThreads * kept_vectors, kept_vectors);
    const bool g_alike = is_aligned_like(y, g);
    const auto gradient = gradients.of_row(p, index);
    const auto is_dead = [](const Vec<T>& v) { return Gradients::kSkipsZeros && all_bits_zero(v); };
    row.load();

    // NaN where an output is.
    SupportSum<A, Gradients::kCounts> own;
    A most = 0, of_most = 0;
    const auto add = [&](T of_y, T of_g) {
      const A v = to_acc(of_y), s = gradient.weight(v);
      A grad = to_acc(of_g);
      if (!gradient.is_inside(v)) return;
      if constexpr (Gradients::kCounts) grad += v - v;
      if constexpr (Gradients::kSetsApart) {
        if (gradient.is_most(v, s, most)) {
          if (most > 0) own.add(gradient.term(most, of_most), most);
          most = s;
          of_most = grad;
          return;
        }
      }
      own.add(gradient.term(s, grad), s);
    };
    row.read(
        true,
        [&](int64_t i, const Vec<T>& v) {
          if (is_dead(v)) return;
          const Vec<T> of_g = row.vector_at(g, g_alike, i);
#pragma unroll
          for (int k = 0; k < Vec<T>::kSize; ++k) add(v.v[k], of_g.v[k]);
          own.join_part();
        },
        [&](int64_t i, T v) {
          add(v, g[i * g_stride]);
          own.join_part();
        });
    const auto constant = [&] {
      if constexpr (Gradients::kSetsApart) {
        const auto sums = own.total();
        const ApartTotal<A> total = {sums.sum, sums.weight, most, of_most};
        return gradient.template constant<A>(row_reduce<kRowThreads>(total, turn, JoinApart()));
      } else {
        const auto total = own.template total<SumOf<T, kRowThreads, kVectors>>();
        return gradient.template constant<A>(row_reduce<kRowThreads>(total, turn, Join()));
      }
    }();

    const A scale = A(1 / temperature_within<A>(p.temperature(index)));
    const auto value = [&](T of_y, T of_g) {
      const A v = to_acc(of_y);
      return from_acc<T>(gradient.is_inside(v) ? scale * gradient(v, to_acc(of_g), constant) : A(0));
    };
    row.map_vectors(
        StoredOutput<T>(out, p.grad_input_rows.stride_n, y),
        [&](int64_t i, Vec<T> v) {
          if (is_dead(v)) return v;
          const Vec<T> of_g = row.vector_at(g, g_alike, i);
#pragma unroll
          for (int k = 0; k < Vec<T>::kSize; ++k) v.v[k] = value(v.v[k], of_g.v[k]);
          return v;
        },
        [&](int64_t i, T v) { return value(v, g[i * g_stride]); });
  }
}

// kRegisters: short rows are held there; not where the weights take many.
template <class T, class Gradients, bool kRegisters = true>
void launch_row_map_bwd(const RowMapParams& p, const Gradients& gradients, cudaStream_t stream) {
  const int64_t rows = row_count(p.output_rows), n = p.output_rows.n;
  if (rows == 0) return;
  with_plan<T, kRegisters>(n, p.output_rows.stride_n == 1 && p.grad_input_rows.stride_n == 1, [&](auto plan) {
    using Plan = decltype(plan);
    launch_rows<Plan, T>("row_map_bwd_kernel", row_map_bwd_kernel<T, Plan::kThreads, Plan::kVectors, Gradients>, rows,
                         n, stream, p, gradients);
  });
}

}  // namespace tse

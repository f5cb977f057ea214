// What sparsemax alone asks of vectors: sums under a condition. [per ISA]
#if defined(TSE_SPARSEMAX_VEC_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_SPARSEMAX_VEC_INL_H
#undef TSE_SPARSEMAX_VEC_INL_H
#else
#define TSE_SPARSEMAX_VEC_INL_H
#endif
#include "common/cpu/collect-inl.h"
#include "common/cpu/rows-inl.h"

// Sum and number, lane by lane, of the d that are not `below`.
template <class V>
struct SumAbove {
  using Lanes = decltype(V{} > V{});
  V sum = {};
  Lanes number = {};
#if TSE_ISA == 2  // additions under a mask
  void add(V d, Lanes below) {
    const Lanes above = ~below;
    sum = above ? sum + d : sum;
    number = above ? number + 1 : number;
  }
  Lanes count(int) const { return number; }
#else  // a comparison gives -1 where it holds
  void add(V d, Lanes below) {
    sum += below ? V{} : d;
    number += below;
  }
  Lanes count(int of) const { return number + of; }
#endif
};
template <class V>
inline SumAbove<V> operator+(SumAbove<V> a, SumAbove<V> b) {
  return {a.sum + b.sum, a.number + b.number};
}
#endif

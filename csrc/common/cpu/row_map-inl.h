// How the rows of a map reach its functions: contiguous, for one thread or shared by all. [per ISA]
#if defined(TSE_ROW_MAP_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_ROW_MAP_INL_H
#undef TSE_ROW_MAP_INL_H
#else
#define TSE_ROW_MAP_INL_H
#endif
#include "common/cpu/rows-inl.h"

// Calls f(team, first, last, y, x): rows x(i) to y(i), first <= i < last.
template <class T, class F>
inline void for_forward_rows(const RowMapParams& p, int64_t begin, int64_t end, const F& f) {
  const auto rows = [&](int64_t first, int64_t last, const auto& y, const auto& x) {
    with_team(p.share_row, [&](auto team) { f(team, first, last, y, x); });
  };
  for_each_row(begin, end, rows, RowAt<T>{static_cast<T*>(p.output), p.output_rows},
               RowAt<const T>{static_cast<const T*>(p.input), p.rows});
}

// Calls f(team, out, output, grad_output) for each row.
template <class T, class F>
inline void for_each_backward_row(const RowMapParams& p, int64_t begin, int64_t end, const F& f) {
  const auto rows = [&](int64_t first, int64_t last, const auto& out, const auto& output, const auto& g) {
    with_team(p.share_row, [&](auto team) {
      for (int64_t i = first; i < last; ++i) f(team, out(i), output(i), g(i));
    });
  };
  for_each_row(begin, end, rows, RowAt<T>{static_cast<T*>(p.grad_input), p.grad_input_rows},
               RowAt<const T>{static_cast<const T*>(p.output), p.output_rows},
               RowAt<const T>{static_cast<const T*>(p.grad_output), p.grad_output_rows});
}
#endif

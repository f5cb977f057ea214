// Cross-entropy on the CPU. [per ISA]
//
// Forward reads each logit once; backward reads it once more and writes the gradient once. Where grad_output is known
// in advance, both happen row by row: the second read is from cache, of the logits or of the terms of the sum.
// Log-probabilities are never stored. Short rows, and rows that are not contiguous, are walked by lanes; long
// contiguous ones here, by blocks. What is computed once for each row is in cross_entropy_batch-inl.h.
#if defined(TSE_CROSS_ENTROPY_CPU_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_CROSS_ENTROPY_CPU_INL_H
#undef TSE_CROSS_ENTROPY_CPU_INL_H
#else
#define TSE_CROSS_ENTROPY_CPU_INL_H
#endif
#include "cross_entropy/cross_entropy_batch-inl.h"
#include "cross_entropy/cross_entropy_lanes-inl.h"

constexpr int64_t kKept = 64 * kBlock;  // elements of a row whose terms are kept: 1 MiB a thread, of fp64 2 MiB

// A contiguous row.
template <class T, bool kGeneral>
struct Row {
  using A = Acc<T>;
  using L = Logits<T, kGeneral>;
  const CrossEntropyParams& p;
  const L& logits;
  int64_t row, n;
  const T* x;
  const Coefficients<T> coefficients;
  bool counted;
  int64_t own;  // -1: none

  Row(const CrossEntropyParams& p, const L& logits, int64_t row)
      : p(p),
        logits(logits),
        row(row),
        n(p.rows.n),
        x(static_cast<const T*>(p.input) + row_offset(p.rows, row)),
        coefficients(p, probabilities(p, row)),
        counted(is_counted(p, target_of(p, row))),
        own(!counted                     ? -1
            : p.probabilities != nullptr ? most_probable()
                                         : target_of(p, row)) {}

  A reference() const { return row_reference(x, n, own, logits); }
  BlockSum sum_of(int64_t begin, int64_t end, A reference) const {
    return block_sum<kGeneral>(x + begin, end - begin, own - begin, reference, logits, coefficients.from(begin));
  }

  // Puts the row's sums and own class into the batch.
  void add_to(RowBatch<T>& batch, const BlockSum& s) const {
    const int64_t i = batch.count++;
    if (i == 0) batch.row = row;
    batch.own[i] = own;
    batch.set_sums(i, s);
    batch.own_z[i] = own < 0 ? A(0) : logits.z_of(x + own);
    batch.own_weight[i] = own < 0 ? A(0) : weight_of<A>(p, target_of(p, row));
    batch.own_coefficient[i] = kGeneral && own >= 0 ? coefficients(own, 1)[0] : A(0);
  }

  // The gradient of elements [first, last), from the logits or from the terms that forward kept.
  template <bool kFromKept = false>
  [[gnu::flatten]] void write_gradient(const RowBatch<T>& batch, int64_t first, int64_t last,
                                       const A* kept = nullptr) const {
    const Vec<T> m = splat<Vec<T>>(batch.m[0]), scale = splat<Vec<T>>(batch.scale[0]);
    T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    const int64_t size = last - first;
    if (!counted) return std::fill_n(g + first, size, T{}), void();
    if constexpr (kFromKept) {
      map_row(g + first, size, [&](Vec<T> term) { return term * scale; }, Kept<A>{kept + first});
    } else if constexpr (!kGeneral) {
      map_row(g + first, size, [&](Vec<T> v) { return logits.term(v, m) * scale; }, x + first);
    } else {
      constexpr int kLanes = Accumulate<T>::kLanes;
      const Vec<T> target = splat<Vec<T>>(batch.target[0]), one = splat<Vec<T>>(1);
      for (int64_t i = first; i < last; i += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, last - i);
        const Vec<T> z = logits.cap(count == kLanes ? load(x + i) : load_part(x + i, count, A(0)));
        const Vec<T> term = logits.half_term(logits.half_difference(z, m));
        Vec<T> grad = multiply_subtract(term, scale, coefficients(i, count) * target);
        if (logits.capped) grad *= one - z * z;
        if (count == kLanes) store(g + i, grad);
        else store_part(g + i, count, grad);
      }
    }
    if (own >= first && own < last) store_one(g + own, batch.at_own[0]);
  }

 private:
  static const T* probabilities(const CrossEntropyParams& p, int64_t row) {
    if (p.probabilities == nullptr) return nullptr;
    return static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row);
  }
  // The class of more than half of the probability; -1: none.
  int64_t most_probable() const {
    const T* q = coefficients.probabilities;
    constexpr int64_t kStep = 512;
    for (int64_t begin = 0; begin < n; begin += kStep) {
      const int64_t end = std::min(begin + kStep, n);
      if (!(block_max(q + begin, end - begin) > A(0.5))) continue;
      for (int64_t i = begin; i < end; ++i)
        if (load_one(q + i) > A(0.5)) return i;
    }
    return -1;
  }
};

// The first of the largest elements, or of the NaN if there are any.
template <class T>
inline int64_t row_argmax(const T* x, int64_t n, bool has_nan) {
  const auto first = [&](int64_t begin, auto is) {
    while (begin < n && !is(load_one(x + begin))) ++begin;
    return begin;
  };
  if (has_nan) {
    const int64_t nan = first(0, [](auto v) { return v != v; });
    if (nan < n) return nan;
  }
  int64_t best = 0;
  auto max = load_one(x);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const auto m = block_max(x + begin, std::min(kBlock, n - begin));
    if (m > max) max = m, best = first(begin, [m](auto v) { return v == m; });
  }
  return best;
}

// Computes and writes the losses and statistics of a batch, and empties it.
template <bool kGeneral, class T, class L>
inline void finish(RowBatch<T>& batch, const CrossEntropyParams& p, const L& logits) {
  if (batch.count == 0) return;
  batch.complete(logits);
  batch.template write_forward<kGeneral>(p, logits);
  batch.count = 0;
}

// What backward needs of one row: of its sums s, or of those that forward wrote.
template <class T, bool kGeneral>
inline RowBatch<T> factors_of(const Row<T, kGeneral>& r, const BlockSum* s) {
  RowBatch<T> one;
  r.add_to(one, s != nullptr ? *s : kNothing);
  if (s == nullptr) one.read_forward(r.p);
  one.complete(r.logits);
  one.find_factors(r.p, r.logits);
  return one;
}

// Rows of one thread, or that threads share.
template <class T, bool kForward, bool kBackward, bool kGeneral, class Team>
void walk_rows(const CrossEntropyParams& p, int64_t begin, int64_t end, Team team) {
  using A = Acc<T>;
  constexpr bool kMayKeep = kForward && kBackward && !kGeneral && std::is_same_v<Team, Alone>;
  const int64_t n = p.rows.n;
  const Logits<T, kGeneral> logits(p.transform);
  RowBatch<T> batch;
  const bool keeps = kMayKeep && n <= kKept;
  const std::unique_ptr<Vec<T>[]> terms(keeps ? new Vec<T>[n / Accumulate<T>::kLanes + 2] : nullptr);  // aligned
  A* kept = reinterpret_cast<A*>(terms.get());
  for (int64_t row = begin; row < end; ++row) {
    const Row<T, kGeneral> r(p, logits, row);
    BlockSum s = kNothing, sums[kMayKeep ? kKept / kBlock : 1];
    if (kForward && p.forward) {
      const A reference = r.counted && n > 0 ? r.reference() : A(0);  // the logits of an ignored row are not even read
      s = row_sums(team, r.counted ? n : 0, logits, [&](int64_t i, int64_t last) {
        if constexpr (kMayKeep)
          if (keeps)
            return sums[i / kBlock] = block_exp_sum<true>(r.x + i, last - i, r.own - i, reference, logits, kept + i);
        return r.sum_of(i, last, reference);
      });
      r.add_to(batch, s);
      if (p.predictions != nullptr) {
        const double all = s.sum + double(batch.own_z[batch.count - 1]);  // NaN or infinite if a logit is
        p.predictions[row] = r.counted ? row_argmax(r.x, n, !std::isfinite(all)) : p.ignore_index;
      }
      if (batch.count == batch.kRows) finish<kGeneral>(batch, p, logits);
    }
    if (!kBackward || !p.backward) continue;
    const RowBatch<T> factors = factors_of(r, kForward && p.forward ? &s : nullptr);
    for_parts(team, n, kBlock, [&](int64_t first, int64_t last) {
      if (!keeps) return r.write_gradient(factors, first, last);
      // Terms are kept where one thread has the row, which is one part.
      if constexpr (kMayKeep) {
        for (int64_t i = 0; i < n; i += kBlock) {
          // Terms against another reference are rounded otherwise: not the bits that backward alone would compute.
          if (sums[i / kBlock].m == s.m) r.template write_gradient<true>(factors, i, std::min(i + kBlock, n), kept);
          else r.write_gradient(factors, i, std::min(i + kBlock, n));
        }
      }
    });
  }
  finish<kGeneral>(batch, p, logits);
}

template <class T, bool kForward, bool kBackward, bool kGeneral>
void walk(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const bool contiguous = p.rows.stride_n == 1 && (!kBackward || p.grad_rows.stride_n == 1);
  if (p.rows.n == 0 || (contiguous && p.rows.n > kMostInLanes))
    return walk_rows<T, kForward, kBackward, kGeneral>(p, begin, end, Alone());
  LanesWalk<T, kForward, kBackward, kGeneral>(p).run(begin, end);
}

template <class T, bool kGeneral>
void walk_each_way(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  if (p.share_row != nullptr) walk_rows<T, true, true, kGeneral>(p, begin, end, p.share_row);
  else if (!p.backward) walk<T, true, false, kGeneral>(p, begin, end);
  else if (p.forward) walk<T, true, true, kGeneral>(p, begin, end);
  else walk<T, false, true, kGeneral>(p, begin, end);
}
template <class T>
void walk_type(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  if (p.is_general()) walk_each_way<T, true>(p, begin, end);
  else walk_each_way<T, false>(p, begin, end);
}

void cross_entropy_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_BY_DTYPE(p.dtype, walk_type, p, begin, end)
}
#endif

// Cross-entropy rows on the CPU. [per ISA]
//
// Forward reads each logit once; backward reads it once more and writes the gradient once. Where grad_output is known
// beforehand both happen row by row: the second reading is from cache, of the logits or, in rows of up to kKept, of the
// terms of the sum. Log-probabilities are never stored.
#include "common/cpu/exp_sum-inl.h"
#include "common/cpu/tile-inl.h"
#include "cross_entropy/cross_entropy_columns-inl.h"

constexpr int64_t kKept = 64 * kBlock;  // elements of a row whose terms are kept: 1 MiB a thread, of fp64 2 MiB

// The weights t that every class has: smoothing · w / C, and of probabilities all. A target's class has weight_of more.
template <class T>
struct Coefficients {
  using A = Acc<T>;
  const T* probabilities;
  const A* weight;
  A keep, even;
  Coefficients(const CrossEntropyParams& p, int64_t row)
      : probabilities(p.probabilities == nullptr
                          ? nullptr
                          : static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row)),
        weight(static_cast<const A*>(p.weight)),
        keep(A(1 - p.label_smoothing)),
        even(A(p.label_smoothing / double(p.rows.n))) {}

  Coefficients from(int64_t begin) const {
    Coefficients c = *this;
    if (probabilities != nullptr) c.probabilities += begin;
    if (weight != nullptr) c.weight += begin;
    return c;
  }
  A at(int64_t i) const {
    const A t = probabilities == nullptr ? even : keep * load_one(probabilities + i) + even;
    return t * (weight != nullptr ? weight[i] : A(1));
  }
  Vec<T> operator()(int64_t i, int64_t count) const {
    const bool whole = count == Accumulate<T>::kLanes;
    Vec<T> t = splat<Vec<T>>(even);
    if (probabilities != nullptr)
      t += keep * (whole ? load(probabilities + i) : load_part(probabilities + i, count, A(0)));
    if (weight != nullptr) t *= whole ? load(weight + i) : load_part(weight + i, count, A(0));
    return first_lanes(t, count);
  }
};

// The own class of a row (cross_entropy.h); -1: none. Probabilities are contiguous.
template <class T>
inline int64_t own_class(const CrossEntropyParams& p, int64_t row) {
  const int64_t target = target_of(p, row);
  if (p.probabilities == nullptr) return is_counted(p, target) ? target : -1;
  const T* q = static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row);
  constexpr int64_t kStep = 512;
  for (int64_t begin = 0; begin < p.rows.n; begin += kStep) {
    const int64_t end = std::min(begin + kStep, p.rows.n);
    if (!(block_max(q + begin, end - begin) > Acc<T>(0.5))) continue;
    for (int64_t i = begin; i < end; ++i)
      if (load_one(q + i) > Acc<T>(0.5)) return i;
  }
  return -1;
}

// What backward needs to know of a row.
template <class A>
struct RowGrad {
  A m, sum, others, mass, own;  // mass: of the other classes; own: the own class' weight
  GradFactors factors;
  RowGrad(const CrossEntropyParams& p, int64_t row, A own)
      : m(static_cast<const A*>(p.row_m)[row]),
        sum(static_cast<const A*>(p.row_sum)[row]),
        others(static_cast<const A*>(p.row_others)[row]),
        mass(p.row_mass != nullptr ? static_cast<const A*>(p.row_mass)[row] : A(0)),
        own(own),
        factors(grad_factors<A>(p, row, p.z_loss_weight == 0 ? 0 : lse_of(p.transform, m, sum))) {}
  A scale() const { return A(factors.level(own, mass) / double(sum)); }
  A at_own(double term) const { return A(factors.at_own(own, mass, term / double(sum), double(others) / double(sum))); }
};

// The gradient of elements [begin, end) of a row: from x, or from the terms that forward kept.
template <bool kFromKept = false, class T, class L>
[[gnu::flatten]] inline void grad_row(const T* x, T* g, int64_t begin, int64_t end, int64_t own,
                                      const RowGrad<Acc<T>>& row, const L& logits, const Acc<T>* kept = nullptr) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const bool mine = own >= begin && own < end;
  const A at_own = mine ? row.at_own(logits.term_of(logits.z_of(x + own), row.m)) : A(0);  // g may be x
  const Vec<T> m = splat<Vec<T>>(row.m), scale = splat<Vec<T>>(row.scale());
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    const Pair<Vec<T>> t = kFromKept ? Pair<Vec<T>>{load(kept + i), load(kept + i + kLanes)} : terms2(x + i, m, logits);
    store2(g + i, {t.a * scale, t.b * scale});
  }
  for (; i < end; i += kLanes) {
    const bool whole = i + kLanes <= end;
    const Vec<T> v = kFromKept ? load(kept + i) : whole ? load(x + i) : load_part(x + i, end - i, A(0));
    const Vec<T> grad = (kFromKept ? v : logits.term(v, m)) * scale;
    if (whole) store(g + i, grad);
    else store_part(g + i, end - i, grad);
  }
  if (mine) store_one(g + own, at_own);
}

// The same with softcap or coefficients.
template <class T, class L>
[[gnu::flatten]] inline void grad_row_general(const T* x, T* g, int64_t begin, int64_t end, int64_t own,
                                              const RowGrad<Acc<T>>& row, const L& logits,
                                              const Coefficients<T>& coefficients) {
  using A = Acc<T>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const Vec<T> m = splat<Vec<T>>(row.m), scale = splat<Vec<T>>(row.scale()), one = splat<Vec<T>>(A(1));
  const A b = A(row.factors.target);
  const auto slope = [&](Vec<T> z) { return logits.capped ? one - z * z : one; };
  const bool mine = own >= begin && own < end;
  A at_own = 0;
  if (mine) {
    const A z = logits.z_of(x + own);
    at_own = row.at_own(logits.term_of(z, row.m)) * slope(splat<Vec<T>>(z))[0];
  }
  const auto grad = [&](Vec<T> v, Vec<T> t) {
    const Vec<T> z = logits.cap(v);
    return multiply_subtract(logits.term(z, m), scale, t * b) * slope(z);  // the same bits in every caller
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(g + i, grad(load(x + i), coefficients(i, kLanes)));
  if (i < end) store_part(g + i, end - i, grad(load_part(x + i, end - i, A(0)), coefficients(i, end - i)));
  if (mine) store_one(g + own, at_own);
}

// ---- rows ---------------------------------------------------------------------------------------------------------
// kGeneral: with softcap or coefficients of all classes.

// Completes the sums of a row that is counted; of one that is not they are nothing. Returns the whole sum.
template <class T, class L>
inline double finish_row_general(const CrossEntropyParams& p, int64_t row, int64_t own, const BlockSum& s, const T* x,
                                 const L& logits) {
  using A = Acc<T>;
  const A m = A(s.m);
  double loss = 0, sum = s.sum, mass = 0;
  if (is_counted(p, target_of(p, row))) {
    double of_own = 0;
    if (own >= 0) {
      const A z = logits.z_of(x + own);
      const double term = logits.term_of(z, m);
      sum += term;
      of_own = double(weight_of<A>(p, target_of(p, row)) + Coefficients<T>(p, row).at(own)) *
               negative_log(term, s.sum, s.m - double(z), logits.slope);
    }
    const double log_sum = std::log(sum);
    loss = of_own;
    mass = s.mass;
    if (p.row_mass != nullptr) loss += mass * log_sum - s.linear * logits.slope;
    if (p.z_loss_weight != 0 && p.reduction == Reduction::kNone) {
      const double lse = s.m * logits.slope + log_sum;
      loss += p.z_loss_weight * lse * lse;
    }
  }
  static_cast<A*>(p.row_m)[row] = m;
  static_cast<A*>(p.row_sum)[row] = A(sum);
  static_cast<A*>(p.row_others)[row] = A(s.sum);
  if (p.row_mass != nullptr) static_cast<A*>(p.row_mass)[row] = A(mass);
  static_cast<A*>(p.row_loss)[row] = A(loss);
  return sum;
}

// Consecutive rows without options, whose losses are computed together.
template <class T>
struct RowLosses {
  using A = Acc<T>;
  static constexpr int kRows = Accumulate<T>::kLanes;
  int64_t first, count = 0;
  alignas(64) A m[kRows] = {}, others[kRows] = {}, weight[kRows] = {}, at_own[kRows] = {}, counted[kRows] = {};

  template <class L>
  double add(const CrossEntropyParams& p, int64_t row, const BlockSum& s, const T* x, const L& logits) {
    if (count == 0) first = row;
    const int64_t target = target_of(p, row);
    double sum = s.sum;
    counted[count] = p.target != nullptr && is_counted(p, target);  // no target: no classes, either
    if (counted[count] != 0) {
      at_own[count] = load_one(x + target);  // before its gradient takes its place
      weight[count] = weight_of<A>(p, target);
      sum += double(logits.term_of(at_own[count], A(s.m)));
    }
    static_cast<A*>(p.row_m)[row] = m[count] = A(s.m);
    static_cast<A*>(p.row_others)[row] = others[count] = A(s.sum);
    static_cast<A*>(p.row_sum)[row] = A(sum);
    if (++count == kRows) finish(p, logits);
    return sum;
  }

  template <class L>
  void finish(const CrossEntropyParams& p, const L& logits) {
    const Vec<T> z = load(at_own), term = logits.term(z, load(m));
    const Vec<T> loss = losses_of<T>(p, load(m), load(others), term, z, load(weight));
    store_part(static_cast<A*>(p.row_loss) + first, count, load(counted) > Vec<T>{} ? loss : Vec<T>{});
    count = 0;
  }
};

template <class T, bool kGeneral, bool kFromKept = false, class L>
inline void finish_row_grad(const CrossEntropyParams& p, int64_t row, int64_t own, int64_t begin, int64_t end,
                            const L& logits, const Acc<T>* kept = nullptr) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  T* g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
  const int64_t target = target_of(p, row);
  if (!is_counted(p, target)) return std::fill(g + begin, g + end, T{}), void();
  if constexpr (kGeneral) {
    const Coefficients<T> coefficients(p, row);
    const A of_own = own < 0 ? A(0) : weight_of<A>(p, target) + coefficients.at(own);
    grad_row_general(x, g, begin, end, own, RowGrad<A>(p, row, of_own), logits, coefficients);
  } else {
    grad_row<kFromKept>(x, g, begin, end, own, RowGrad<A>(p, row, weight_of<A>(p, target)), logits, kept);
  }
}

template <bool kGeneral, class T, class L>
inline BlockSum row_block_sum(const CrossEntropyParams& p, int64_t row, const T* x, int64_t block, int64_t own,
                              Acc<T> reference, const L& logits) {
  const int64_t begin = block * kBlock, n = std::min(kBlock, p.rows.n - begin);
  if constexpr (!kGeneral) return block_exp_sum(x + begin, n, own - begin, reference, logits);
  return block_linear_sum(x + begin, n, own - begin, reference, logits, Coefficients<T>(p, row).from(begin));
}

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

#include "cross_entropy/cross_entropy_few-inl.h"

template <class T, bool kForward, bool kBackward, bool kGeneral>
void contiguous_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n;
  const Logits<T, kGeneral> logits(p.transform);
  RowLosses<T> losses;
  const bool keeps = kForward && kBackward && !kGeneral && n <= kKept;
  const std::unique_ptr<Vec<T>[]> terms(keeps ? new Vec<T>[n / Accumulate<T>::kLanes + 1] : nullptr);  // aligned
  Acc<T>* kept = reinterpret_cast<Acc<T>*>(terms.get());
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
    // The logits of an ignored row are not even read.
    const bool counted = is_counted(p, target_of(p, row));
    const int64_t own = counted ? own_class<T>(p, row) : -1;
    if constexpr (kForward && kBackward && !kGeneral) {
      if (counted && keeps) {
        const Acc<T> reference = row_reference(x, n, own, logits);
        BlockSum s = kNothing, sums[kKept / kBlock];
        for (int64_t b = 0; b * kBlock < n; ++b) {
          const int64_t i = b * kBlock;
          sums[b] = block_exp_sum<true>(x + i, std::min(kBlock, n - i), own - i, reference, logits, kept + i);
          s = logits.join(s, sums[b]);
        }
        losses.add(p, row, s, x, logits);
        for (int64_t b = 0; b * kBlock < n; ++b) {
          const int64_t i = b * kBlock, end = std::min(i + kBlock, n);
          // Terms against another reference are rounded otherwise: not the bits that backward alone would compute.
          if (sums[b].m == s.m) finish_row_grad<T, kGeneral, true>(p, row, own, i, end, logits, kept);
          else finish_row_grad<T, kGeneral>(p, row, own, i, end, logits);
        }
        continue;
      }
    }
    if (kForward) {
      BlockSum s = kNothing;
      if (counted && n > 0) {
        const Acc<T> reference = row_reference(x, n, own, logits);
        for (int64_t b = 0; b * kBlock < n; ++b)
          s = logits.join(s, row_block_sum<kGeneral>(p, row, x, b, own, reference, logits));
      }
      double sum;
      if constexpr (kGeneral) sum = finish_row_general(p, row, own, s, x, logits);
      else sum = losses.add(p, row, s, x, logits);
      if (p.predictions != nullptr) p.predictions[row] = counted ? row_argmax(x, n, sum != sum) : p.ignore_index;
    }
    if (kBackward) finish_row_grad<T, kGeneral>(p, row, own, 0, n, logits);
  }
  if (losses.count > 0) losses.finish(p, logits);
}

// Rows whose classes are contiguous.
template <class T, bool kForward, bool kBackward>
void rows_of_contiguous(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  if (is_few(p)) {
    return p.is_general() ? rows_of_few_classes<T, kForward, kBackward, true>(p, begin, end)
                          : rows_of_few_classes<T, kForward, kBackward, false>(p, begin, end);
  }
  return p.is_general() ? contiguous_rows<T, kForward, kBackward, true>(p, begin, end)
                        : contiguous_rows<T, kForward, kBackward, false>(p, begin, end);
}

#include "cross_entropy/cross_entropy_tiles-inl.h"

template <class T, bool kForward, bool kBackward>
void rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  if (p.rows.stride_n == 1 && (!kBackward || p.grad_rows.stride_n == 1))
    return rows_of_contiguous<T, kForward, kBackward>(p, begin, end);
  if (p.predictions != nullptr) return rows_by_tiles<T, kForward, kBackward>(p, begin, end);
  if (is_few(p) && p.is_general()) return rows_of_few_classes<T, kForward, kBackward, true>(p, begin, end);
  if (is_few(p) && p.image > 1 && p.image < kShortRun)
    return rows_of_few_classes<T, kForward, kBackward, false>(p, begin, end);
  if (!p.is_general()) return rows_of_columns<T, kForward, kBackward>(p, begin, end);
  return rows_by_tiles<T, kForward, kBackward>(p, begin, end);
}

template <class T, bool kGeneral>
void block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  const Logits<T, kGeneral> logits(p.transform);
  const int64_t own = own_class<T>(p, row);
  const Acc<T> reference = row_reference(x, p.rows.n, own, logits);
  for (int64_t b = begin; b < end; ++b) sums[b] = row_block_sum<kGeneral>(p, row, x, b, own, reference, logits);
}

template <class T, bool kGeneral>
void finish_blocks(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  const T* x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
  const Logits<T, kGeneral> logits(p.transform);
  BlockSum s = kNothing;
  for (int64_t b = 0; b * kBlock < p.rows.n; ++b) s = logits.join(s, sums[b]);
  if constexpr (kGeneral) {
    finish_row_general(p, row, own_class<T>(p, row), s, x, logits);
  } else {
    RowLosses<T> losses;
    losses.add(p, row, s, x, logits);
    losses.finish(p, logits);
  }
}

template <class T, bool kGeneral>
void bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  finish_row_grad<T, kGeneral>(p, row, own_class<T>(p, row), begin * kBlock, std::min(end * kBlock, p.rows.n),
                               Logits<T, kGeneral>(p.transform));
}

template <class T>
void fwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, true, false>(p, begin, end);
}
template <class T>
void bwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, false, true>(p, begin, end);
}
template <class T>
void fwd_bwd(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  rows<T, true, true>(p, begin, end);
}
template <class T>
void block_sums_of(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  p.is_general() ? block_sums<T, true>(p, row, begin, end, sums) : block_sums<T, false>(p, row, begin, end, sums);
}
template <class T>
void finish_blocks_of(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  p.is_general() ? finish_blocks<T, true>(p, row, sums) : finish_blocks<T, false>(p, row, sums);
}
template <class T>
void bwd_blocks_of(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  p.is_general() ? bwd_blocks<T, true>(p, row, begin, end) : bwd_blocks<T, false>(p, row, begin, end);
}

void cross_entropy_fwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd, p, begin, end)
}
void cross_entropy_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd, p, begin, end)
}
void cross_entropy_fwd_bwd_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(fwd_bwd, p, begin, end)
}
void cross_entropy_block_sums(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end, BlockSum* sums) {
  TSE_EACH_DTYPE(block_sums_of, p, row, begin, end, sums)
}
void cross_entropy_finish_row(const CrossEntropyParams& p, int64_t row, const BlockSum* sums) {
  TSE_EACH_DTYPE(finish_blocks_of, p, row, sums)
}
void cross_entropy_bwd_blocks(const CrossEntropyParams& p, int64_t row, int64_t begin, int64_t end) {
  TSE_EACH_DTYPE(bwd_blocks_of, p, row, begin, end)
}

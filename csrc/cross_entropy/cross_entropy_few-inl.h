// Cross-entropy of few classes. [per ISA]
//
// What is per row is most of the work there. So as many rows as a vector has lanes are taken at once: transposed, if
// classes are contiguous, a vector holds one class of each, and what is done for one row is done for all. All logits of
// a row are at hand before its first term, whose reference is the row's maximum, and the terms of forward are those of
// backward.

constexpr int64_t kFewClasses = 128;
constexpr int64_t kShortRun = 64;  // for fewer consecutive rows columns are not worth their setup
inline bool is_few(const CrossEntropyParams& p) {
  return p.rows.n > 0 && p.rows.n <= kFewClasses && p.transform.softcap == 0;
}

// z[c]: class c of `count` consecutive rows, the first of them at x; 0 in the lanes of the others, and of those that
// are not counted, whose logits may be anything.
template <class T, class Lanes>
inline void load_lanes(const T* x, const Rows& rows, int64_t count, Lanes counted, Vec<T>* z) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const int64_t n = rows.n;
  if (rows.stride_n != 1) {
    for (int64_t c = 0; c < n; ++c) {
      const T* from = x + c * rows.stride_n;
      z[c] = counted ? count == kLanes ? load(from) : load_part(from, count, Acc<T>(0)) : Vec<T>{};
    }
    return;
  }
  const T zeros[kLanes] = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec<T> square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const T* from = counted[i] ? x + i * rows.stride_inner + c : zeros;
      square[i] = c + kLanes <= n ? load(from) : load_part(from, n - c, Acc<T>(0));
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) z[c + i] = square[i];
  }
}
template <class T>
inline void store_lanes(const Vec<T>* z, const Rows& rows, int64_t count, T* g) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  const int64_t n = rows.n;
  if (rows.stride_n != 1) {
    for (int64_t c = 0; c < n; ++c) {
      if (count == kLanes) store(g + c * rows.stride_n, z[c]);
      else store_part(g + c * rows.stride_n, count, z[c]);
    }
    return;
  }
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec<T> square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = z[c + i];
    transpose(square);
    for (int64_t i = 0; i < count; ++i) {
      T* to = g + i * rows.stride_inner + c;
      if (c + kLanes <= n) store(to, square[i]);
      else store_part(to, n - c, square[i]);
    }
  }
}

// kGeneral: with coefficients of all classes, the same for all rows but for probabilities; there is no softcap.
template <class T, bool kForward, bool kBackward, bool kGeneral>
[[gnu::flatten]] void rows_of_few_classes(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = Vec<T>;
  using Mask = decltype(V{} > V{});
  using Index = std::remove_reference_t<decltype(Mask{}[0])>;
  constexpr int kLanes = Accumulate<T>::kLanes;
  const int64_t n = p.rows.n;
  const V low = splat<V>(-std::numeric_limits<A>::infinity());
  const Logits<T, false> logits(p.transform);
  const Coefficients<T> coefficients(p, 0);
  V z[kFewClasses], u[kGeneral ? kFewClasses : 1];  // u: the coefficients
  if (kGeneral && p.probabilities == nullptr)
    for (int64_t c = 0; c < n; ++c) u[c] = splat<V>(coefficients.at(c));
  const bool one_stride = has_one_stride(p.rows) && (!kBackward || has_one_stride(p.grad_rows)) &&
                          (p.probabilities == nullptr || has_one_stride(p.probabilities_rows));
  const int64_t run = one_stride ? row_count(p.rows) : p.rows.inner;  // so many rows have one stride
  const T *x = nullptr, *probabilities = nullptr;
  T* g = nullptr;
  // Of the rows at hand, and of their own class: its weight, z and term. Lanes from `count` on hold other rows.
  alignas(64) Index own[kLanes] = {};  // -1: none
  alignas(64) A counts[kLanes] = {}, weight[kLanes] = {}, at_own[kLanes] = {}, term[kLanes] = {};
  alignas(64) A m[kLanes] = {}, sum[kLanes] = {}, others[kLanes] = {}, mass[kLanes] = {};
  alignas(64) A scale[kLanes], of_own[kLanes], of_target[kLanes];
  for (int64_t row = begin, left = 0, count; row < end; row += count, left -= count) {
    if (left == 0) {
      left = std::min(end - row, run - row % run);
      x = static_cast<const T*>(p.input) + row_offset(p.rows, row);
      if (p.probabilities != nullptr)
        probabilities = static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row);
      if (kBackward) g = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row);
    } else {
      x += kLanes * p.rows.stride_inner;
      if (p.probabilities != nullptr) probabilities += kLanes * p.probabilities_rows.stride_inner;
      if (kBackward) g += kLanes * p.grad_rows.stride_inner;
    }
    count = std::min<int64_t>(kLanes, left);
    auto counted = lanes_before<V>(count);
    Mask own_lanes = Mask{} - 1;
    if (p.target != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = target_of(p, row + i);
        counts[i] = t != p.ignore_index;
        own[i] = t != p.ignore_index ? t : 0;
      }
      std::memcpy(&own_lanes, own, sizeof own);
      counted &= load(counts) > V{};
    }
    load_lanes(x, p.rows, count, counted, z);
    if (kGeneral && p.probabilities != nullptr) {
      load_lanes(probabilities, p.probabilities_rows, count, counted, u);
      for (int64_t c = 0; c < n; ++c) {
        own_lanes = u[c] > V{} + A(0.5) ? Mask{} + Index(c) : own_lanes;
        u[c] = u[c] * coefficients.keep + coefficients.even;
        if (p.weight != nullptr) u[c] *= coefficients.weight[c];
      }
      std::memcpy(own, &own_lanes, sizeof own);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const Index c = own[i] < 0 ? 0 : own[i];
      at_own[i] = z[c][i];
      if (!kGeneral && p.weight == nullptr) continue;
      weight[i] = weight_of<A>(p, c);
      if (kGeneral && own[i] >= 0) weight[i] += u[c][i];
    }
    if (!kGeneral && p.weight == nullptr) store(weight, splat<V>(1));
    if constexpr (kForward) {
      V max = low;
      for (int64_t c = 0; c < n; ++c) max = vmax(z[c], max);  // NaN aside
      store(m, max);
    } else {
      std::memcpy(m, static_cast<const A*>(p.row_m) + row, count * sizeof(A));
      std::memcpy(sum, static_cast<const A*>(p.row_sum) + row, count * sizeof(A));
      std::memcpy(others, static_cast<const A*>(p.row_others) + row, count * sizeof(A));
      if (p.row_mass != nullptr) std::memcpy(mass, static_cast<const A*>(p.row_mass) + row, count * sizeof(A));
    }
    const V reference = load(m) == low ? V{} : load(m);  // -inf, of a row of nothing else, is none
    const Mask has_own = own_lanes >= Mask{};
    const V z_own = has_own ? load(at_own) : load(m), term_own = has_own ? logits.term(z_own, reference) : V{};
    store(term, term_own);
    V s = {}, linear = {}, of_others = {};
    for (int64_t c = 0; c < n; ++c) {
      const V half = logits.half_difference(z[c], reference);
      const Mask is_own = own_lanes == Mask{} + Index(c);
      z[c] = exp2<T>(half * logits.twice_scale);
      if constexpr (kForward) s += is_own ? V{} : z[c];
      if constexpr (kForward && kGeneral) {
        linear += is_own ? V{} : u[c] * half;
        of_others += is_own ? V{} : u[c];
      }
    }
    if constexpr (kForward) {
      const V all = s + term_own;
      store(others, s);
      store(sum, all);
      store(mass, of_others);
      V loss = losses_of<T>(p, load(m), s, term_own, z_own, load(weight));
      if constexpr (kGeneral) {
        const V log_sum = log2(all) * kLn2<A>, below = linear * A(logits.slope) * A(2);
        loss += of_others * log_sum - below;
      }
      const auto put = [&](void* array, V v) {
        A* to = static_cast<A*>(array) + row;
        if (count == kLanes) store(to, v);
        else store_part(to, count, v);
      };
      put(p.row_m, counted ? load(m) : low);
      put(p.row_sum, counted ? all : V{});
      put(p.row_others, counted ? s : V{});
      put(p.row_loss, counted ? loss : V{});
      if (p.row_mass != nullptr) put(p.row_mass, counted ? of_others : V{});
      if (p.predictions != nullptr) {  // classes are contiguous then
        for (int64_t i = 0; i < count; ++i)
          p.predictions[row + i] =
              counted[i] ? row_argmax(x + i * p.rows.stride_inner, n, sum[i] != sum[i]) : p.ignore_index;
      }
    }
    if constexpr (kBackward) {
      grad_scales<T>(p, row, count, m, sum, others, term, weight, kGeneral ? mass : nullptr, scale, of_own, of_target);
      const V by = load(scale), at = load(of_own), less = load(of_target);
      for (int64_t c = 0; c < n; ++c) {
        const V grad = kGeneral ? multiply_subtract(z[c], by, u[c] * less) : z[c] * by;
        z[c] = counted ? own_lanes == Mask{} + Index(c) ? at : grad : V{};
      }
      store_lanes(z, p.grad_rows, count, g);
    }
  }
}

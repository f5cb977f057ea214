// Cross-entropy of few classes. [per ISA]
//
// What is per row is most of the work there. So as many rows as a vector has lanes are taken at once: transposed, if
// classes are neighbours in memory, a vector holds one class of each, and what is done for one row is done for all. All
// logits of a row are at hand before its first term, whose reference is the row's maximum, and the terms of forward are
// those of backward.

constexpr int64_t kFewClasses = 128;
constexpr int64_t kShortRun = 64;  // for fewer neighbouring rows columns are not worth their beginning
inline bool is_few(const CrossEntropyParams& p) {
  return p.rows.n > 0 && p.rows.n <= kFewClasses && p.transform.softcap == 0;
}

// z[c]: class c of `count` neighbouring rows, the first of them at x; 0 in the lanes of the others, and of those that
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
  constexpr int kLanes = Accumulate<T>::kLanes;
  const int64_t n = p.rows.n;
  const V low = splat<V>(-std::numeric_limits<A>::infinity());
  const Logits<T, false> logits(p.transform);
  const Coefficients<T> coefficients(p, 0);
  V z[kFewClasses], u[kGeneral ? kFewClasses : 1];  // u: the coefficients
  for (int64_t c = 0; kGeneral && c < n; ++c) u[c] = splat<V>(coefficients.at(c));
  const bool one_stride = has_one_stride(p.rows) && (!kBackward || has_one_stride(p.grad_rows)) &&
                          (p.probabilities == nullptr || has_one_stride(p.probabilities_rows));
  const int64_t run = one_stride ? row_count(p.rows) : p.rows.inner;  // so many rows have one stride
  const T *x = nullptr, *probabilities = nullptr;
  T* g = nullptr;
  // Of the rows at hand; class_*: of the class of their targets. What the lanes behind `count` hold is of rows before.
  int64_t target[kLanes] = {};
  alignas(64) A counts[kLanes] = {}, at_target[kLanes] = {}, class_weight[kLanes] = {}, class_coefficient[kLanes] = {};
  alignas(64) A m[kLanes] = {}, sum[kLanes] = {}, weight[kLanes] = {}, mass[kLanes] = {};
  alignas(64) A scale[kLanes], shift[kLanes], of_target[kLanes];
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
    if (p.target != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = target_of(p, row + i);
        counts[i] = t != p.ignore_index;
        target[i] = t != p.ignore_index ? t : 0;
      }
      counted &= load(counts) > V{};
      for (int64_t i = 0; p.weight != nullptr && i < kLanes; ++i) {
        class_weight[i] = weight_of<A>(p, target[i]);
        class_coefficient[i] = coefficients.at(target[i]);
      }
      const V w = p.weight != nullptr ? load(class_weight) : splat<V>(coefficients.keep);
      store(weight, counted ? w : V{});
    }
    load_lanes(x, p.rows, count, counted, z);
    if (p.target != nullptr) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) at_target[i] = z[target[i]][i];
    }
    if (kGeneral && p.probabilities != nullptr) {
      load_lanes(probabilities, p.probabilities_rows, count, counted, u);
      for (int64_t c = 0; c < n; ++c) {
        u[c] = u[c] * coefficients.keep + coefficients.even;
        if (p.weight != nullptr) u[c] *= coefficients.weight[c];
      }
    }
    if constexpr (kForward) {
      V max = low;
      for (int64_t c = 0; c < n; ++c) max = vmax(z[c], max);  // NaN aside
      store(m, logits.references(max));
    } else {
      std::memcpy(m, static_cast<const A*>(p.row_m) + row, count * sizeof(A));
      std::memcpy(sum, static_cast<const A*>(p.row_sum) + row, count * sizeof(A));
      if (p.row_mass != nullptr) std::memcpy(mass, static_cast<const A*>(p.row_mass) + row, count * sizeof(A));
      else std::memcpy(mass, weight, sizeof mass);
    }
    const V reference = load(m) == low ? V{} : load(m);  // -inf, of a row of nothing else, is none
    const V t = logits.exponent(load(at_target), reference);
    V s = {}, linear = {}, of_all = {};
    for (int64_t c = 0; c < n; ++c) {
      const V exponent = logits.exponent(z[c], reference);
      s += z[c] = exp2<T>(exponent);
      if constexpr (kForward && kGeneral) {
        linear += u[c] * exponent;
        of_all += u[c];
      }
    }
    if constexpr (kForward) {
      store(sum, s);
      store(mass, load(weight) + of_all);
      V loss = losses_of<T>(p, load(m), s, t, load(weight));
      if constexpr (kGeneral) loss += (of_all * log2(s) - linear) * kLn2<A>;
      const auto put = [&](void* array, V v) {
        A* to = static_cast<A*>(array) + row;
        if (count == kLanes) store(to, v);
        else store_part(to, count, v);
      };
      put(p.row_m, counted ? load(m) : low);
      put(p.row_sum, counted ? s : V{});
      put(p.row_loss, counted ? loss : V{});
      if (p.row_mass != nullptr) put(p.row_mass, counted ? load(mass) : V{});
      if (p.predictions != nullptr) {  // classes are neighbours then
        for (int64_t i = 0; i < count; ++i)
          p.predictions[row + i] =
              counted[i] ? row_argmax(x + i * p.rows.stride_inner, n, sum[i] != sum[i]) : p.ignore_index;
      }
    }
    if constexpr (kBackward) {
      grad_scales<T>(p, row, count, m, sum, weight, mass, scale, shift, of_target);
      const V by = load(scale), less = load(of_target);
      const auto grad = [&](V excess, V coefficient) {
        return kGeneral ? multiply_subtract(excess, by, coefficient * less) : excess * by;
      };
      for (int64_t c = 0; c < n; ++c) z[c] = counted ? grad(z[c], kGeneral ? u[c] : V{}) : V{};
      store_lanes(z, p.grad_rows, count, g);
      if (p.target != nullptr) {
        const V own = p.weight != nullptr ? load(class_coefficient) : splat<V>(coefficients.even);
        const V at_its_target = grad(exp2<T>(t) - load(shift), own);
        for (int64_t i = 0; i < count; ++i)
          if (counted[i])
            store_one(g + i * p.grad_rows.stride_inner + target[i] * p.grad_rows.stride_n, at_its_target[i]);
      }
    }
  }
}

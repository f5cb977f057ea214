// Cross-entropy of contiguous rows of few classes. [per ISA]
//
// What is per row is most of the work there. So as many rows as a vector has lanes are taken at once: transposed, a
// vector holds one class of each, and what is done for one row is done for all. All logits of a row are at hand before
// its first term, whose reference is the row's maximum, and the terms of forward are those of backward.

constexpr int64_t kFewClasses = 128;

// z[c]: class c of the rows at x; whole squares, 0 behind the last class.
template <class T>
inline void load_lanes(const T* const* x, int64_t n, Vec<T>* z) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec<T> square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      square[i] = c + kLanes <= n ? load(x[i] + c) : load_part(x[i] + c, n - c, Acc<T>(0));
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) z[c + i] = square[i];
  }
}
template <class T>
inline void store_lanes(const Vec<T>* z, int64_t n, T* const* g, int64_t count) {
  constexpr int kLanes = Accumulate<T>::kLanes;
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec<T> square[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = z[c + i];
    transpose(square);
    for (int64_t i = 0; i < count; ++i) {
      if (c + kLanes <= n) store(g[i] + c, square[i]);
      else store_part(g[i] + c, n - c, square[i]);
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
  const A* weights = coefficients.weight;
  const T zeros[kFewClasses] = {};  // the logits of a row that is ignored, or behind the last
  V z[kFewClasses], u[kGeneral ? kFewClasses : 1];  // u: the coefficients
  for (int64_t c = 0; kGeneral && c < n; ++c) u[c] = splat<V>(coefficients.at(c));
  const T* x[kLanes];
  T* g[kLanes];
  int64_t target[kLanes];
  alignas(64) A counted_as[kLanes], weight[kLanes], at_target[kLanes], its_coefficient[kLanes];
  alignas(64) A m[kLanes] = {}, sum[kLanes] = {}, mass[kLanes] = {}, scale[kLanes], shift[kLanes], of_target[kLanes];
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - row);
    for (int64_t i = 0; i < kLanes; ++i) {
      target[i] = i < count ? target_of(p, row + i) : p.ignore_index;
      const bool counts = i < count && is_counted(p, target[i]), has_target = counts && p.target != nullptr;
      x[i] = counts ? static_cast<const T*>(p.input) + row_offset(p.rows, row + i) : zeros;
      counted_as[i] = counts;
      if (!has_target) target[i] = 0;
      weight[i] = has_target ? weight_of<A>(p, target[i]) : A(0);
      at_target[i] = has_target ? load_one(x[i] + target[i]) : A(0);
      its_coefficient[i] = coefficients.at(target[i]);
    }
    const auto counted = load(counted_as) > V{};
    if (kGeneral && p.probabilities != nullptr) {
      const T* from[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        from[i] =
            i < count ? static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row + i) : zeros;
      load_lanes(from, n, u);
      for (int64_t c = 0; c < n; ++c)
        u[c] = (u[c] * coefficients.keep + coefficients.even) * (weights != nullptr ? weights[c] : A(1));
    }
    load_lanes(x, n, z);
    if constexpr (kForward) {
      V max = low;
      for (int64_t c = 0; c < n; ++c) max = vmax(z[c], max);  // NaN aside
      for (int i = 0; i < kLanes; ++i) m[i] = logits.reference(max[i]);
    } else {
      std::memcpy(m, static_cast<const A*>(p.row_m) + row, count * sizeof(A));
      std::memcpy(sum, static_cast<const A*>(p.row_sum) + row, count * sizeof(A));
      if (p.row_mass != nullptr) std::memcpy(mass, static_cast<const A*>(p.row_mass) + row, count * sizeof(A));
      else std::memcpy(mass, weight, sizeof mass);
    }
    // -inf, of a row of nothing else, is none; and forward left it for the ignored.
    const V reference = load(m) == low ? V{} : load(m);
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
      const auto put = [&](void* to, V v) { store_part(static_cast<A*>(to) + row, count, v); };
      put(p.row_m, counted ? load(m) : low);
      put(p.row_sum, counted ? s : V{});
      put(p.row_loss, counted ? loss : V{});
      if (p.row_mass != nullptr) put(p.row_mass, counted ? load(mass) : V{});
      if (p.predictions != nullptr) {
        for (int64_t i = 0; i < count; ++i)
          p.predictions[row + i] = counted_as[i] != 0 ? row_argmax(x[i], n, sum[i] != sum[i]) : p.ignore_index;
      }
    }
    if constexpr (kBackward) {
      for (int64_t i = 0; i < count; ++i) g[i] = static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row + i);
      grad_scales<T>(p, row, count, m, sum, weight, mass, scale, shift, of_target);
      const V by = counted ? load(scale) : V{}, less = counted ? load(of_target) : V{};
      for (int64_t c = 0; c < n; ++c) z[c] = kGeneral ? multiply_subtract(z[c], by, u[c] * less) : z[c] * by;
      store_lanes(z, n, g, count);
      if (p.target == nullptr) continue;
      const V beyond = exp2<T>(t) - load(shift);
      const V grad = kGeneral ? multiply_subtract(beyond, by, load(its_coefficient) * less) : beyond * by;
      for (int64_t i = 0; i < count; ++i)
        if (counted_as[i] != 0) store_one(g[i] + target[i], grad[i]);
    }
  }
}

// The search for the threshold t of one row, V = double, or of as many as a vector has lanes. [per ISA]
//
// Newton's steps for Σ p = 1 (entmax_policy-inl.h), between bounds that every sum makes closer. Only a sum that is 1 to
// its rounding ends them, and one step more, whose error is the square of what was left; or bounds between which there
// is no number. t is the sum of two numbers: in a support of 10^5 elements of 10^-5 the rounding of one would show in
// Σ p.
#if defined(TSE_ENTMAX_SEARCH_INL_H) == defined(TSE_ISA_TOGGLE)
#ifdef TSE_ENTMAX_SEARCH_INL_H
#undef TSE_ENTMAX_SEARCH_INL_H
#else
#define TSE_ENTMAX_SEARCH_INL_H
#endif
#include "entmax/entmax_policy-inl.h"

// A sum of probabilities this close to 1 is one but for the rounding of its parts, and one step more.
template <class A>
constexpr A kSumTolerance = std::is_same_v<A, double> ? A(0x1p-34) : A(0x1p-17);

template <class V>
struct Search {
  using Bool = decltype(V{} == V{});
  V hi, lo;  // origin + t
  V low, high;
  Bool goes_on;  // a row that is done stays as it is, whatever the other lanes need

  Search(V start, V bound, V other_bound)
      : hi(start),
        lo{},
        low(bound < other_bound ? bound : other_bound),
        high(bound < other_bound ? other_bound : bound),
        goes_on(V{} == V{}) {}

  // f, slope: the sums of p and p^(2 - alpha) at t.
  template <class Policy, class A>
  void step(const Policy& policy, V f, V slope, V c, Bool bisects, A tolerance) {
    const V one = V{} + A(1), away = f > one ? f - one : one - f;
    const auto is_close = away <= tolerance, has_sum = f > V{};  // false: nothing but -inf, or NaN
    const auto is_high = (f > one) == (c > V{}), is_low = (f < one) == (c > V{});
    high = goes_on & is_high ? hi : high;
    low = goes_on & is_low ? hi : low;
    const V change = lo - policy.numerator(f) / slope, newton = hi + change, middle = (low + high) * A(0.5);
    const auto is_inside = (low < newton) & (newton < high) & !bisects;
    const auto takes_newton = is_close | is_inside;
    const V next = takes_newton ? newton : middle, rest = takes_newton ? change - (newton - hi) : V{};
    const auto moves = goes_on & has_sum & (takes_newton | ((low < middle) & (middle < high)));
    hi = moves ? next : f == f ? hi : f;
    lo = moves ? rest : lo;
    goes_on = moves & (away > tolerance);
  }
};
#endif

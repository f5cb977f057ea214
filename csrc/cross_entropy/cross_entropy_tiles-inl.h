// Cross-entropy where classes are not contiguous, with options that only contiguous rows have: they are copied into
// contiguous rows, tile by tile, and their gradient takes the logits' place in the tile. [per ISA]

// The parameters of rows from `row` on, but for where their elements are.
template <class A>
inline CrossEntropyParams from_row(CrossEntropyParams p, int64_t row) {
  const auto from = [row](const void* array, int64_t size) {
    return array == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(array)) + row * size;
  };
  p.target = from(p.target, p.target_is_int32 ? sizeof(int32_t) : sizeof(int64_t));
  p.row_loss = from(p.row_loss, sizeof(A));
  p.row_m = from(p.row_m, sizeof(A));
  p.row_sum = from(p.row_sum, sizeof(A));
  p.row_others = from(p.row_others, sizeof(A));
  p.row_mass = from(p.row_mass, sizeof(A));
  p.grad_output = from(p.grad_output, p.grad_output_stride * sizeof(A));
  p.grad_lse = from(p.grad_lse, sizeof(A));
  if (p.predictions != nullptr) p.predictions += row;
  return p;
}

template <class T, bool kForward, bool kBackward>
void rows_by_tiles(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.rows.n, most = std::min(p.rows.inner, end - begin);
  const int64_t tiles = p.probabilities != nullptr ? 2 : 1;
  const Tile<T> logits(n, most, tiles), probabilities(n, tiles == 2 ? most : 0, tiles);
  for (int64_t row = begin, count; row < end; row += count) {
    count = std::min<int64_t>({logits.rows, end - row, p.rows.inner - row % p.rows.inner});
    CrossEntropyParams q = from_row<Acc<T>>(p, row);
    q.rows = q.grad_rows = {1, n, count, 0, 1, logits.stride};
    q.input = q.grad_input = logits.row(0);
    logits.gather(static_cast<const T*>(p.input) + row_offset(p.rows, row), p.rows, count);
    if (p.probabilities != nullptr) {
      q.probabilities = probabilities.row(0);
      q.probabilities_rows = q.rows;
      probabilities.gather(static_cast<const T*>(p.probabilities) + row_offset(p.probabilities_rows, row),
                           p.probabilities_rows, count);
    }
    rows_of_contiguous<T, kForward, kBackward>(q, 0, count);
    if (kBackward) logits.scatter(static_cast<T*>(p.grad_input) + row_offset(p.grad_rows, row), p.grad_rows, count);
  }
}

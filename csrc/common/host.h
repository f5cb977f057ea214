// Below autograd: dtype tags, tensors as rows, threads, CPU or CUDA kernels. [torch]
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <utility>

#include "common/check.h"
#include "common/device.h"
#include "common/types.h"

namespace tse {

inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", type);
  }
}
inline DType dtype_of(const at::Tensor& t) { return dtype_of(t.scalar_type()); }

// Arithmetic and statistics are in float32 for half types.
inline at::ScalarType accumulate_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

// `t` as rows along `dim`, or nothing where the dimensions before or after `dim` do not collapse to one stride each.
inline std::optional<Rows> try_rows(const at::Tensor& t, int64_t dim) {
  const auto sizes = t.sizes(), strides = t.strides();
  // Merges dimensions [begin, end) into one size and stride; dimensions of size 1 have no say.
  const auto merge = [&](int64_t begin, int64_t end, int64_t& size, int64_t& stride) {
    size = 1;
    stride = 0;
    for (int64_t d = end - 1; d >= begin; --d) {
      if (sizes[d] == 1) continue;
      if (size == 1) stride = strides[d];
      else if (size != 0 && strides[d] != stride * size) return false;
      size *= sizes[d];
    }
    return true;
  };
  if (t.dim() == 0) return Rows{1, 1, 1, 0, 1, 0};
  Rows r;
  r.n = sizes[dim];
  r.stride_n = r.n == 1 ? 1 : strides[dim];
  if (!merge(0, dim, r.outer, r.stride_outer) || !merge(dim + 1, t.dim(), r.inner, r.stride_inner)) return std::nullopt;
  if (r.inner == 1) {
    r.inner = std::exchange(r.outer, 1);
    r.stride_inner = std::exchange(r.stride_outer, 0);
  }
  return r;
}

// A tensor with its rows; a contiguous copy of it where it cannot be seen as rows.
struct RowTensor {
  at::Tensor tensor;
  Rows rows;
};

inline RowTensor as_rows(const at::Tensor& t, int64_t dim) {
  if (const auto rows = try_rows(t, dim)) return {t, *rows};
  const at::Tensor dense = t.contiguous();
  return {dense, *try_rows(dense, dim)};
}

constexpr int64_t kElementsPerTask = 16384;  // that a thread takes at least
constexpr int64_t kWideRow = 7 * kElementsPerTask / 4;  // longer rows are worth two threads

// The ShareRow of torch's threads.
inline void share_row(int64_t blocks, int64_t size, void (*part)(const void* f, int64_t begin, int64_t end),
                      const void* f) {
  at::parallel_for(0, blocks, std::max<int64_t>(1, kElementsPerTask / size),
                   [&](int64_t begin, int64_t end) { part(f, begin, end); });
}

// Runs f(p, begin, end) for all rows, on torch's threads. Where rows are fewer than threads, and wide, threads share
// each row, if its elements are `contiguous`.
template <class Params, class F>
void parallel_rows(Params p, const Rows& rows, bool contiguous, const F& f) {
  const int64_t count = row_count(rows);
  if (contiguous && rows.n > kWideRow && count < at::get_num_threads()) {
    p.share_row = share_row;
    return f(p, 0, count);
  }
  at::parallel_for(0, count, std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, rows.n)),
                   [&](int64_t begin, int64_t end) { f(p, begin, end); });
}

// Asks for huge pages where a large output has none yet: most of the time of writing into fresh memory is the kernel's,
// page by page. Outputs below 4 MiB come out of malloc's heap and are mostly warm.
inline const at::Tensor& with_huge_pages(const at::Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  if (t.is_cpu() && t.nbytes() >= 2 * kHuge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1), last = (begin + t.nbytes()) & ~(kHuge - 1);
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
  }
#endif
  return t;
}

// Calls a launcher, which is null in a build without CUDA kernels. `t`: some tensor of the call.
template <class Params>
void launch(const char* op, void (*launcher)(const Params& p, cudaStream_t stream), const Params& p,
            const at::Tensor& t) {
  TSE_CHECK_NOT_IMPLEMENTED(launcher != nullptr, op, "input", "expected a CPU tensor, as there is no CUDA kernel, got ",
                            t.device());
  launcher(p, current_stream(t));
}

// The kernels of an operator, for one of its directions.
template <class Params>
struct Kernels {
  void (*cpu)(const Params& p, int64_t begin, int64_t end);  // rows [begin, end)
  void (*cuda)(const Params& p, cudaStream_t stream);  // all rows

  // contiguous: the elements of a row are, in all tensors. `t`: some tensor of the call.
  void run(const char* op, const Params& p, const Rows& rows, bool contiguous, const at::Tensor& t) const {
    if (!use_cuda(t)) return parallel_rows(p, rows, contiguous, cpu);
    launch(op, cuda, p, t);
  }
};

}  // namespace tse

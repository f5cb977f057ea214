// The tensors of a shape, the library's launches for it, and the check of what they wrote. [CUDA]
#pragma once
#include "cross_entropy/cross_entropy.h"
#include "entmax/entmax.h"
#include "entmax_loss/entmax_loss.h"
#include "gpu_sweep_reference.cuh"
#include "selective_log_softmax/selective_log_softmax.h"
#include "softmax/softmax.h"
#include "sparsemax/sparsemax.h"

namespace sweep {

// Calls f(T()) with the storage type of a shape.
template <class F>
void with_type(const Shape& shape, const F& f) {
  if (shape.is_bf16) f(__nv_bfloat16());
  else f(float());
}

// Variants read inputs and params, and write what the params of the library name, with the same meaning. The
// grad_output of a mean is 1.
class Problem {
 public:
  const Shape shape;
  const int most_blocks;  // of a persistent kernel, so that a block has several rows; 0: as many as run at a time
  tse::CrossEntropyParams cross_entropy{};
  tse::SelectiveLogSoftmaxParams selective{};
  tse::RowMapParams map{};
  tse::EntmaxLossParams entmax_loss{};

  Problem(const Shape& shape, int most_blocks) : shape(shape), most_blocks(most_blocks) {
    const bool is_map = shape.is_map();
    x_ = Buffer(shape.bytes());
    if (is_map || shape.has_backward()) out_ = Buffer(shape.bytes());
    if (is_map && shape.has_backward()) y_ = Buffer(shape.bytes());
    if (shape.op == Op::kEntmax15Loss) y_ = Buffer(shape.rows * sizeof(tse::RowThreshold<float>));
    if (is_map) {
      expected_ = Buffer(shape.bytes());
    } else {
      const int64_t rows = shape.rows;
      target_ = Buffer(rows * sizeof(int64_t));
      row_out_ = Buffer(rows * sizeof(float));
      row_grad_ = Buffer(rows * sizeof(float));
      stats_ = Buffer(3 * sizeof(double) + 3 * rows * sizeof(float));
      one_grad_ = Buffer(sizeof(float));
      loss_ = Buffer(sizeof(float));
      reference_ = Buffer(rows * sizeof(RowReference));
      mean_ = Buffer(sizeof(double));
      const float grad = float(outer_scale());
      SWEEP_CHECK(cudaMemcpy(one_grad_.as(), &grad, sizeof grad, cudaMemcpyHostToDevice));
    }
    differences_ = Buffer(kKinds * sizeof(Difference));
    if (is_map) set_map_params();
    else set_loss_params();
  }

  // What a problem takes: logits and up to three tensors like them. The rest is small.
  static int64_t bytes_of(const Shape& s) {
    const bool is_map = s.is_map();
    return s.bytes() * (is_map ? 3 + s.has_backward() : 1 + s.has_backward());
  }

  // Fills the inputs and computes what outputs are compared with: the rows of a check, or those that are timed.
  void fill(uint64_t seed, bool is_mixed) {
    input_ = {shape.rows, shape.n, shape.sigma, seed, is_mixed};
    with_type(shape, [&](auto type) {
      using T = decltype(type);
      if (shape.is_map()) fill_map<T>();
      else fill_loss<T>();
    });
  }

  void poison() {
    for (Buffer* b : {&out_, &row_out_, &stats_, &loss_}) b->poison();
  }

  // The outputs against the reference.
  std::vector<Error> errors() {
    std::vector<Error> errors;
    with_type(shape, [&](auto type) {
      using T = decltype(type);
      const double limit = sizeof(T) == 2 ? 4e-3 : 1e-5;  // of bf16: a little more than its rounding, 2^-8
      const int64_t blocks = grid();
      if (shape.is_map()) {
        compare(errors, shape.has_forward() ? "output" : "grad_input", limit, [&](Difference* d) {
          run("compare_tensor_kernel", compare_tensor_kernel<T>, blocks, input_, const_of<T>(out_),
              const_of<T>(expected_), d);
        });
        return;
      }
      const auto reference = const_of<RowReference>(reference_);
      if (shape.op == Op::kCrossEntropy && shape.reduce == Reduce::kMean) errors.push_back(error_of_mean());
      else
        compare(errors, is_loss() ? "loss" : "logp", 1e-5, [&](Difference* d) {
          run("compare_rows_kernel", compare_rows_kernel, blocks, input_, const_of<float>(row_out_), reference,
              is_loss() ? 1.0 : -1.0, d);
        });
      for (bool at_target : {true, false}) {
        if (!shape.has_backward()) continue;
        compare(errors, at_target ? "grad_input at the target" : "grad_input elsewhere", limit, [&](Difference* d) {
          run("compare_loss_gradient_kernel", compare_loss_gradient_kernel<T>, blocks, input_, shape.alpha(), at_target,
              const_of<T>(out_), const_of<T>(x_), const_of<int64_t>(target_), reference, d);
        });
      }
    });
    return errors;
  }

  void launch_library() const {
    if (shape.op == Op::kCrossEntropy) {
      tse::launch_cross_entropy_fwd(cross_entropy, nullptr);
      if (shape.has_backward()) tse::launch_cross_entropy_bwd(cross_entropy, nullptr);
    } else if (shape.op == Op::kSelectiveLogSoftmax) {
      tse::launch_selective_log_softmax_fwd(selective, nullptr);
      if (shape.has_backward()) tse::launch_selective_log_softmax_bwd(selective, nullptr);
    } else if (shape.op == Op::kEntmax15Loss) {
      launch_prepared_entmax(entmax_loss.map);
      tse::launch_entmax_loss_fwd(entmax_loss, nullptr);
      tse::launch_entmax_loss_bwd(entmax_loss, nullptr);
    } else if (shape.op == Op::kEntmax && shape.has_forward()) {
      launch_prepared_entmax(map);
    } else {
      launcher()(map, nullptr);
    }
  }

  // Kernels that only move the bytes of this shape. They write where outputs are.
  std::vector<std::pair<std::string, std::function<void()>>> roofs() const {
    const int64_t bytes = shape.bytes();
    const auto read = [this, bytes] { launch_read(x_.as(), bytes); };
    const auto copy = [this, bytes] { launch_copy(x_.as(), out_.as(), bytes); };
    const auto copy_by_driver = [this, bytes] { launch_memcpy(x_.as(), out_.as(), bytes); };
    switch (shape.roof()) {
      case Roof::kRead:
        return {{"read", read}};
      case Roof::kCopy:
        return {{"copy", copy}, {"memcpy", copy_by_driver}};
      case Roof::kAdd:
        return {{"add", [this, bytes] { launch_add(x_.as(), y_.as(), out_.as(), bytes); }}};
      default:
        return {{"read + copy", [=] { read(), copy(); }}, {"read + memcpy", [=] { read(), copy_by_driver(); }}};
    }
  }

 private:
  bool is_loss() const { return shape.op == Op::kCrossEntropy || shape.op == Op::kEntmax15Loss; }
  void launch_prepared_entmax(const tse::RowMapParams& map) const {
    tse::PreparedRowsParams p{};
    p.map = map;
    p.map.dtype = tse::DType::kFloat32;
    p.input_dtype = p.output_dtype = dtype();
    tse::launch_prepared_entmax_fwd(p, nullptr);
  }
  // Of a map.
  auto launcher() const -> void (*)(const tse::RowMapParams&, cudaStream_t) {
    const bool forward = shape.has_forward();
    switch (shape.op) {
      case Op::kSoftmax:
        return forward ? tse::launch_softmax_fwd : tse::launch_softmax_bwd;
      case Op::kSparsemax:
        return forward ? tse::launch_sparsemax_fwd : tse::launch_sparsemax_bwd;
      case Op::kEntmax15:
        return forward ? tse::launch_entmax15_fwd : tse::launch_entmax15_bwd;
      default:
        return tse::launch_entmax_bwd;
    }
  }
  template <class V>
  static const V* const_of(const Buffer& b) {
    return b.as<V>();
  }
  template <class... Params, class... Args>
  static void run(const char* name, void (*kernel)(Params...), int64_t blocks, Args... args) {
    tse::launch(name, kernel, blocks, kThreads, 0, nullptr, args...);
  }
  int64_t grid() const { return std::min<int64_t>(shape.rows, 8 * tse::device_limits().multiprocessors); }
  // What comes in beside the rows' own grad_output.
  double outer_scale() const { return shape.reduce == Reduce::kMeanOutside ? 1.0 / double(shape.rows) : 1.0; }
  tse::Rows rows() const { return {1, shape.n, shape.rows, 0, 1, shape.n}; }
  tse::DType dtype() const { return shape.is_bf16 ? tse::DType::kBFloat16 : tse::DType::kFloat32; }

  void set_map_params() {
    tse::RowMapParams& p = map;
    p.dtype = dtype();
    p.rows = p.output_rows = p.grad_output_rows = p.grad_input_rows = rows();
    p.input = x_.as();
    p.output = shape.has_forward() ? out_.as() : y_.as();
    p.grad_output = x_.as();
    p.grad_input = out_.as();
    p.alpha.same = shape.alpha();
  }

  void set_loss_params() {
    double* const totals = stats_.as<double>();
    float* const row_stats = reinterpret_cast<float*>(totals + 3);
    const bool is_mean = shape.reduce == Reduce::kMean;
    tse::CrossEntropyParams& p = cross_entropy;
    p.dtype = selective.dtype = dtype();
    p.rows = selective.rows = rows();
    p.image = 1;
    p.input = selective.input = x_.as();
    p.target = selective.index = target_.as();
    p.ignore_index = kIgnored;
    p.reduction = is_mean ? tse::Reduction::kMean : tse::Reduction::kNone;
    p.row_loss = is_mean ? nullptr : row_out_.as();
    p.row_m = selective.row_m = row_stats;
    p.row_sum = selective.row_sum = row_stats + shape.rows;
    p.row_others = selective.row_others = row_stats + 2 * shape.rows;
    p.loss = is_mean ? loss_.as() : nullptr;
    p.total_weight = totals;
    p.guess = totals + 2;
    selective.k = 1;
    selective.logp = row_out_.as();
    selective.grad_logp = row_grad_.as();
    if (shape.has_backward()) {
      p.grad_rows = selective.grad_rows = rows();
      p.grad_input = selective.grad_input = out_.as();
      // As in training: forward writes the gradient for the grad_output of the last steps.
      p.assumed = is_mean ? tse::Assumed::kGuessed : tse::Assumed::kNone;
      p.compare_guess = is_mean;
      p.grad_output_stride = shape.reduce == Reduce::kNone;
      p.grad_output = shape.reduce == Reduce::kNone ? row_grad_.as() : one_grad_.as();
    }
    scratch_ = Buffer(tse::cross_entropy_scratch(p));
    p.sums = scratch_.as<tse::CrossEntropySums>();
    set_entmax_loss_params();
  }

  void set_entmax_loss_params() {
    tse::EntmaxLossParams& p = entmax_loss;
    p.name = tse::EntmaxLossName::kEntmax15;
    p.map.dtype = tse::DType::kFloat32;
    p.map.rows = p.map.output_rows = p.map.grad_input_rows = rows();
    p.map.input = x_.as();
    p.map.thresholds = y_.as();
    p.map.grad_input = out_.as();
    p.map.alpha.same = shape.alpha();
    p.dtype = dtype();
    p.target = target_.as();
    p.ignore_index = kIgnored;
    p.row_loss = row_out_.as();
    p.grad_output = row_grad_.as();
    p.grad_output_stride = 1;
    p.divisor = 1;
  }

  template <class T>
  void fill_loss() {
    T* const x = x_.as<T>();
    const float* const grads = shape.reduce != Reduce::kNone ? nullptr : row_grad_.as<float>();
    RowReference* const reference = reference_.as<RowReference>();
    run("fill_kernel", fill_kernel<T>, grid(), input_, x);
    run("fill_targets_kernel", fill_targets_kernel, grid(), input_, is_loss(), target_.as<int64_t>(),
        row_grad_.as<float>());
    run("loss_reference_kernel", loss_reference_kernel<T>, grid(), shape.rows, shape.n, shape.alpha(), const_of<T>(x_),
        const_of<int64_t>(target_), reference);
    run("finish_reference_kernel", finish_reference_kernel, 1, shape.rows, const_of<int64_t>(target_), grads,
        shape.reduce == Reduce::kMean, is_loss() ? outer_scale() : -1.0, reference, mean_.as<double>());
  }

  template <class T>
  void fill_map() {
    run("fill_kernel", fill_kernel<T>, grid(), input_, x_.as<T>());
    T* const y = shape.has_forward() ? expected_.as<T>() : y_.as<T>();
    run("map_reference_kernel", map_reference_kernel<T>, grid(), shape.rows, shape.n, shape.alpha(), const_of<T>(x_),
        y);
    if (shape.has_forward()) return;
    Input grad = input_;  // in the place of the logits, which are no longer needed
    grad.seed += 3000;
    grad.is_mixed = false;
    grad.sigma = 1;
    run("fill_kernel", fill_kernel<T>, grid(), grad, x_.as<T>());
    run("map_gradient_reference_kernel", map_gradient_reference_kernel<T>, grid(), shape.rows, shape.n, shape.alpha(),
        const_of<T>(y_), const_of<T>(x_), expected_.as<T>());
  }

  Error error_of_mean() const {
    float got = 0;
    double expected = 0;
    SWEEP_CHECK(cudaMemcpy(&got, loss_.as(), sizeof got, cudaMemcpyDeviceToHost));
    SWEEP_CHECK(cudaMemcpy(&expected, mean_.as(), sizeof expected, cudaMemcpyDeviceToHost));
    const double error = std::fabs(double(got) - expected) / std::fabs(expected);
    return {"mean loss", "all rows", error, error, error <= 1e-5};
  }

  // Appends what a comparison found, for each kind of input.
  template <class Compare>
  void compare(std::vector<Error>& errors, const char* output, double limit, const Compare& compare_by) {
    differences_.fill(0);
    compare_by(differences_.as<Difference>());
    Difference found[kKinds];
    SWEEP_CHECK(cudaMemcpy(found, differences_.as(), sizeof found, cudaMemcpyDeviceToHost));
    const auto ratio = [](double got, double expected) { return got == 0 ? 0 : got / expected; };
    const auto number = [](unsigned long long bits) {
      double v;
      std::memcpy(&v, &bits, sizeof v);
      return v;
    };
    for (int kind = 0; kind < kKinds; ++kind) {
      const Difference& d = found[kind];
      if (d.elements == 0) continue;
      const double norm = ratio(std::sqrt(d.squares), std::sqrt(d.expected_squares));
      const double max = ratio(number(d.max), number(d.expected_max));
      errors.push_back({output, kKindNames[kind], norm, max, norm <= limit && max <= 2 * limit});
    }
  }

  Input input_{};
  Buffer x_, out_, y_, expected_;  // (rows, n)
  Buffer target_, row_out_, row_grad_, stats_, reference_;  // (rows)
  Buffer one_grad_, loss_, mean_, scratch_, differences_;
};

}  // namespace sweep

// The sweep's host logic, which needs no GPU: shapes, arguments, statistics, JSON and the table. [plain]
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sweep {

// ---- shapes ---------------------------------------------------------------------------------------------------------

enum class Op { kCrossEntropy, kSelectiveLogSoftmax, kEntmax15Loss, kSoftmax, kSparsemax, kEntmax15, kEntmax };
constexpr const char* kOpNames[] = {
    "cross_entropy", "selective_log_softmax", "entmax15_loss", "softmax", "sparsemax", "entmax15", "entmax"};
enum class Mode { kForward, kBackward, kForwardBackward };
// Of cross-entropy. kMeanOutside: reduction="none" with a mean of the losses after it, so that grad_output is one
// number.
enum class Reduce { kNone, kMean, kMeanOutside };
// The kernel without arithmetic that moves the bytes of a shape.
enum class Roof { kRead, kCopy, kAdd, kReadAndCopy };

struct Shape {
  Op op;
  Mode mode;
  Reduce reduce;
  int64_t rows, n;
  bool is_bf16;  // else float32
  double sigma = 1;  // standard deviation of the inputs that are timed

  int64_t element_bytes() const { return is_bf16 ? 2 : 4; }
  int64_t bytes() const { return rows * n * element_bytes(); }
  bool is_map() const { return op >= Op::kSoftmax; }
  // Of the map, or of the map that a loss belongs to.
  double alpha() const {
    return op == Op::kSparsemax                             ? 2
           : op == Op::kEntmax15 || op == Op::kEntmax15Loss ? 1.5
           : op == Op::kEntmax                              ? 1.3
                                                            : 1;
  }
  bool has_forward() const { return mode != Mode::kBackward; }
  bool has_backward() const { return mode != Mode::kForward; }

  Roof roof() const {
    if (is_map()) return mode == Mode::kForward ? Roof::kCopy : Roof::kAdd;
    if (mode == Mode::kForward) return Roof::kRead;
    if (op == Op::kEntmax15Loss) return Roof::kCopy;
    return op == Op::kCrossEntropy && reduce == Reduce::kMean ? Roof::kCopy : Roof::kReadAndCopy;
  }

  // As `python -m benchmarks` names its rows.
  std::string name() const {
    std::ostringstream s;
    s << kOpNames[int(op)] << ' ' << rows << 'x' << n << (is_bf16 ? " bfloat16" : " float32");
    if (sigma != 1) s << " x" << sigma;
    if (op == Op::kCrossEntropy && reduce != Reduce::kMean)
      s << (reduce == Reduce::kNone ? " none" : " none, mean outside");
    s << (mode == Mode::kForward ? " forward" : mode == Mode::kBackward ? " backward" : " forward+backward");
    return s.str();
  }
};

inline std::vector<Shape> all_shapes() {
  constexpr Op kLoss = Op::kCrossEntropy;
  std::vector<Shape> shapes;
  for (int64_t n = 256; n <= 65536; n *= 2) shapes.push_back({kLoss, Mode::kForward, Reduce::kNone, 32768, n, true});
  shapes.push_back({kLoss, Mode::kForward, Reduce::kNone, 16384, 131072, true});
  for (int64_t n : {262144, 32000, 128256, 151936})
    shapes.push_back({kLoss, Mode::kForward, Reduce::kNone, 8192, n, true});
  shapes.push_back({kLoss, Mode::kForward, Reduce::kNone, 4096, 128256, false});
  for (int64_t n : {32000, 50256, 50257, 128256, 151936, 262144})
    shapes.push_back({kLoss, Mode::kForwardBackward, Reduce::kMean, 8192, n, true});
  shapes.push_back({kLoss, Mode::kForwardBackward, Reduce::kMean, 4096, 128256, false});
  for (Reduce reduce : {Reduce::kNone, Reduce::kMeanOutside})
    for (int64_t n : {32000, 128256}) shapes.push_back({kLoss, Mode::kForwardBackward, reduce, 8192, n, true});
  for (Mode mode : {Mode::kForward, Mode::kForwardBackward}) {
    shapes.push_back({Op::kSelectiveLogSoftmax, mode, Reduce::kNone, 8192, 151936, true});
    shapes.push_back({kLoss, mode, Reduce::kMean, 8, 10, false});
  }
  for (auto [rows, n] : {std::pair<int64_t, int64_t>{131072, 512}, {8192, 32000}})
    shapes.push_back({Op::kEntmax15Loss, Mode::kForwardBackward, Reduce::kNone, rows, n, true});
  constexpr std::pair<int64_t, int64_t> kMaps[] = {
      {1048576, 64}, {16384, 4096}, {8192, 8192}, {2048, 32000}, {512, 131072}};
  for (Mode mode : {Mode::kForward, Mode::kBackward})
    for (auto [rows, n] : kMaps) {
      for (double sigma : {1.0, 0.1, 0.01})
        shapes.push_back({Op::kSparsemax, mode, Reduce::kNone, rows, n, true, sigma});
      for (Op op : {Op::kSoftmax, Op::kEntmax15, Op::kEntmax})
        shapes.push_back({op, mode, Reduce::kNone, rows, n, true});
    }
  return shapes;
}

// The same rows, few of them: for compute-sanitizer, under which a kernel takes a hundred times as long.
inline std::vector<Shape> tiny(const std::vector<Shape>& shapes) {
  std::vector<Shape> result;
  for (Shape s : shapes) {
    if (s.sigma != 1) continue;
    s.rows = std::min(s.rows, std::max<int64_t>(10, 4096 / s.n));
    result.push_back(s);
  }
  return result;
}

// ---- arguments ------------------------------------------------------------------------------------------------------

constexpr const char* kUsage =
    "gpu_sweep: checks and times the CUDA kernels, without torch\n"
    "  --help            print this\n"
    "  --list            print shapes and variants; needs no GPU\n"
    "  --probe           exit status 0 if this program can run on this card\n"
    "  --only TEXT       shapes whose name contains TEXT; \"roofs\" for the roofs\n"
    "  --tiny            few rows, checked but not timed: for compute-sanitizer\n"
    "  --rounds N        launches of each variant that are timed (15)\n"
    "  --json FILE       rewritten after each block\n";

struct Options {
  bool help = false, list = false, probe = false, tiny = false;
  int rounds = 15;
  std::string only, json;

  bool has(const std::string& name) const { return name.find(only) != std::string::npos; }
  std::vector<Shape> shapes() const {
    std::vector<Shape> result;
    for (const Shape& s : tiny ? sweep::tiny(all_shapes()) : all_shapes())
      if (has(s.name())) result.push_back(s);
    return result;
  }
};

inline Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    const auto value = [&] {
      if (i + 1 == arguments.size()) throw std::invalid_argument(name + ": expected a value");
      return arguments[++i];
    };
    if (name == "--help") options.help = true;
    else if (name == "--list") options.list = true;
    else if (name == "--probe") options.probe = true;
    else if (name == "--tiny") options.tiny = true;
    else if (name == "--only") options.only = value();
    else if (name == "--json") options.json = value();
    else if (name == "--rounds") options.rounds = std::atoi(value().c_str());
    else throw std::invalid_argument("unknown argument " + name);
  }
  if (options.rounds < 1) throw std::invalid_argument("--rounds: expected a positive number");
  return options;
}

// ---- results --------------------------------------------------------------------------------------------------------

struct Stats {
  double median, min, max;
};
inline Stats stats_of(std::vector<double> values) {
  if (values.empty()) return {NAN, NAN, NAN};
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return {(values[(n - 1) / 2] + values[n / 2]) / 2, values.front(), values.back()};
}

// An output against the reference, over the rows of one kind of input.
struct Error {
  std::string output, input;
  double norm;  // ‖got - expected‖ / ‖expected‖
  double max;  // max |got - expected| / max |expected|
  bool is_right;
};

struct Result {
  std::string variant;
  bool is_roof = false;
  std::string status = "ok";  // or "wrong", or why it was not timed
  std::vector<Error> errors = {};
  std::vector<double> us = {};  // a round each
};

using Fields = std::vector<std::pair<std::string, std::string>>;

struct Block {
  std::string name;
  int64_t bytes = 0;  // of the logits
  std::vector<Result> results = {};
  Fields clocks_before = {}, clocks_after = {};
};

// Microseconds of the fastest roof; NaN without one.
inline double roof_us(const Block& block) {
  double best = NAN;
  for (const Result& r : block.results)
    if (r.is_roof && !r.us.empty()) best = std::fmin(best, stats_of(r.us).median);
  return best;
}
inline double ratio(const Block& block, const Result& result) { return stats_of(result.us).median / roof_us(block); }

// Whether nothing was wrong. What the card cannot run is no failure.
inline bool all_right(const std::vector<Block>& blocks) {
  for (const Block& b : blocks)
    for (const Result& r : b.results)
      if (r.status != "ok" && r.status.rfind("skipped", 0) != 0) return false;
  return true;
}

constexpr const char* kClockFields[] = {"clocks.sm", "clocks.mem", "power.draw", "temperature.gpu",
                                        "clocks_event_reasons.active"};
// A line of nvidia-smi's CSV; empty where it has other fields.
inline Fields parse_clocks(const std::string& line) {
  Fields fields;
  std::istringstream cells(line);
  for (std::string cell; std::getline(cells, cell, ',');) {
    const size_t begin = cell.find_first_not_of(" \r\n"), end = cell.find_last_not_of(" \r\n");
    if (begin == std::string::npos || fields.size() == std::size(kClockFields)) return {};
    fields.emplace_back(kClockFields[fields.size()], cell.substr(begin, end + 1 - begin));
  }
  return fields.size() == std::size(kClockFields) ? fields : Fields{};
}

// ---- JSON -----------------------------------------------------------------------------------------------------------

inline std::string json(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 32 ? ' ' : c;
  }
  return result + '"';
}
inline std::string json(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}
inline std::string json(const Fields& fields) {
  std::string result;
  for (const auto& [name, value] : fields) result += (result.empty() ? "" : ", ") + json(name) + ": " + json(value);
  return '{' + result + '}';
}
template <class V>
std::string json(const std::vector<V>& values) {
  std::string result;
  for (const V& value : values) result += (result.empty() ? "" : ", ") + json(value);
  return '[' + result + ']';
}
inline std::string json(const Error& e) {
  return "{\"output\": " + json(e.output) + ", \"input\": " + json(e.input) + ", \"norm\": " + json(e.norm) +
         ", \"max\": " + json(e.max) + ", \"right\": " + (e.is_right ? "true}" : "false}");
}

inline std::string json(const Block& block) {
  std::string results;
  for (const Result& r : block.results) {
    const Stats s = stats_of(r.us);
    results += (results.empty() ? "" : ",") + std::string("\n   {\"variant\": ") + json(r.variant) +
               ", \"roof\": " + (r.is_roof ? "true" : "false") + ", \"status\": " + json(r.status) +
               ", \"us\": {\"median\": " + json(s.median) + ", \"min\": " + json(s.min) + ", \"max\": " + json(s.max) +
               "}, \"ratio\": " + json(ratio(block, r)) + ", \"rounds\": " + json(r.us) +
               ", \"errors\": " + json(r.errors) + '}';
  }
  return "\n  {\"name\": " + json(block.name) + ", \"bytes\": " + std::to_string(block.bytes) +
         ", \"clocks_before\": " + json(block.clocks_before) + ", \"clocks_after\": " + json(block.clocks_after) +
         ", \"results\": [" + results + "]}";
}

inline std::string json(const Fields& environment, const std::vector<Block>& blocks) {
  return "{\"environment\": " + json(environment) + ",\n \"blocks\": " + json(blocks) + "}\n";
}

// At once, so that a run that is stopped leaves a whole file.
inline void write_json(const std::string& path, const Fields& environment, const std::vector<Block>& blocks) {
  if (path.empty()) return;
  const std::string temporary = path + ".new";
  std::ofstream file(temporary);
  file << json(environment, blocks);
  file.close();
  if (!file || std::rename(temporary.c_str(), path.c_str()) != 0) throw std::runtime_error("cannot write " + path);
}

// ---- the table ------------------------------------------------------------------------------------------------------

inline std::string table(const std::vector<Block>& blocks) {
  std::ostringstream s;
  char line[256];
  std::snprintf(line, sizeof line, "%-56s %-16s %9s %9s %9s %7s\n", "", "", "us", "min", "max", "x roof");
  s << line;
  for (const Block& block : blocks)
    for (const Result& r : block.results) {
      const Stats t = stats_of(r.us);
      std::snprintf(line, sizeof line, "%-56s %-16s ", block.name.c_str(), r.variant.c_str());
      s << line;
      if (r.us.empty()) {
        s << r.status << '\n';
        continue;
      }
      std::snprintf(line, sizeof line, "%9.2f %9.2f %9.2f ", t.median, t.min, t.max);
      s << line;
      if (std::isfinite(ratio(block, r))) std::snprintf(line, sizeof line, "%7.2f\n", ratio(block, r));
      else std::snprintf(line, sizeof line, "%7s\n", "");
      s << line;
    }
  return s.str();
}

}  // namespace sweep

// Checks and times the CUDA kernels without torch: every variant of an operator at the shapes of the tables. [CUDA]
//
// A variant is checked first: outputs poisoned, inputs of several kinds, two seeds, against fp64 on the device. What is
// wrong is reported and not timed. Then all variants of a shape take turns with the roof of the shape, a kernel that
// only moves its bytes, each launch after a flush of L2. The program links the library's .cu files:
//
//   nvcc -std=c++17 -O3 -arch=sm_90 --threads=0 -include tools/gpu_sweep_dtypes.cuh -Icsrc tools/gpu_sweep.cu
//     csrc/*/*.cu -o build/gpu_sweep
#include <ctime>
#include <iostream>

#include "gpu_sweep_problem.cuh"
#include "ring.cuh"

namespace sweep {
namespace {

struct Variant {
  std::string name;
  bool (*fits)(const Shape&);  // known without a card
  bool (*runs_here)();
  void (*launch)(const Problem&);
};

// Cross-entropy by ring.cuh, with clusters where a block's ring is small for a row.
template <int kCluster, int kConsumers>
Variant ring_variant() {
  return {"ring " + std::to_string(kConsumers) + (kCluster == 1 ? "" : " x" + std::to_string(kCluster)),
          [](const Shape& s) {
            const int64_t row_bytes = s.n * s.element_bytes();
            if (s.op != Op::kCrossEntropy || row_bytes < (kCluster == 1 ? 8192 : 65536)) return false;
            if (s.mode == Mode::kForward) return s.reduce == Reduce::kNone;
            return s.reduce == Reduce::kMean && ring::fits<kCluster>(row_bytes);
          },
          [] {
            int device = 0, major = 0;
            SWEEP_CHECK(cudaGetDevice(&device));
            SWEEP_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
            return major >= 9;
          },
          [](const Problem& p) { ring::launch_cross_entropy<kCluster, kConsumers>(p.cross_entropy, p.most_blocks); }};
}

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
      {"library", [](const Shape&) { return true; }, [] { return true; }, [](const Problem& p) { p.launch_library(); }},
      ring_variant<1, 256>(),
      ring_variant<1, 512>(),
      ring_variant<2, 256>(),
      ring_variant<2, 512>(),
      ring_variant<4, 256>(),
      ring_variant<4, 512>(),
  };
  return all;
}

// Prints and keeps what the variants wrote that is wrong.
void check(Problem& problem, const Variant& variant, uint64_t seed, Result& result) {
  for (int i = 0; i < 3; ++i) {  // the library writes the gradient in forward from the third step on
    problem.poison();
    variant.launch(problem);
  }
  for (Error e : problem.errors()) {
    e.input += ", seed " + std::to_string(seed);
    result.errors.push_back(e);
    if (e.is_right) continue;
    result.status = "wrong";
    std::printf("WRONG %s, %s: %s of %s: norm %.3g, max %.3g\n", problem.shape.name().c_str(), variant.name.c_str(),
                e.output.c_str(), e.input.c_str(), e.norm, e.max);
  }
}

// Checks all variants of a shape, and times those that are right together with the roof. `clocks`: as last read.
Block measure(const Shape& shape, const Options& options, const Clock& clock, Fields& clocks) {
  Block block{shape.name(), shape.bytes()};
  size_t free = 0, total = 0;
  SWEEP_CHECK(cudaMemGetInfo(&free, &total));
  if (size_t(Problem::bytes_of(shape)) + 512 * kMiB > free) {
    block.results.push_back({"library", false, "skipped: too large for this card"});
    return block;
  }
  Problem problem(shape, options.tiny ? 4 : 0);
  std::vector<const Variant*> chosen;
  for (const Variant& v : variants()) {
    if (!v.fits(shape)) continue;
    chosen.push_back(&v);
    block.results.push_back({v.name, false, v.runs_here() ? "ok" : "skipped: not on this card"});
  }
  for (uint64_t seed = 1; seed <= (options.tiny ? 1 : 2); ++seed) {
    problem.fill(seed, /*is_mixed=*/true);
    for (size_t i = 0; i < chosen.size(); ++i) {
      if (block.results[i].status != "ok") continue;
      try {
        check(problem, *chosen[i], seed, block.results[i]);
      } catch (const std::exception& error) {
        block.results[i].status = std::string("failed: ") + error.what();
        std::printf("%s, %s: %s\n", block.name.c_str(), chosen[i]->name.c_str(), error.what());
      }
    }
  }
  if (options.tiny) return block;

  problem.fill(/*seed=*/3, /*is_mixed=*/false);
  std::vector<std::function<void()>> launches;
  std::vector<size_t> timed;
  for (size_t i = 0; i < chosen.size(); ++i) {
    if (block.results[i].status != "ok") continue;
    timed.push_back(i);
    launches.push_back([&problem, v = chosen[i]] { v->launch(problem); });
  }
  for (const auto& [name, launch] : problem.roofs()) {
    timed.push_back(block.results.size());
    block.results.push_back({name, /*is_roof=*/true});
    launches.push_back(launch);
  }
  block.clocks_before = clocks;
  const auto us = clock.times(launches, options.rounds);
  block.clocks_after = clocks = read_clocks(clock);
  for (size_t i = 0; i < us.size(); ++i) block.results[timed[i]].us = us[i];
  return block;
}

Fields environment() {
  int device = 0, driver = 0, runtime = 0;
  SWEEP_CHECK(cudaGetDevice(&device));
  cudaDeviceProp card;
  SWEEP_CHECK(cudaGetDeviceProperties(&card, device));
  SWEEP_CHECK(cudaDriverGetVersion(&driver));
  SWEEP_CHECK(cudaRuntimeGetVersion(&runtime));
  char date[16];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  return {{"date", date},
          {"device", card.name},
          {"capability", std::to_string(card.major) + '.' + std::to_string(card.minor)},
          {"multiprocessors", std::to_string(card.multiProcessorCount)},
          {"memory_bytes", std::to_string(card.totalGlobalMem)},
          {"l2_bytes", std::to_string(card.l2CacheSize)},
          {"driver", std::to_string(driver)},
          {"runtime", std::to_string(runtime)}};
}

int list(const Options& options) {
  for (const Shape& shape : options.shapes()) {
    std::string names;
    for (const Variant& v : variants())
      if (v.fits(shape)) names += (names.empty() ? "" : ", ") + v.name;
    std::cout << shape.name() << ": " << names << '\n';
  }
  return 0;
}

int probe() {
  tse::launch("null_kernel", null_kernel, 1, 32, 0, nullptr);
  SWEEP_CHECK(cudaDeviceSynchronize());
  for (const auto& [name, value] : environment()) std::cout << name << ": " << value << '\n';
  return 0;
}

int measure_all(const Options& options) {
  const Fields where = environment();
  const Clock clock;
  Fields clocks = options.tiny ? Fields{} : read_clocks(clock);
  std::vector<Block> blocks;
  const auto add = [&](const std::string& name, const std::function<Block()>& make) {
    try {
      blocks.push_back(make());
    } catch (const std::exception& error) {
      blocks.push_back({name, 0, {{"all", false, std::string("failed: ") + error.what()}}});
      std::printf("%s: %s\n", name.c_str(), error.what());
    }
    write_json(options.json, where, blocks);
    std::printf("[%zu] %s\n", blocks.size(), name.c_str());
    std::fflush(stdout);
  };
  if (options.has("roofs") && !options.tiny) {
    add("roofs", [&] { return roofs(clock, options.rounds); });
    add("roofs: latency of a load", [&] { return latency(clock, options.rounds); });
  }
  for (const Shape& shape : options.shapes()) {
    add(shape.name(), [&] { return measure(shape, options, clock, clocks); });
    if (cudaDeviceSynchronize() != cudaSuccess) break;  // after a kernel that was stopped nothing runs any more
  }
  std::cout << '\n' << table(blocks);
  return all_right(blocks) ? 0 : 1;
}

}  // namespace
}  // namespace sweep

int main(int count, char** arguments) {
  try {
    const sweep::Options options = sweep::parse({arguments + 1, arguments + count});
    if (options.help) return std::cout << sweep::kUsage, 0;
    if (options.list) return sweep::list(options);
    return options.probe ? sweep::probe() : sweep::measure_all(options);
  } catch (const std::invalid_argument& error) {
    std::cerr << error.what() << '\n' << sweep::kUsage;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "gpu_sweep: " << error.what() << '\n';
    return 1;
  }
}

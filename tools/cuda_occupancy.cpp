// How many blocks of a kernel a multiprocessor of each card holds, by NVIDIA's cuda_occupancy.h; needs no GPU.
// Reads lines of "threads registers static-bytes dynamic-bytes". The first output line names the cards, each further
// one answers an input line.
#include <cuda_occupancy.h>

#include <cstdio>

namespace {

struct Card {
  const char* name;
  int major, minor, threads, shared_kib, multiprocessors;  // threads and KiB of a multiprocessor
};
constexpr Card kCards[] = {
    {"T4", 7, 5, 1024, 64, 40},     {"A100", 8, 0, 2048, 164, 108},  {"RTX4090", 8, 9, 1536, 100, 128},
    {"H100", 9, 0, 2048, 228, 132}, {"B200", 10, 0, 2048, 228, 148},
};

int blocks(const Card& card, int threads, int registers, size_t static_bytes, size_t dynamic_bytes) {
  cudaOccDeviceProp p;
  p.computeMajor = card.major;
  p.computeMinor = card.minor;
  p.maxThreadsPerBlock = 1024;
  p.maxThreadsPerMultiprocessor = card.threads;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.sharedMemPerBlock = 48 * 1024;
  p.sharedMemPerMultiprocessor = size_t(card.shared_kib) * 1024;
  p.numSms = card.multiprocessors;
  p.reservedSharedMemPerBlock = card.major >= 8 ? 1024 : 0;
  p.sharedMemPerBlockOptin = p.sharedMemPerMultiprocessor - p.reservedSharedMemPerBlock;
  cudaOccFuncAttributes f;
  f.maxThreadsPerBlock = threads;
  f.numRegs = registers;
  f.sharedSizeBytes = static_bytes;
  f.partitionedGCConfig = PARTITIONED_GC_OFF;
  f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  f.maxDynamicSharedSizeBytes = p.sharedMemPerBlockOptin - static_bytes;
  f.numBlockBarriers = 1;
  const cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &state, threads, dynamic_bytes) != CUDA_OCC_SUCCESS)
    return -1;
  return result.activeBlocksPerMultiprocessor;
}

}  // namespace

int main() {
  for (const Card& card : kCards) std::printf("%s ", card.name);
  std::printf("\n");
  int threads, registers;
  size_t static_bytes, dynamic_bytes;
  while (std::scanf("%d %d %zu %zu", &threads, &registers, &static_bytes, &dynamic_bytes) == 4) {
    for (const Card& card : kCards) std::printf("%d ", blocks(card, threads, registers, static_bytes, dynamic_bytes));
    std::printf("\n");
  }
}

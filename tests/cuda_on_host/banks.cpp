// Shared-memory bank conflicts, counted while kernels run on the host: kernels are compiled with -fsanitize=thread,
// which calls the functions below at every access, and linked without its library.
//
// What lanes of a warp access at one place in the source, each for the k-th time in this block, is taken for one
// instruction. A multiprocessor serves it in groups of lanes that together access at most 128 bytes; a group whose
// lanes want different 4-byte words of one of the 32 banks is served once for each of these words.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include "executor.h"

namespace {

struct Access {
  unsigned lane;
  uintptr_t address;
  int bytes;
};
using Place = uintptr_t;                               // return address
using Instruction = std::tuple<Place, unsigned, int>;  // in which warp, for the how-manieth time

std::map<Instruction, std::vector<Access>> instructions;
std::map<std::pair<Place, unsigned>, int> times;  // that a thread came to a place
std::map<Place, int> ways;                        // of the worst conflict at a place
long long block_of_these = -1;

int served(const std::vector<Access>& group) {
  std::map<uintptr_t, std::set<uintptr_t>> words;  // of each bank
  size_t most = 1;
  for (const Access& a : group)
    for (uintptr_t word = a.address / 4; word <= (a.address + a.bytes - 1) / 4; ++word) {
      words[word % 32].insert(word);
      most = std::max(most, words[word % 32].size());
    }
  return int(most);
}

// A structure is accessed in pieces as large as its alignment, at most 16 bytes.
unsigned piece_of(const std::vector<Access>& accesses) {
  unsigned piece = 16;
  for (const Access& a : accesses)
    while ((a.address | a.bytes) % piece != 0) piece /= 2;
  return piece;
}

void finish_block() {
  for (const auto& [instruction, accesses] : instructions) {
    const unsigned piece = piece_of(accesses), lanes = std::min(32u, 128 / piece);
    int& worst = ways[std::get<0>(instruction)];
    for (unsigned begin = 0; begin < unsigned(accesses[0].bytes); begin += piece) {
      std::map<unsigned, std::vector<Access>> groups;
      for (const Access& a : accesses) groups[a.lane / lanes].push_back({a.lane, a.address + begin, int(piece)});
      for (const auto& [_, group] : groups) worst = std::max(worst, served(group));
    }
  }
  instructions.clear();
  times.clear();
}

void access(const void* p, int bytes, void* caller) {
  const auto* thread = cuda_on_host::current;
  if (thread == nullptr || !cuda_on_host::is_shared(p)) return;
  if (cuda_on_host::blocks_run() != block_of_these) finish_block();
  block_of_these = cuda_on_host::blocks_run();
  const Place place = reinterpret_cast<uintptr_t>(caller);
  const int time = times[{place, thread->thread.x}]++;
  const Access a = {thread->thread.x % 32, reinterpret_cast<uintptr_t>(p), bytes};
  instructions[{place, thread->thread.x / 32, time}].push_back(a);
}

}  // namespace

namespace cuda_on_host {

void report_bank_conflicts() {
  finish_block();
  for (const auto& [place, worst] : ways)
    if (worst > 1) std::printf("%#lx %d-way bank conflict\n", static_cast<unsigned long>(place - 1), worst);
  std::printf("%zu places access shared memory\n", ways.size());
}

}  // namespace cuda_on_host

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
#define ACCESS(kind, bytes) \
  void __tsan_##kind##bytes(void* p) { access(p, bytes, __builtin_return_address(0)); }
#define ACCESSES(kind) ACCESS(kind, 1) ACCESS(kind, 2) ACCESS(kind, 4) ACCESS(kind, 8) ACCESS(kind, 16)
ACCESSES(read)
ACCESSES(write)
ACCESSES(unaligned_read)
ACCESSES(unaligned_write)
void __tsan_read_range(void* p, unsigned long n) { access(p, int(n), __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long n) { access(p, int(n), __builtin_return_address(0)); }
}

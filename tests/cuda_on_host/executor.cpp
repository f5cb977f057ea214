// The executor. Never compiled with -fsanitize=thread: only kernels are instrumented, and what this file does to their
// memory goes through copy() and fill(), since the sanitizer intercepts memcpy and memset everywhere.
#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#ifdef TSE_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define IF_TSAN(...) __VA_ARGS__
#else
#define IF_TSAN(...)
#endif

#ifdef TSE_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#define IF_ASAN(...) __VA_ARGS__
#else
#define IF_ASAN(...)
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_on_host {

thread_local ThreadIndex* current = nullptr;
thread_local Options options = [] {
  const char* order = std::getenv("TSE_CUDA_ORDER");
  Options o;
  o.descending = order != nullptr && std::strcmp(order, "descending") == 0;
  if (const char* block = std::getenv("TSE_CUDA_ONLY_BLOCK")) o.first_block = o.last_block = std::atoll(block);
  if (const char* count = std::getenv("TSE_CUDA_MULTIPROCESSORS")) o.multiprocessors = std::atoi(count);
  if (const char* bytes = std::getenv("TSE_CUDA_SHARED_BYTES")) o.shared_bytes = std::atoll(bytes);
  return o;
}();

namespace {

constexpr size_t kStackBytes = 128 * 1024, kPage = 4096, kRedZone = 64;
constexpr size_t kStaticBytes = 96 * 1024;  // 48 KiB, which is the hardware's limit, with room for the red zones

void copy(void* to, const void* from, size_t n) {
  for (size_t i = 0; i < n; ++i) static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i];
}
void fill(void* to, size_t n) {
  for (size_t i = 0; i < n; ++i) static_cast<volatile char*>(to)[i] = char(0xff);  // NaN in every floating type
}

std::string text(Location l) { return std::string(l.file) + ":" + std::to_string(l.line); }

// ---- fibres -------------------------------------------------------------------------------------------------------

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Fibre {
  ThreadIndex index{};
  State state = State::kReady;
  Location here{};         // of the barrier or warp operation it waits in
  unsigned mask = 0;       // of that warp operation
  int source = -1;         // lane whose value it wants, -1 for none
  size_t bytes = 0;
  unsigned warp_generation = 0;
  bool fenced = false;     // has gone through a fence since its last atomic operation
  void* atomic = nullptr;  // operand of that
  alignas(8) char value[8], result[8];
  char* stack = nullptr;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* tsan = nullptr;
  void* asan_fake_stack = nullptr;
};

struct SharedArray {
  const void* place;
  char* data;
};

struct Engine {
  std::vector<std::unique_ptr<Fibre>> pool;
  std::vector<Fibre*> block, ready;  // threads of the running block; those that can go on, next one last
  const std::function<void()>* body = nullptr;
  Fibre main;
  Fibre* running = nullptr;
  std::string error;
  int arrived = 0, alive = 0;
  unsigned generation = 0;
  std::vector<SharedArray> shared;
  char* static_memory = nullptr;
  size_t static_used = 0, shared_bytes = 0;
  char* dynamic_memory = nullptr;
  size_t dynamic_bytes = 0;
  long long blocks_run = 0;
  // What ThreadSanitizer takes for the barriers; each block has its own, or it would order blocks.
  struct Words {
    char barrier[2], warp[2][1024];
  };
  Words* words = nullptr;
  char launch_word, end_word;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
};
thread_local std::unique_ptr<Engine> engine;
thread_local int64_t launches = 0;

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, exchanges stacks, restores.
extern "C" void cuda_on_host_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch,@function
cuda_on_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cuda_on_host_switch,.-cuda_on_host_switch
)");
#endif

void entry();

void prepare(Fibre* f) {
#if defined(__x86_64__)
  // Stack tops are staggered: equal offsets in every stack would share cache sets.
  uintptr_t top = reinterpret_cast<uintptr_t>(f->stack) + kStackBytes - f->index.thread.x % 61 * 64;
  void** stack = reinterpret_cast<void**>(top & ~uintptr_t(15));
  *--stack = nullptr;
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  f->stack_pointer = stack;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = kStackBytes;
  f->context.uc_link = nullptr;
  makecontext(&f->context, entry, 0);
#endif
}

void switch_to(Fibre* to) {
  Engine& e = *engine;
  Fibre* from = e.running != nullptr ? e.running : &e.main;
  e.running = to == &e.main ? nullptr : to;
  current = &to->index;
  IF_TSAN(__tsan_switch_to_fiber(to->tsan, /*no synchronisation*/ 1);)
  IF_ASAN(const bool to_main = to == &e.main; __sanitizer_start_switch_fiber(
              from->state == State::kDone ? nullptr : &from->asan_fake_stack, to_main ? e.main_stack : to->stack,
              to_main ? e.main_stack_bytes : kStackBytes);)
#if defined(__x86_64__)
  cuda_on_host_switch(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
  IF_ASAN(__sanitizer_finish_switch_fiber(from->asan_fake_stack, nullptr, nullptr);)
}

std::string name(const Fibre* f) {
  return "block " + std::to_string(f->index.block.x) + " thread " + std::to_string(f->index.thread.x);
}

void report_deadlock() {
  Engine& e = *engine;
  e.error = "deadlock: no thread can go on;";
  int shown = 0;
  for (Fibre* f : e.block) {
    if (f->state == State::kDone || ++shown > 4) continue;
    e.error += " [" + name(f) + (f->state == State::kInWarp ? " in a warp operation at " : " at the barrier ") +
               text(f->here) + "]";
  }
}

// Leaves the running fibre for the next that can go on, or for launch().
void yield() {
  Engine& e = *engine;
  if (e.error.empty() && e.ready.empty() && e.alive > 0) report_deadlock();
  if (!e.error.empty() || e.ready.empty()) return switch_to(&e.main);
  Fibre* next = e.ready.back();
  e.ready.pop_back();
  if (next != e.running) switch_to(next);
}

template <class Set>
void make_ready(const Set& fibres) {
  Engine& e = *engine;
  const size_t n = fibres.size();
  for (size_t i = 0; i < n; ++i) {
    Fibre* f = fibres[options.descending ? i : n - 1 - i];
    if (f == nullptr || f->state == State::kDone) continue;
    f->state = State::kReady;
    e.ready.push_back(f);
  }
}

// Opens the barrier if every living thread has come.
void check_barrier() {
  Engine& e = *engine;
  if (e.arrived == 0 || e.arrived < e.alive) return;
  const Fibre* first = nullptr;
  for (const Fibre* f : e.block) {
    if (f->state != State::kAtBarrier) continue;
    if (first == nullptr) first = f;
    if (f->here.line != first->here.line || std::strcmp(f->here.file, first->here.file) != 0) {
      e.error =
          "divergent barrier: " + name(first) + " at " + text(first->here) + ", " + name(f) + " at " + text(f->here);
      return;
    }
  }
  if (e.alive < int(e.block.size())) {
    e.error = "divergent barrier: " + std::to_string(e.block.size() - e.alive) + " threads returned before " +
              text(first->here);
    return;
  }
  e.arrived = 0;
  ++e.generation;
  make_ready(e.block);
}

void entry() {
  Engine& e = *engine;
  IF_ASAN(const void* old = nullptr; size_t bytes = 0; __sanitizer_finish_switch_fiber(nullptr, &old, &bytes);
          if (e.main_stack == nullptr) {
            e.main_stack = old;
            e.main_stack_bytes = bytes;
          })
  Fibre* f = e.running;
  IF_TSAN(__tsan_acquire(&e.launch_word);)
  (*e.body)();
  IF_TSAN(__tsan_release(&e.end_word);)
  f->state = State::kDone;
  --e.alive;
  check_barrier();
  // A thread that is waited for in a warp operation and has returned shows as a deadlock.
  yield();
  std::abort();
}

Fibre* fibre(size_t i) {
  Engine& e = *engine;
  while (e.pool.size() <= i) {
    auto f = std::make_unique<Fibre>();
    void* memory =
        mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);  // an overflow must not reach the neighbour
    f->stack = static_cast<char*>(memory) + kPage;
    IF_TSAN(f->tsan = __tsan_create_fiber(0);)
    e.pool.push_back(std::move(f));
  }
  return e.pool[i].get();
}

}  // namespace

// ---- for kernels --------------------------------------------------------------------------------------------------

void fail(const std::string& what) {
  engine->error = name(engine->running) + ": " + what;
  switch_to(&engine->main);
  std::abort();
}

void block_barrier(Location here) {
  Engine& e = *engine;
  Fibre* f = e.running;
  f->state = State::kAtBarrier;
  f->here = here;
  IF_TSAN(void* word = &e.words->barrier[e.generation % 2]; __tsan_release(word);)
  ++e.arrived;
  check_barrier();
  yield();
  IF_TSAN(__tsan_acquire(word);)
}

// Lanes meet by mask; the last one to come takes the values around. A shuffle orders no memory: ThreadSanitizer is not
// told.
void warp_exchange(Location here, unsigned mask, const void* value, size_t bytes, int source, void* result) {
  Engine& e = *engine;
  Fibre* f = e.running;
  const unsigned lane = f->index.thread.x % 32, first = f->index.thread.x - lane;
  const unsigned lanes = std::min<size_t>(32, e.block.size() - first);
  if ((mask >> lane & 1) == 0) fail("its lane is not in the mask of the warp operation at " + text(here));
  if (lanes < 32 && mask >> lanes != 0) fail("the mask names lanes that do not exist, at " + text(here));
  if (source >= 0 && (mask >> source & 1) == 0)
    fail("shuffle from lane " + std::to_string(source) + ", which is not in the mask, at " + text(here));
  f->state = State::kInWarp;
  f->here = here;
  f->mask = mask;
  f->source = source;
  f->bytes = bytes;
  copy(f->value, value, bytes);
  std::array<Fibre*, 32> group = {};
  bool complete = true;
  for (unsigned i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Fibre* g = e.block[first + i];
    if (g->state == State::kDone) fail("the warp operation at " + text(here) + " waits for a lane that has returned");
    if (g->state != State::kInWarp || g->mask != mask) complete = false;
    else if (g->here.line != here.line || std::strcmp(g->here.file, here.file) != 0)
      fail("lanes of one warp operation stand at " + text(here) + " and " + text(g->here));
    group[i] = g;
  }
  if (complete) {
    for (Fibre* g : group) {
      if (g == nullptr || g->source < 0) continue;
      if (group[g->source]->bytes != g->bytes) fail("a shuffle's operands differ in size at " + text(here));
      copy(g->result, group[g->source]->value, g->bytes);
    }
    make_ready(group);
  }
  yield();
  copy(result, f->result, bytes);
}

void warp_barrier(Location here, unsigned mask) {
  Fibre* f = engine->running;
  IF_TSAN(const unsigned group = f->index.thread.x / 32 * 32 + __builtin_ctz(mask);
          void* word = &engine->words->warp[f->warp_generation++ % 2][group]; __tsan_release(word);)
  warp_exchange(here, mask, nullptr, 0, /*source=*/-1, nullptr);
  IF_TSAN(__tsan_acquire(word);)
}

// What a thread wrote before a fence is seen by whoever, behind the atomic operation that followed it, finds that
// operation's value and then goes through a fence, too.
void fence() {
  Fibre* f = engine->running;
  f->fenced = true;
  IF_TSAN(if (f->atomic != nullptr) __tsan_acquire(f->atomic);)
}

unsigned atomic_increment(unsigned* p, unsigned last) {
  Fibre* f = engine->running;
  IF_TSAN(if (f->fenced) __tsan_release(p);)
  f->fenced = false;
  f->atomic = p;
  const unsigned value = *p;
  *p = value >= last ? 0 : value + 1;
  return value;
}

void* shared_array(const void* place, size_t bytes) {
  Engine& e = *engine;
  for (const SharedArray& s : e.shared)
    if (s.place == place) return s.data;
  char* data = e.static_memory + e.static_used;
  e.static_used += (bytes + kRedZone + 63) / 64 * 64;
  e.shared_bytes += bytes;
  if (e.shared_bytes > size_t(options.shared_bytes))
    fail("static and dynamic shared memory take " + std::to_string(e.shared_bytes) + " bytes, of " +
         std::to_string(options.shared_bytes));
  if (e.static_used > kStaticBytes || e.shared.size() == e.shared.capacity()) fail("too much static shared memory");
  IF_ASAN(__asan_unpoison_memory_region(data, bytes);)
  fill(data, bytes);
  e.shared.push_back({place, data});
  return data;
}

void* dynamic_shared() { return engine->dynamic_memory; }

bool is_shared(const void* p) {
  const Engine& e = *engine;
  const auto within = [p](const char* begin, size_t bytes) { return p >= begin && p < begin + bytes; };
  return within(e.static_memory, e.static_used) || within(e.dynamic_memory, e.dynamic_bytes);
}
long long blocks_run() { return engine->blocks_run; }
extern "C" int64_t cuda_on_host_launches() { return launches; }

// ---- launch -------------------------------------------------------------------------------------------------------

void launch(const char* kernel, int64_t blocks, int threads, size_t dynamic_bytes, const std::function<void()>& body) {
  const std::string prefix = std::string("cuda_on_host: ") + kernel + ": ";
  if (blocks < 1 || blocks > 2147483647 || threads < 1 || threads > 1024 ||
      dynamic_bytes > size_t(options.shared_bytes))
    throw std::runtime_error(prefix + "invalid launch: " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads, " + std::to_string(dynamic_bytes) + " shared bytes");
  ++launches;
  if (!engine) engine = std::make_unique<Engine>();
  Engine& e = *engine;
  e.body = &body;
  e.error.clear();
  e.running = nullptr;
  e.main_stack = nullptr;
  IF_TSAN(e.main.tsan = __tsan_get_current_fiber();)
  std::vector<void*> garbage;  // freed after the launch: a reused address would look like a race between blocks
  const int64_t first = options.last_block < 0 ? 0 : options.first_block;
  const int64_t last = options.last_block < 0 ? blocks - 1 : options.last_block;
  size_t set = 0;
  for (int64_t i = first; i <= last && e.error.empty(); ++i) {
    const int64_t block = options.descending ? last - (i - first) : i;
    e.block.clear();
    e.ready.clear();
    e.ready.reserve(threads);
    e.shared.clear();
    e.shared.reserve(64);
    e.static_used = 0;
    e.shared_bytes = e.dynamic_bytes = dynamic_bytes;
    ++e.blocks_run;
    e.arrived = 0;
    e.alive = threads;
    void *static_memory = nullptr, *dynamic_memory = nullptr, *words = nullptr;
    if (posix_memalign(&static_memory, 128, kStaticBytes) != 0 || posix_memalign(&words, 128, sizeof(Engine::Words)) ||
        posix_memalign(&dynamic_memory, 128, dynamic_bytes + (dynamic_bytes == 0)) != 0)
      throw std::bad_alloc();
    garbage.insert(garbage.end(), {static_memory, dynamic_memory, words});
    e.words = static_cast<Engine::Words*>(words);
    e.static_memory = static_cast<char*>(static_memory);
    e.dynamic_memory = static_cast<char*>(dynamic_memory);
    fill(e.dynamic_memory, dynamic_bytes);
    IF_ASAN(__asan_poison_memory_region(static_memory, kStaticBytes);)
    // Neighbouring blocks never share fibres: ThreadSanitizer would take them for ordered.
    IF_TSAN(set ^= 1;)
    for (int t = 0; t < threads; ++t) {
      Fibre* f = fibre(set * 1024 + t);
      f->fenced = false;
      f->atomic = nullptr;
      f->index.thread = {unsigned(t), 0, 0};
      f->index.block = {unsigned(block), 0, 0};
      f->index.block_dim = dim3(threads);
      f->index.grid_dim = dim3(unsigned(blocks));
      IF_ASAN(__asan_unpoison_memory_region(f->stack, kStackBytes);)
      prepare(f);
      e.block.push_back(f);
      f->state = State::kReady;
    }
    IF_TSAN(__tsan_release(&e.launch_word);)
    make_ready(e.block);
    yield();
    IF_ASAN(__asan_unpoison_memory_region(static_memory, kStaticBytes);)
    IF_TSAN(continue;)
    for (void* p : garbage) std::free(p);
    garbage.clear();
  }
  IF_TSAN(__tsan_acquire(&e.end_word);)  // only now: blocks of one launch are not ordered among themselves
  for (void* p : garbage) std::free(p);
  current = nullptr;
  if (!e.error.empty()) throw std::runtime_error(prefix + e.error);
}

}  // namespace cuda_on_host

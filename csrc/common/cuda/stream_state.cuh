// What outlives a launch: a little memory on the device for each stream, and the last block of a grid. [CUDA]
#pragma once
#include <map>
#include <mutex>
#include <utility>

#include "common/cuda/launch.h"

namespace tse {

// States of TSE_DEVICE_ARRAY, zero in the beginning, one for each order of launches: a stream, or a capture, whose
// graph may run beside the stream it was captured from. Not from torch's allocator: a capture could not initialise it,
// and replays would do so again and again.
template <class State, int kCount>
class StreamStates {
 public:
  explicit StreamStates(State* (*of_device)()) : of_device_(of_device) {}

  // nullptr where all of them are taken. Captures, whose numbers never come again, take no more than half.
  State* of(cudaStream_t stream) {
    const LaunchOrder order = launch_order(stream);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = states_.find(order);
    if (found != states_.end()) return found->second;
    const bool captured = order.capture != 0;
    int& used = used_[{order.device, captured}];
    State* const state = used < kCount / 2 ? of_device_() + captured * (kCount / 2) + used++ : nullptr;
    states_.emplace(order, state);
    return state;
  }

 private:
  State* (*of_device_)();
  std::mutex mutex_;
  std::map<LaunchOrder, State*> states_;
  std::map<std::pair<int, bool>, int> used_;  // of a device, by captures and by streams
};

// Whether this is the last block of the grid that comes here; it sees what the first threads of the others wrote.
// `ticket` is zero before the launch, and afterwards.
__device__ inline bool is_last_block(unsigned* ticket) {
  TSE_SHARED(int, is_last, 1);
  if (threadIdx.x == 0) {
    __threadfence();
    is_last[0] = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last[0] != 0;
}

}  // namespace tse

// SPDX-License-Identifier: Apache-2.0
#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dmole::cpu {

namespace {

constexpr int64_t kAlignment = 64;
std::atomic<bool> poisoned{false};

struct Buffer {
  float* memory = nullptr;
  int64_t capacity = 0;
  ~Buffer() { std::free(memory); }
};

// A buffer may be larger than this call requested; tells the sanitizer which bytes the call may access.
void show_bounds([[maybe_unused]] const Buffer& buffer, [[maybe_unused]] int64_t floats) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(buffer.memory, static_cast<size_t>(floats) * sizeof(float));
  __asan_poison_memory_region(buffer.memory + floats, static_cast<size_t>(buffer.capacity - floats) * sizeof(float));
#endif
}

}  // namespace

float* scratch(Scratch use, int64_t floats) {
  thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& buffer = buffers[static_cast<int>(use)];
  if (buffer.capacity < floats || buffer.memory == nullptr) {
    std::free(buffer.memory);
    buffer.memory = nullptr;
    const int64_t line = kAlignment / static_cast<int64_t>(sizeof(float));
    buffer.capacity = (std::max<int64_t>(floats, 1) + line - 1) / line * line;
    const auto bytes = static_cast<size_t>(buffer.capacity) * sizeof(float);
    buffer.memory = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
    if (buffer.memory == nullptr) {
      buffer.capacity = 0;
      throw std::bad_alloc();
    }
  }
  show_bounds(buffer, floats);
  if (poisoned.load(std::memory_order_relaxed)) std::fill_n(buffer.memory, floats, std::nanf(""));
  return buffer.memory;
}

void poison_scratch(bool on) { poisoned.store(on, std::memory_order_relaxed); }

}  // namespace dmole::cpu

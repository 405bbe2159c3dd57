// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMostThreads = 1024;
constexpr int kLanes = 32;

enum class State { kReady, kAtBarrier, kInWarp, kDone };
enum class Order { kForward, kReverse, kShuffled };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf place;  // setjmp instead of swapcontext, which asks the kernel for the signal mask at each switch
  bool begun = false;
  State state = State::kReady;
  unsigned thread = 0;
  int line = 0;       // where it waits
  unsigned mask = 0;  // of the lanes it waits for
  int exchanges = 0;  // how many it has made in this block
};

struct Warp {
  // What lanes bring to their exchanges: a value is only overwritten two exchanges later, when all have read it.
  std::array<std::array<uint64_t, kLanes>, 2> values;
  unsigned ready = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
unsigned threads = 0;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
std::string problem;
Order order = Order::kForward;
std::mt19937 shuffler;
int64_t launches = 0;

void wake(Fiber& fiber) {
  if (fiber.state == State::kReady) return;
  fiber.state = State::kReady;
  ++warps[fiber.thread / kLanes].ready;
}

void give_way(State state, int line) {
  current->state = state;
  --warps[current->thread / kLanes].ready;
  current->line = line;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    give_way(State::kDone, 0);
  }
}

void run(Fiber& fiber) {
  current = &fiber;
  threadIdx = dim3(fiber.thread, 0, 0);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, &fiber_main, 0);
  setcontext(&fiber.start);
}

void fail(const std::string& text) {
  if (problem.empty()) {
    problem = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "): " + text;
  }
}

std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> places(count);
  std::iota(places.begin(), places.end(), 0u);
  if (order == Order::kReverse) std::reverse(places.begin(), places.end());
  if (order == Order::kShuffled) std::shuffle(places.begin(), places.end(), shuffler);
  return places;
}

// The first warp in the order that can go on, as far as it can before any other: the furthest from lock step.
Warp* next_warp() {
  const size_t count = warps.size(), first = order == Order::kShuffled ? shuffler() % count : 0;
  for (size_t i = 0; i < count; ++i) {
    const size_t place = (first + i) % count;
    Warp& warp = warps[order == Order::kReverse ? count - 1 - place : place];
    if (warp.ready > 0) return &warp;
  }
  return nullptr;
}

// Runs the block to its end; false when its threads wait for what never comes, or when one has failed.
bool run_block() {
  warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t]->thread = t;
    fibers[t]->exchanges = 0;
    fibers[t]->state = State::kDone;
    wake(*fibers[t]);
  }
  const std::vector<unsigned> lanes = in_order(kLanes);
  while (Warp* warp = next_warp()) {
    const unsigned begin = static_cast<unsigned>(warp - warps.data()) * kLanes;
    for (const unsigned lane : lanes) {
      if (begin + lane < threads && fibers[begin + lane]->state == State::kReady) run(*fibers[begin + lane]);
      if (!problem.empty()) return false;
    }
  }
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = *fibers[t];
    if (fiber.state == State::kDone) continue;
    fail("thread " + std::to_string(t) + " waits for ever in line " + std::to_string(fiber.line) +
         (fiber.state == State::kAtBarrier ? " at a barrier that not all threads reach"
                                           : " for lanes of its mask that do not come"));
    return false;
  }
  return true;
}

}  // namespace

namespace emulator {

cudaError_t launch(const dim3& grid, const dim3& block, const std::function<void()>& thread) {
  const bool fits = block.x >= 1 && block.x <= kMostThreads && block.y == 1 && block.z == 1 && grid.x >= 1 &&
                    grid.x < (1u << 31) && grid.y >= 1 && grid.y < (1u << 16) && grid.z == 1;
  if (!fits) return cudaErrorInvalidConfiguration;
  ++launches;
  threads = block.x;
  body = &thread;
  problem.clear();
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  for (const unsigned place : in_order(grid.x * grid.y)) {
    blockIdx = dim3(place % grid.x, place / grid.x, 0);
    if (!run_block()) {
      fibers.clear();  // where they stand, nobody goes on
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

int lane() { return static_cast<int>(current->thread % kLanes); }

void wait_for_block(int line) {
  unsigned waiting = 1;
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].get() != current && fibers[t]->state == State::kAtBarrier) ++waiting;
  }
  if (waiting < threads) return give_way(State::kAtBarrier, line);
  for (unsigned t = 0; t < threads; ++t) wake(*fibers[t]);
}

const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
  const unsigned warp = current->thread / kLanes, mine = current->thread % kLanes;
  std::array<uint64_t, kLanes>& values = warps[warp].values[current->exchanges % 2];
  if ((mask >> mine & 1u) == 0u) {
    fail("thread " + std::to_string(current->thread) + " is not in its own mask in line " + std::to_string(line));
    give_way(State::kInWarp, line);
  }
  values[mine] = value;
  current->mask = mask;
  const int number = current->exchanges++;
  bool all = true;
  for (unsigned other = 0; other < kLanes; ++other) {
    const unsigned t = warp * kLanes + other;
    if ((mask >> other & 1u) == 0u || other == mine) continue;
    const bool there = t < threads && fibers[t]->state == State::kInWarp && fibers[t]->exchanges == number + 1;
    all = all && there;
    if (there && (fibers[t]->mask != mask || fibers[t]->line != line)) {
      fail("threads " + std::to_string(t) + " and " + std::to_string(current->thread) + " meet in lines " +
           std::to_string(fibers[t]->line) + " and " + std::to_string(line) + " or with different masks");
    }
  }
  if (!all || !problem.empty()) {
    give_way(State::kInWarp, line);
  } else {
    for (unsigned other = 0; other < kLanes; ++other) {
      if ((mask >> other & 1u) != 0u) wake(*fibers[warp * kLanes + other]);
    }
  }
  return values.data();
}

uint64_t value_of(const uint64_t* values, unsigned mask, int lane, int line) {
  if (lane < 0 || lane >= kLanes || (mask >> lane & 1u) == 0u) {
    fail("line " + std::to_string(line) + " asks for lane " + std::to_string(lane) + ", which its mask leaves out");
    give_way(State::kInWarp, line);
  }
  return values[lane];
}

}  // namespace emulator

// Order in which blocks, and threads between their waits, run: 0 forward, 1 reverse, 2 shuffled by the seed.
extern "C" void emulator_set_order(int kind, unsigned seed) {
  order = static_cast<Order>(kind);
  shuffler.seed(seed);
}

// What went wrong in the last launch; empty when nothing did.
extern "C" const char* emulator_problem() { return problem.c_str(); }

extern "C" int64_t emulator_launches() { return launches; }

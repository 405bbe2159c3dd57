// SPDX-License-Identifier: Apache-2.0
// Threads without torch's headers: the glue hands at::parallel_for in, a test may hand in a plain loop.
#pragma once

#include <cstdint>
#include <functional>

namespace dmole::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items where there are that
// many. How the ranges are cut must not change any result: every output element has one writer and one order of sums.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

}  // namespace dmole::cpu

// SPDX-License-Identifier: Apache-2.0
// Threads without torch's headers: the ops pass at::parallel_for, a test may pass a plain loop.
#pragma once

#include <cstdint>
#include <functional>

namespace dmole::cpu {

// Calls body(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items where there are that
// many. The ranges must not change any result: every output element has one writer and one order of sums.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

}  // namespace dmole::cpu

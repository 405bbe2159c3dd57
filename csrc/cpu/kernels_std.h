// SPDX-License-Identifier: Apache-2.0
// Everything a level's file needs from outside, included BEFORE it switches the target: what is compiled for a level
// must live in the level's namespace, or the linker could hand an AVX-512 copy of std::max to a machine without it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "kernels.h"
#include "linear.h"
#include "multi_lora.h"
#include "parallel.h"
#include "scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

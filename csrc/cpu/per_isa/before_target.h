// SPDX-License-Identifier: Apache-2.0
// Everything that kernels need from outside, included BEFORE a file switches the target: what is compiled for an
// instruction set must live in its namespace, or the linker could hand an AVX-512 copy of std::max to a machine without
// it. A header that a kernel includes and this file does not is found by tests/kernels/test_csrc_headers.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../bfloat16.h"
#include "../brgemm.h"
#include "../frozen_linear.h"
#include "../kernels.h"
#include "../multi_lora.h"
#include "../row_map.h"
#include "../scratch.h"
#include "../tile_math.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

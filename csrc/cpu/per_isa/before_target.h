// SPDX-License-Identifier: Apache-2.0
// All outside headers of the kernels, included BEFORE a file switches the target: code compiled for an instruction set
// must be in its namespace, or the linker could use an AVX-512 copy of std::max on a machine without it.
// tests/kernels/test_csrc_headers.py finds headers that a kernel includes and this file does not.
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

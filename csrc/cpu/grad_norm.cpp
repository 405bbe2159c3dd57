// SPDX-License-Identifier: Apache-2.0
#include "grad_norm.h"

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "scratch.h"

namespace dmole::cpu {

namespace {

// A tile of G^T X fills half of a second-level cache of 1 MiB and is wide, since gemm packs g's columns once per tile.
constexpr int64_t kDirectRows = 192, kDirectColumns = 512;
// Small, so that little below the diagonal is computed, but not smaller, since gemm packs the columns once for all
// rows. Tiles of a sample have nearly equal heights, multiples of the register tile of every instruction set.
constexpr int64_t kGhostRows = 96, kGhostColumns = 384, kRegisterRows = 12;
// The cost of an element of both Gram matrices in addition to its products, in products: from timings near the
// crossover (one thread of an AVX-512 EPYC, 2026-11).
constexpr int64_t kGramPass = 48;
constexpr int64_t kSketchRows = 192, kSketchColumns = 24;
// The minimum work of a thread, in multiplications: about 10 us.
constexpr int64_t kWorthAThread = int64_t{1} << 20;

int64_t grain_of(int64_t products_per_item) {
  return std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, products_per_item));
}

template <class T>
bool all_zero(const T* row, int64_t columns) {
  constexpr int64_t kBlock = 64;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = std::min(columns, begin + kBlock);
    bool any = false;
    for (int64_t c = begin; c < end; ++c) any |= to_float(row[c]) != 0.0f;
    if (any) return false;
  }
  return true;
}

// One sample without its padding, and how it is done.
struct Segment {
  int64_t first;
  int64_t tokens;
  NormMethod method;
};

template <class T>
Segment segment_of(NormMethod method, int64_t tokens, const Rows<T>& x, const Rows<T>& grad, int64_t sample) {
  const T* const rows = grad.data + sample * grad.sample;
  int64_t first = 0;
  while (first < tokens && all_zero(rows + first * grad.row, grad.columns)) ++first;
  while (tokens > first && all_zero(rows + (tokens - 1) * grad.row, grad.columns)) --tokens;
  tokens -= first;
  const bool choose = method == NormMethod::automatic;
  return {first, tokens, choose ? cheaper_method(tokens, x.columns, grad.columns) : method};
}

int64_t ghost_rows(int64_t tokens) {
  const int64_t tiles = std::max<int64_t>(1, (tokens + kGhostRows - 1) / kGhostRows);
  const int64_t rows = (tokens + tiles - 1) / tiles;
  return std::max(kRegisterRows, (rows + kRegisterRows - 1) / kRegisterRows * kRegisterRows);
}

// Products (and passes) of the tiles on and above the diagonal.
int64_t ghost_cost(int64_t tokens, int64_t in_features, int64_t out_features) {
  int64_t area = 0;
  const int64_t height = ghost_rows(tokens);
  for (int64_t row = 0; row < tokens; row += height) area += std::min(height, tokens - row) * (tokens - row);
  return area * (in_features + out_features + kGramPass);
}

struct Tile {
  int64_t sample;
  int64_t row;
  int64_t column;
};

template <class T>
double direct_tile(const Segment& segment, const Tile& tile, const Rows<T>& x, const Rows<T>& grad) {
  const int64_t rows = std::min(kDirectRows, grad.columns - tile.row);
  const int64_t columns = std::min(kDirectColumns, x.columns - tile.column);
  float* const product = scratch(Scratch::direct, kDirectRows * kDirectColumns);
  const T* const g = grad.data + tile.sample * grad.sample + segment.first * grad.row + tile.row;
  const T* const from = x.data + tile.sample * x.sample + segment.first * x.row + tile.column;
  gemm(rows, columns, segment.tokens, g, 1, grad.row, from, x.row, 1, product, kDirectColumns, false);
  return kernels().tile_math.sum_of_squares(product, rows, columns, kDirectColumns);
}

template <class T>
void gram_tile(const Segment& segment, const Tile& tile, const Rows<T>& matrix, int64_t rows, int64_t columns,
               float* gram) {
  const T* const origin = matrix.data + tile.sample * matrix.sample + segment.first * matrix.row;
  gemm(rows, columns, matrix.columns, origin + tile.row * matrix.row, matrix.row, 1, origin + tile.column * matrix.row,
       1, matrix.row, gram, kGhostColumns, false);
}

template <class T>
double ghost_tile(const Segment& segment, const Tile& tile, const Rows<T>& x, const Rows<T>& grad) {
  const int64_t rows = std::min(ghost_rows(segment.tokens), segment.tokens - tile.row);
  const int64_t columns = std::min(kGhostColumns, segment.tokens - tile.column);
  float* const gram_x = scratch(Scratch::ghost, 2 * kGhostRows * kGhostColumns);
  float* const gram_g = gram_x + kGhostRows * kGhostColumns;
  gram_tile(segment, tile, x, rows, columns, gram_x);
  gram_tile(segment, tile, grad, rows, columns, gram_g);
  // The first tile of a row begins with a square on the diagonal, which counts once; the rest counts twice.
  const int64_t square = tile.column == tile.row ? rows : 0;
  const auto sum = kernels().tile_math.sum_of_products;
  const double once = sum(gram_x, gram_g, rows, square, kGhostColumns);
  return once + 2.0 * sum(gram_x + square, gram_g + square, rows, columns - square, kGhostColumns);
}

}  // namespace

NormMethod cheaper_method(int64_t tokens, int64_t in_features, int64_t out_features) {
  const int64_t ghost = ghost_cost(tokens, in_features, out_features);
  return ghost < tokens * in_features * out_features ? NormMethod::ghost : NormMethod::direct;
}

template <class T>
void squared_norms(const ParallelFor& parallel_for, NormMethod method, int64_t samples, int64_t tokens,
                   const Rows<T>& x, const Rows<T>& grad, float* squares) {
  std::vector<Segment> segments;
  std::vector<Tile> tiles;
  std::vector<size_t> ends;
  int64_t products = 0;
  for (int64_t b = 0; b < samples; ++b) {
    const Segment segment = segment_of(method, tokens, x, grad, b);
    segments.push_back(segment);
    if (segment.tokens > 0 && segment.method == NormMethod::direct) {
      products += segment.tokens * x.columns * grad.columns;
      for (int64_t row = 0; row < grad.columns; row += kDirectRows) {
        for (int64_t column = 0; column < x.columns; column += kDirectColumns) tiles.push_back({b, row, column});
      }
    } else {
      products += ghost_cost(segment.tokens, x.columns, grad.columns);
      for (int64_t row = 0; row < segment.tokens; row += ghost_rows(segment.tokens)) {
        for (int64_t column = row; column < segment.tokens; column += kGhostColumns) tiles.push_back({b, row, column});
      }
    }
    ends.push_back(tiles.size());
  }
  std::vector<double> parts(tiles.size());
  const auto count = static_cast<int64_t>(tiles.size());
  parallel_for(count, grain_of(products / std::max<int64_t>(1, count)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = tiles[static_cast<size_t>(i)];
      const Segment& segment = segments[static_cast<size_t>(tile.sample)];
      parts[static_cast<size_t>(i)] = segment.method == NormMethod::direct ? direct_tile(segment, tile, x, grad)
                                                                           : ghost_tile(segment, tile, x, grad);
    }
  });
  size_t part = 0;
  for (int64_t b = 0; b < samples; ++b) {
    double total = 0.0;
    for (; part < ends[static_cast<size_t>(b)]; ++part) total += parts[part];
    // Cancellation between rows can make a norm of zero negative, and its square root NaN.
    squares[b] = static_cast<float>(total < 0.0 ? 0.0 : total);
  }
}

template <class T>
void accumulate_gradient(const ParallelFor& parallel_for, int64_t rows, const Rows<T>& x, const Rows<T>& grad,
                         float* buffer) {
  // The result does not depend on the tiles: smaller ones where large ones would leave threads idle.
  const bool small = grad.columns * x.columns < 4 * kDirectRows * kDirectColumns;
  const int64_t tile_rows = small ? kDirectRows / 2 : kDirectRows;
  const int64_t tile_columns = small ? kDirectColumns / 2 : kDirectColumns;
  const int64_t across = (x.columns + tile_columns - 1) / tile_columns;
  const int64_t count = across * ((grad.columns + tile_rows - 1) / tile_rows);
  const int64_t products = rows * grad.columns * x.columns;
  parallel_for(count, grain_of(products / std::max<int64_t>(1, count)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * tile_rows, column = i % across * tile_columns;
      const int64_t some_rows = std::min(tile_rows, grad.columns - row);
      const int64_t some_columns = std::min(tile_columns, x.columns - column);
      gemm(some_rows, some_columns, rows, grad.data + row, 1, grad.row, x.data + column, x.row, 1,
           buffer + row * x.columns + column, x.columns, true);
    }
  });
}

template <class T>
void accumulate_sketch(const ParallelFor& parallel_for, int64_t rows, const Rows<T>& x, const Rows<T>& grad,
                       const float* left, int64_t k, const float* right, int64_t l, float* shrunk_grad, float* shrunk_x,
                       float* sketch) {
  const int64_t blocks = (rows + kSketchRows - 1) / kSketchRows;
  const int64_t products = kSketchRows * (grad.columns * k + x.columns * l) / 2;
  parallel_for(2 * blocks, grain_of(products), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / 2 * kSketchRows, count = std::min(kSketchRows, rows - row);
      if (i % 2 == 0) {
        gemm(count, k, grad.columns, grad.data + row * grad.row, grad.row, 1, left, k, 1, shrunk_grad + row * k, k,
             false);
      } else {
        gemm(count, l, x.columns, x.data + row * x.row, x.row, 1, right, l, 1, shrunk_x + row * l, l, false);
      }
    }
  });
  const int64_t parts = (k + kSketchColumns - 1) / kSketchColumns;
  parallel_for(parts, grain_of(kSketchColumns * l * rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * kSketchColumns;
      gemm(std::min(kSketchColumns, k - row), l, rows, shrunk_grad + row, 1, k, shrunk_x, l, 1, sketch + row * l, l,
           true);
    }
  });
}

#define DMOLE_GRAD_NORM(T)                                                                                         \
  template void squared_norms<T>(const ParallelFor&, NormMethod, int64_t, int64_t, const Rows<T>&, const Rows<T>&, \
                                 float*);                                                                          \
  template void accumulate_gradient<T>(const ParallelFor&, int64_t, const Rows<T>&, const Rows<T>&, float*);       \
  template void accumulate_sketch<T>(const ParallelFor&, int64_t, const Rows<T>&, const Rows<T>&, const float*,    \
                                     int64_t, const float*, int64_t, float*, float*, float*);
DMOLE_GRAD_NORM(float)
DMOLE_GRAD_NORM(bfloat16)
#undef DMOLE_GRAD_NORM

}  // namespace dmole::cpu

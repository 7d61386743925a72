// Products of large problems, whose factors do not fit in shared memory: tiles of each product, a launch or more for
// each phase. No torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "operand.h"

namespace kfo::cuda {

// A matrix for each (task, b): element (i, j) of it at offset + b * batch + i * row + j * col of the task's packed row.
struct TiledMatrix {
  Source source;
  int32_t row, col;
  int64_t offset, batch;
};

// A (rows, depth) times B (depth, cols).
struct TiledTerm {
  TiledMatrix A, B;
  int32_t depth;
};

// The shapes of tiles. Products with few rows or columns are bound by memory: their tiles are long.
enum class TileShape : int8_t { square, wide, tall };

// out = X + Y (+ bias) for each (task, b), or summed over b, and over the tasks too where the output has one row.
struct TiledProduct {
  TiledTerm X, Y;  // Y.depth 0: no second term
  Target target;
  TileShape shape;
  bool sum;
  int32_t rows, cols;
  int64_t offset, batch;  // of the output
  int64_t bias;           // offset of a (rows, cols) term in its packed row, or -1
  int64_t B;
  int64_t output_rows;  // of a sum
  int32_t first_block;
};

constexpr int kTiledProducts = 16;

struct TiledTable {
  TiledProduct products[kTiledProducts];
  int64_t tasks;
  int32_t count;
};

struct TileSize {
  int rows, cols, depth;
};
__host__ __device__ constexpr TileSize tile_size(TileShape shape) {
  switch (shape) {
    case TileShape::square:
      return {64, 64, 16};
    case TileShape::wide:
      return {8, 128, 16};
    default:
      return {128, 8, 16};
  }
}

// Elements of shared memory that the two slabs of a tile need, with an odd pitch; and those of any tile.
constexpr int slab_elements(TileShape shape) {
  return tile_size(shape).depth * (tile_size(shape).rows + 1 + tile_size(shape).cols + 1);
}
constexpr int kTiledShared =
    std::max({slab_elements(TileShape::square), slab_elements(TileShape::wide), slab_elements(TileShape::tall)});

}  // namespace kfo::cuda

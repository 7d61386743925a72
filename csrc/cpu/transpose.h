// Copies that transpose, to scratch memory and back.
#pragma once

#include "products.h"

namespace {

// One tile of at most kLanes<T> rows and columns. Loops over its vectors have constant bounds, which keeps them in
// registers.
template <class T, bool kComplete, class OutAt>
void gather_tile(const T* const* row, int rows, int64_t column, int columns, OutAt out_at) {
  constexpr int W = kLanes<T>;
  Vec<T> v[W] = {};
  if (rows == W && columns == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load(row[i] + column);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (i < rows) v[i] = load_first(row[i] + column, columns);
  }
  transpose<T>(v);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (i < columns) {
      if (kComplete)
        store(out_at(i), v[i]);
      else
        store_first(out_at(i), v[i], rows);
    }
}

template <class T>
void scatter_tile(const T* in, int64_t width, T* const* row, const T* const* bias, int rows, int64_t column,
                  int columns) {
  constexpr int W = kLanes<T>;
  Vec<T> v[W] = {};
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (i < columns) v[i] = load(in + i * width);
  transpose<T>(v);
  if (bias[0]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (i < rows) v[i] += load_first(bias[i] + column, columns);
  }
  if (rows == W && columns == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(row[i] + column, v[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (i < rows) store_first(row[i] + column, v[i], columns);
  }
}

// Tiles of all rows and columns; tile_at(r, c)(i) is where element (r, c + i) goes, and the following r beside it.
template <class T, bool kComplete, class RowAt, class TileAt>
void gather_tiles(int64_t rows, int64_t columns, RowAt row_at, TileAt tile_at) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    const int n = static_cast<int>(smaller(rows - r, W));
    const T* row[W];
    for (int i = 0; i < n; ++i) row[i] = row_at(r + i);
    for (int64_t c = 0; c < columns; c += W)
      gather_tile<T, kComplete>(row, n, c, static_cast<int>(smaller(columns - c, W)), tile_at(r, c));
  }
}

// out[c * width + r] = row_at(r)[c], with zeros for the r that complete the last vector.
template <class T, class RowAt>
void gather(int64_t rows, int64_t columns, RowAt row_at, T* out, int64_t width) {
  gather_tiles<T, true>(rows, columns, row_at, [=](int64_t r, int64_t c) {
    return [tile = out + c * width + r, width](int i) { return tile + i * width; };
  });
}

// out[places[c] + r] = row_at(r)[c], and nothing beside that.
template <class T, class RowAt>
void gather_to(int64_t rows, int64_t columns, RowAt row_at, T* out, const int64_t* places) {
  gather_tiles<T, false>(rows, columns, row_at, [=](int64_t r, int64_t c) {
    return [tile = out + r, places = places + c](int i) { return tile + places[i]; };
  });
}

// row_at(r)[c] = in[c * width + r] + bias_at(r)[c], without the bias where that is null.
template <class T, class RowAt, class BiasAt>
void scatter(int64_t rows, int64_t columns, const T* in, int64_t width, RowAt row_at, BiasAt bias_at) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    const int n = static_cast<int>(smaller(rows - r, W));
    T* row[W];
    const T* bias[W];
    for (int i = 0; i < n; ++i) row[i] = row_at(r + i), bias[i] = bias_at(r + i);
    for (int64_t c = 0; c < columns; c += W)
      scatter_tile(in + c * width + r, width, row, bias, n, c, static_cast<int>(smaller(columns - c, W)));
  }
}

}  // namespace

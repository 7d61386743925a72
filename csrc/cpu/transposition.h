// Matrices transposed on their way to working memory and back.
#pragma once

#include "products.h"

namespace {

// One tile of at most kLanes<T> rows and columns. Loops over its vectors have constant bounds, which keeps them in
// registers.
template <class T>
void gather_tile(const T* const* row, int rows, int64_t column, int columns, T* out, int64_t width) {
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
    if (i < columns) store(out + i * width, v[i]);
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

// out[c * width + r] = row_at(r)[c], with zeros for the r that complete the last vector.
template <class T, class RowAt>
void gather(int64_t rows, int64_t columns, RowAt row_at, T* out, int64_t width) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    const int n = static_cast<int>(smaller(rows - r, W));
    const T* row[W];
    for (int i = 0; i < n; ++i) row[i] = row_at(r + i);
    for (int64_t c = 0; c < columns; c += W)
      gather_tile(row, n, c, static_cast<int>(smaller(columns - c, W)), out + c * width + r, width);
  }
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

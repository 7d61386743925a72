// Zero-padded copies of images, from which convolutions read.
#pragma once

#include "products.h"

namespace {

// Where the rows, or the columns, of `Padded` lie in an image: `kept` of every `stride`, the first `before` ahead of
// it.
struct Axis {
  int64_t size, kept, stride, before;

  int64_t source(int64_t i) const { return (kept == stride ? i : i / kept * stride + i % kept) - before; }
  // So many lie side by side.
  int64_t run() const { return kept == stride ? size : kept; }
};

// What the taps of all results reach, padding included. What lies between the taps of two results is left out.
inline Axis reached(int64_t results, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t kept = smaller(kernel, stride);
  return {(results - 1) * kept + kernel, kept, stride, padding};
}

// Copies a few elements, which a call of memcpy would cost more than.
template <class T>
void copy_few(T* out, const T* from, int64_t count) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(from + i));
  if (i < count) store_first(out + i, load_first(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

// An image (height, width, channels) inside zeros; or as much of it as is needed.
template <class T>
struct Padded {
  T* data;
  Axis rows, columns;
  int64_t channels;

  int64_t elements() const { return rows.size * columns.size * channels; }
  int64_t at(int64_t row, int64_t column) const { return (row * columns.size + column) * channels; }

  // Of an image whose pixels lie `pixel` elements apart.
  void fill(const T* image, int64_t height, int64_t width, int64_t pixel) const {
    const int64_t run = columns.run();
    for (int64_t column = 0; column < columns.size; column += run) {
      const int64_t first = columns.source(column), count = smaller(run, columns.size - column);
      const int64_t left = first < 0 ? smaller(-first, count) : 0;
      const int64_t copied = first + left < width ? smaller(width - first - left, count - left) : 0;
      const int64_t begin = left * channels, end = (left + copied) * channels;
      for (int64_t row = 0; row < rows.size; ++row) {
        T* out = data + at(row, column);
        const int64_t from = rows.source(row);
        if (from < 0 || from >= height || !copied) {
          __builtin_memset(out, 0, static_cast<size_t>(count * channels) * sizeof(T));
          continue;
        }
        const T* source = image + (from * width + first + left) * pixel;
        for (int64_t i = 0; i < begin; ++i) out[i] = 0;
        if (pixel == channels)
          __builtin_memcpy(out + begin, source, static_cast<size_t>(end - begin) * sizeof(T));
        else
          for (int64_t i = 0; i < copied; ++i) copy_few(out + begin + i * channels, source + i * pixel, channels);
        for (int64_t i = end; i < count * channels; ++i) out[i] = 0;
      }
    }
  }
};

}  // namespace

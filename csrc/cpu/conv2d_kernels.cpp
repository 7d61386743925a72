// Convolution and its two gradients for one instruction set, as products of gathered rows: an image is copied into
// zeros for its padding, after which the operands of neighbouring results lie at fixed distances. Internal linkage as
// in transform_kernels.cpp.
#include "conv2d_kernels.h"

#include "padded_image.h"
#include "products.h"
#include "thread_scratch.h"
#include "transpose.h"

namespace {

using kfo::Conv2dShape;
using kfo::cpu::Conv2dJob;
using kfo::cpu::Conv2dOps;
using kfo::cpu::scratch;

// The k that a product sums over: `runs` of them with `length` elements each, and how far an operand moves.
struct Steps {
  int64_t runs, run_step, length, step;
};

// One register tile of C[m][n] = sum over k of A[rows[m] + k] X[k][n]. `lanes` of its last vector exist in C and X.
template <class T, int M, int N, bool kPartial>
void gathered_tile(const T* A, const int64_t* rows, Steps steps, Rows<const T> X, T* C, const int64_t* outs, int lanes,
                   bool add) {
  constexpr int W = kLanes<T>;
  const auto load_row = [lanes](const T* x, int n) {
    return kPartial ? load_first(x + n * W, lanes) : load(x + n * W);
  };
  Vec<T> sums[M][N] = {};
  int64_t row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) row[m] = rows[m];
  const T* x = X.data;
  for (int64_t r = 0; r < steps.runs; ++r) {
    const T* a = A + r * steps.run_step;
    for (int64_t k = 0; k < steps.length; ++k) {
      Vec<T> values[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) values[n] = load_row(x, n);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec<T> factor = broadcast(a[row[m]]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[m][n] = multiply_add(factor, values[n], sums[m][n]);
      }
      x += X.row;
      a += steps.step;
    }
  }
  if (add) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sums[m][n] += load_row(C + outs[m], n);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      if (kPartial)
        store_first(C + outs[m] + n * W, sums[m][n], lanes);
      else
        store(C + outs[m] + n * W, sums[m][n]);
    }
}

template <class T>
using GatheredTile = void (*)(const T*, const int64_t*, Steps, Rows<const T>, T*, const int64_t*, int, bool);

template <class T, int N, bool kPartial, int... M>
GatheredTile<T> gathered_tile_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr GatheredTile<T> kTiles[] = {gathered_tile<T, M + 1, N, kPartial>...};
  return kTiles[rows - 1];
}

// Rows of a result: where the first operand of each begins, and where it goes.
struct Gathered {
  int64_t count;
  const int64_t *rows, *outs;
};

// Their offsets have to fit in general registers, beside the addresses that move.
constexpr int kGatheredRows = 8;
constexpr int gathered_rows(int vectors) {
  return tile_rows(vectors) < kGatheredRows ? tile_rows(vectors) : kGatheredRows;
}

template <class T, int N, bool kPartial>
void gathered_strip(PrefetchQueue* prefetch, const T* A, Gathered results, Steps steps, Rows<const T> X, T* C,
                    int lanes, bool add) {
  constexpr int kRows = gathered_rows(N);
  Cut(results.count, kRows).each([&](int64_t begin, int64_t rows) {
    prefetch_next(prefetch);
    gathered_tile_of<T, N, kPartial>(rows, std::make_integer_sequence<int, kRows>{})(
        A, results.rows + begin, steps, X, C, results.outs + begin, lanes, add);
  });
}

// C (results, N) = A X, or C += A X, with the rows of A gathered: X holds N columns for each k.
template <class T>
void gathered_product(PrefetchQueue* prefetch, const T* A, Gathered results, Steps steps, int64_t N, Rows<const T> X,
                      T* C, bool add) {
  constexpr int W = kLanes<T>;
  const int64_t vectors = N / W;
  Cut(vectors, kTileVectors).each([&](int64_t begin, int64_t strip) {
    const Rows<const T> x{X.data + begin * W, X.row};
    T* c = C + begin * W;
    switch (strip) {
      case 1:
        gathered_strip<T, 1, false>(prefetch, A, results, steps, x, c, W, add);
        break;
      case 2:
        gathered_strip<T, 2, false>(prefetch, A, results, steps, x, c, W, add);
        break;
      case 3:
        gathered_strip<T, 3, false>(prefetch, A, results, steps, x, c, W, add);
        break;
      case 4:
        gathered_strip<T, 4, false>(prefetch, A, results, steps, x, c, W, add);
        break;
    }
  });
  if (const int lanes = static_cast<int>(N % W))
    gathered_strip<T, 1, true>(prefetch, A, results, steps, {X.data + vectors * W, X.row}, C + vectors * W, lanes, add);
}

constexpr int64_t kProducts = 384;  // of a sum in T, as far as its runs allow: rounding grows with their number

// C = A X, the sum over k in parts.
template <class T>
void gathered_parts(PrefetchQueue* prefetch, const T* A, Gathered results, Steps steps, int64_t N, Rows<const T> X,
                    T* C) {
  const int64_t most = steps.length < kProducts ? kProducts / (steps.length ? steps.length : 1) : 1;
  for (int64_t r = 0; r == 0 || r < steps.runs; r += most)
    gathered_product<T>(prefetch, A + r * steps.run_step, results,
                        {smaller(most, steps.runs - r), steps.run_step, steps.length, steps.step}, N,
                        {X.data + r * steps.length * X.row, X.row}, C, r > 0);
}

// Prefetch queue of the next image, x_size elements from x and y_size from y, for the tiles that compute this image.
template <class T>
PrefetchQueue next_image(const T* x, int64_t x_size, const T* y, int64_t y_size, int64_t tiles) {
  constexpr int64_t kMost = 131072;  // bytes
  x_size = smaller(x_size * static_cast<int64_t>(sizeof(T)), kMost);
  y_size = smaller(y_size * static_cast<int64_t>(sizeof(T)), kMost);
  PrefetchQueue prefetch;
  prefetch.plan(x, x_size);
  prefetch.plan(y, y_size);
  prefetch.lines = (x_size + y_size) / (PrefetchQueue::kLine * tiles) + 1;
  return prefetch;
}

// The least number of tiles for `results` results, or one more.
inline int64_t least_tiles(int64_t results) { return results / kGatheredRows + 1; }

// Hands out pieces of a thread's scratch memory, each at the start of a cache line.
class Pieces {
 public:
  template <class U>
  static int64_t bytes(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(U)), PrefetchQueue::kLine);
  }
  explicit Pieces(int64_t bytes) : next_(static_cast<char*>(scratch(static_cast<size_t>(bytes)))) {}
  template <class U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(next_);
    next_ += bytes<U>(count);
    return piece;
  }

 private:
  char* next_;
};

template <class T>
Padded<T> reached(const Conv2dShape& s, int64_t channels) {
  return {nullptr, reached(s.Ho(), s.KH, s.stride, s.padding), reached(s.Wo(), s.KW, s.stride, s.padding), channels};
}

template <class T>
void forward(const Conv2dJob<T>& job) {
  const Conv2dShape& s = job.shape;
  const int64_t Ho = s.Ho(), Wo = s.Wo(), taps = s.KH * s.KW, pixels = Ho * Wo;
  Padded<T> image = reached<T>(s, s.C);
  Pieces memory(Pieces::bytes<T>(taps * s.C * s.O) + Pieces::bytes<T>(image.elements()) +
                2 * Pieces::bytes<int64_t>(pixels) + Pieces::bytes<int64_t>(taps * s.C));
  T* weight = memory.take<T>(taps * s.C * s.O);  // (KH, KW, C, O)
  image.data = memory.take<T>(image.elements());
  int64_t *rows = memory.take<int64_t>(pixels), *outs = memory.take<int64_t>(pixels);
  int64_t* places = memory.take<int64_t>(taps * s.C);  // of a row of job.weight in `weight`
  for (int64_t c = 0, i = 0; c < s.C; ++c)
    for (int64_t k = 0; k < taps; ++k, ++i) places[i] = (k * s.C + c) * s.O;
  gather_to(s.O, taps * s.C, [&](int64_t o) { return job.weight + o * s.C * taps; }, weight, places);
  for (int64_t h = 0, i = 0; h < Ho; ++h)
    for (int64_t w = 0; w < Wo; ++w, ++i) {
      rows[i] = image.at(h * image.rows.kept, w * image.columns.kept);
      outs[i] = i * s.O;
    }
  const Steps steps{s.KH, image.at(1, 0), s.KW * s.C, 1};
  for (int64_t n = job.begin; n < job.end; ++n) {
    image.fill(job.x + n * s.H * s.W * s.C, s.H, s.W, s.C);
    // Sequential access: the hardware prefetcher suffices.
    gathered_parts<T>(nullptr, image.data, {pixels, rows, outs}, steps, s.O, {weight, s.O}, job.y + n * pixels * s.O);
  }
}

// Along one axis: the inputs hi with (hi + padding) % stride == phase. They see the taps phase, phase + stride, ...;
// the u-th of them, hi = phase + u stride - padding, sees tap j of those in dy[u - j].
struct Phase {
  int64_t phase, taps, first, count;

  Phase(int64_t phase_, int64_t size, int64_t kernel, int64_t stride, int64_t padding)
      : phase(phase_), taps(phase_ < kernel ? ceil_div(kernel - phase_, stride) : 0) {
    first = padding > phase ? ceil_div(padding - phase, stride) : 0;
    const int64_t reach = size - 1 + padding - phase;
    count = reach >= 0 ? reach / stride + 1 - first : 0;
    if (count < 0) count = 0;
  }
};

// Of the phases along one axis, those that some input has: `count` from `first` on, modulo stride.
struct Phases {
  int64_t first, count, stride;

  Phases(int64_t size, int64_t stride_, int64_t padding)
      : first(padding % stride_), count(smaller(size, stride_)), stride(stride_) {}
  int64_t operator[](int64_t i) const { return first < stride - i ? first + i : first - (stride - i); }
};

// Each phase of the inputs is a convolution of its own, with stride 1, of dy with its taps in reverse order.
template <class T>
void input(const Conv2dJob<T>& job) {
  const Conv2dShape& s = job.shape;
  const int64_t Ho = s.Ho(), Wo = s.Wo();
  const int64_t before = ceil_div(s.KH > s.KW ? s.KH : s.KW, s.stride) - 1;
  const int64_t pixels = s.H * s.W;
  Padded<T> image{nullptr,
                  {before + (s.H - 1 + s.padding) / s.stride + 1, 1, 1, before},
                  {before + (s.W - 1 + s.padding) / s.stride + 1, 1, 1, before},
                  s.O};
  const Phases rows_of(s.H, s.stride, s.padding), columns_of(s.W, s.stride, s.padding);
  const int64_t phases = rows_of.count * columns_of.count, taps = s.KH * s.KW;
  Pieces memory(Pieces::bytes<T>(taps * s.O * s.C) + Pieces::bytes<T>(image.elements()) +
                2 * Pieces::bytes<int64_t>(pixels) + Pieces::bytes<int64_t>(2 * (phases + 1)) +
                Pieces::bytes<int64_t>(taps));
  T* weight = memory.take<T>(taps * s.O * s.C);  // per phase: (its taps backwards, O, C)
  image.data = memory.take<T>(image.elements());
  int64_t *rows = memory.take<int64_t>(pixels), *outs = memory.take<int64_t>(pixels);
  int64_t* starts = memory.take<int64_t>(2 * (phases + 1));  // of each phase in `rows`, and in `weight`
  int64_t* places = memory.take<int64_t>(taps);              // of a tap in `weight`
  starts[0] = starts[1] = 0;
  for (int64_t tap = 0; tap < taps; ++tap) places[tap] = -1;
  for (int64_t phase = 0; phase < phases; ++phase) {
    const Phase v(rows_of[phase / columns_of.count], s.H, s.KH, s.stride, s.padding),
        h(columns_of[phase % columns_of.count], s.W, s.KW, s.stride, s.padding);
    int64_t i = starts[2 * phase];
    for (int64_t u = 0; u < v.count; ++u)
      for (int64_t w = 0; w < h.count; ++w, ++i) {
        rows[i] = image.at(v.first + u - v.taps + 1 + before, h.first + w - h.taps + 1 + before);
        outs[i] =
            ((v.phase + (v.first + u) * s.stride - s.padding) * s.W + h.phase + (h.first + w) * s.stride - s.padding) *
            s.C;
      }
    starts[2 * phase + 2] = i;
    int64_t place = starts[2 * phase + 1];
    for (int64_t kh = v.taps - 1; kh >= 0; --kh)
      for (int64_t kw = h.taps - 1; kw >= 0; --kw, place += s.O * s.C)
        places[(v.phase + kh * s.stride) * s.KW + h.phase + kw * s.stride] = place;
    starts[2 * phase + 3] = place;
  }
  // The taps that no input sees go behind the others.
  int64_t unused = starts[2 * phases + 1];
  for (int64_t tap = 0; tap < taps; ++tap)
    if (places[tap] < 0) places[tap] = unused, unused += s.O * s.C;
  gather_to(s.O * s.C, taps, [&](int64_t i) { return job.weight + i * taps; }, weight, places);
  const int64_t dy_size = Ho * Wo * s.O, dx_size = pixels * s.C;
  for (int64_t n = job.begin; n < job.end; ++n) {
    const T* dy = job.dy + n * dy_size;
    T* dx = job.dx + n * dx_size;
    PrefetchQueue prefetch = next_image<T>(dy + dy_size, dy_size, dx + dx_size, dx_size, least_tiles(pixels));
    image.fill(dy, Ho, Wo, s.O);
    for (int64_t phase = 0; phase < phases; ++phase) {
      const Phase v(rows_of[phase / columns_of.count], s.H, s.KH, s.stride, s.padding),
          h(columns_of[phase % columns_of.count], s.W, s.KW, s.stride, s.padding);
      const int64_t first = starts[2 * phase], count = starts[2 * phase + 2] - first;
      gathered_parts<T>(&prefetch, image.data, {count, rows + first, outs + first},
                        {v.taps, image.at(1, 0), h.taps * s.O, 1}, s.C, {weight + starts[2 * phase + 1], s.C}, dx);
    }
  }
}

// Sums of some parts each, added up in float64: their error does not grow with the number of parts. No totals where the
// sums may hold all of them.
template <class T>
class Totals {
 public:
  static constexpr int64_t kHeld = 64;  // parts of a sum in T

  Totals(double* totals, T* sums, int64_t count) : totals_(totals), sums_(sums), count_(count) {
    clear(sums_);
    if (totals_) clear(totals_);
  }

  // Before another part is added.
  void make_room() {
    if (totals_ && held_ == kHeld) {
      for (int64_t i = 0; i < count_; ++i) totals_[i] += sums_[i];
      clear(sums_);
      held_ = 0;
    }
    ++held_;
  }

  // Overwrites the sums with the totals.
  void finish() const {
    if (!totals_) return;
    for (int64_t i = 0; i < count_; ++i) sums_[i] = static_cast<T>(totals_[i] + sums_[i]);
  }

 private:
  template <class U>
  void clear(U* data) const {
    __builtin_memset(data, 0, static_cast<size_t>(count_) * sizeof(U));
  }

  double* totals_;
  T* sums_;
  int64_t count_, held_ = 0;
};

template <class T>
void weight(const Conv2dJob<T>& job) {
  const Conv2dShape& s = job.shape;
  const int64_t Ho = s.Ho(), Wo = s.Wo(), taps = s.KH * s.KW, count = job.end - job.begin;
  // The channels of this job alone: jobs of other channels copy theirs.
  const int64_t channel = job.begin / taps;
  Padded<T> image = reached<T>(s, ceil_div(job.end, taps) - channel);
  // So many rows of results at a time stay in the first-level cache while all taps pass by.
  const int64_t step = 128 / Wo < 1 ? 1 : 128 / Wo, parts = ceil_div(Ho, step);
  // The sums and what the last vector of them reads besides.
  const int64_t sums_and_more = count * s.O + kLanes<T>;
  const int64_t totalled = s.N * parts > Totals<T>::kHeld ? count * s.O : 0;
  Pieces memory(Pieces::bytes<T>(sums_and_more) + Pieces::bytes<double>(totalled) + Pieces::bytes<T>(image.elements()) +
                2 * Pieces::bytes<int64_t>(count));
  T* sums = memory.take<T>(sums_and_more);  // (taps of this job, O)
  Totals<T> totals(totalled ? memory.take<double>(totalled) : nullptr, sums, count * s.O);
  image.data = memory.take<T>(image.elements());
  int64_t *rows = memory.take<int64_t>(count), *outs = memory.take<int64_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t c = (job.begin + i) / taps, tap = (job.begin + i) % taps;
    rows[i] = image.at(tap / s.KW, tap % s.KW) + c - channel;
    outs[i] = i * s.O;
  }
  const int64_t x_size = s.H * s.W * s.C, dy_size = Ho * Wo * s.O;
  for (int64_t n = 0; n < s.N; ++n) {
    const T *x = job.x + n * x_size, *dy = job.dy + n * dy_size;
    // The jobs of one task read the same images, and share the lines of x.
    PrefetchQueue prefetch =
        next_image(x + x_size, x_size * image.channels / s.C, dy + dy_size, dy_size, least_tiles(count) * parts);
    image.fill(x + channel, s.H, s.W, s.C);
    for (int64_t h = 0; h < Ho; h += step) {
      const int64_t rows_now = smaller(step, Ho - h), kept = image.rows.kept;
      totals.make_room();
      gathered_product<T>(&prefetch, image.data + image.at(h * kept, 0), {count, rows, outs},
                          {rows_now, image.at(kept, 0), Wo, image.columns.kept * image.channels}, s.O,
                          {dy + h * Wo * s.O, s.O}, sums, true);
    }
  }
  totals.finish();
  scatter(
      s.O, count, sums, s.O, [&](int64_t o) { return job.dweight + o * s.C * taps + job.begin; },
      [](int64_t) -> const T* { return nullptr; });
}

}  // namespace

namespace kfo::cpu::KFO_ISA {

const Conv2dKernels conv2d_kernels = {{forward<float>, input<float>, weight<float>},
                                      {forward<double>, input<double>, weight<double>}};

}  // namespace kfo::cpu::KFO_ISA

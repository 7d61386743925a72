// The few vector operations the kernels need, for the instruction set this file is compiled for. Multiply-adds are
// fused where the hardware has them (AVX-512, AVX2) and never elsewhere: nothing is left to the compiler's contraction.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#if !__has_builtin(__builtin_shufflevector)
#error "the CPU kernels need GCC 12 or later, or clang"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

#if defined(__AVX512F__)
inline Vec<float> broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec<double> broadcast(double x) { return _mm512_set1_pd(x); }
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }

#elif defined(__AVX2__) && defined(__FMA__)
inline Vec<float> broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec<double> broadcast(double x) { return _mm256_set1_pd(x); }
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }

#else
inline Vec<float> broadcast(float x) { return _mm_set1_ps(x); }
inline Vec<double> broadcast(double x) { return _mm_set1_pd(x); }
inline Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
inline Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

#endif

// The first n lanes from memory and zeros above them; the memory of the other lanes is not touched. AddressSanitizer
// does not see masked accesses: there, as without masks, it is one lane after the other.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
inline Vec<float> load_first(const float* p, int n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline Vec<double> load_first(const double* p, int n) { return _mm512_maskz_loadu_pd((1u << n) - 1, p); }
inline void store_first(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
inline void store_first(double* p, Vec<double> v, int n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, v); }

#elif defined(__AVX2__) && defined(__FMA__) && !defined(__SANITIZE_ADDRESS__)
inline __m256i first_lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_lanes64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes32(n)); }
inline Vec<double> load_first(const double* p, int n) { return _mm256_maskload_pd(p, first_lanes64(n)); }
inline void store_first(float* p, Vec<float> v, int n) { _mm256_maskstore_ps(p, first_lanes32(n), v); }
inline void store_first(double* p, Vec<double> v, int n) { _mm256_maskstore_pd(p, first_lanes64(n), v); }

#else
inline Vec<float> load_first(const float* p, int n) {
  Vec<float> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline Vec<double> load_first(const double* p, int n) {
  Vec<double> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
inline void store_first(float* p, Vec<float> v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
inline void store_first(double* p, Vec<double> v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <int D, bool kHigh, class V, int... I>
inline V exchange_lanes(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
  return __builtin_shufflevector(a, b, (I & D ? (kHigh ? W + I : W + I - D) : (kHigh ? I + D : I))...);
}

// Splits lanes into groups of D: `low` interleaves the even groups of a and b, `high` the odd ones.
template <class T, int D>
inline Vec<T> low(Vec<T> a, Vec<T> b) {
  return exchange_lanes<D, false>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}
template <class T, int D>
inline Vec<T> high(Vec<T> a, Vec<T> b) {
  return exchange_lanes<D, true>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// Transposes kLanes<T> vectors in place, as rows of a square matrix.
template <class T, int D = kLanes<T> / 2>
inline void transpose(Vec<T>* rows) {
  if constexpr (D >= 1) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<T>; ++r)
      if (!(r & D)) {
        const Vec<T> a = rows[r], b = rows[r + D];
        rows[r] = low<T, D>(a, b);
        rows[r + D] = high<T, D>(a, b);
      }
    transpose<T, D / 2>(rows);
  }
}

// Lane i of the result is the sum of the lanes of vectors[i], for i < N; N is a power of two, at most kLanes<T>.
template <class T, int N, int D = 1>
inline Vec<T> lane_sums(Vec<T>* vectors) {
  if constexpr (D == kLanes<T>) {
    return vectors[0];
  } else if constexpr (N > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i)
      vectors[i] = low<T, D>(vectors[2 * i], vectors[2 * i + 1]) + high<T, D>(vectors[2 * i], vectors[2 * i + 1]);
    return lane_sums<T, N / 2, D * 2>(vectors);
  } else {
    vectors[0] = low<T, D>(vectors[0], vectors[0]) + high<T, D>(vectors[0], vectors[0]);
    return lane_sums<T, 1, D * 2>(vectors);
  }
}

}  // namespace

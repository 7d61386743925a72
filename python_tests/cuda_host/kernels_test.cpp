// The CUDA kernels on the host, against the formulas written out in float64. Argument: rounds of random groups, or
// `smallest`. Compiled with -include host_device.h, which stands in for the CUDA runtime.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <random>

#include "cuda/schedule.h"
#include "cuda/sum.cuh"
#include "cuda/tiled.cuh"
#include "cuda/transform.cuh"
#include "cuda/transform_backward.cuh"
#include "cuda/transform_double_backward.cuh"

using namespace kfo;
using namespace kfo::cuda;
using Row = std::vector<double>;
using Packed = std::vector<Row>;  // rows; one row: shared

static std::mt19937 rng(0);
static double worst = 0;
static long checks = 0;

template <typename T>
Packed random_rows(int64_t rows, int64_t n) {
  std::normal_distribution<double> normal;
  Packed out(rows, Row(n));
  for (Row& row : out)
    for (double& x : row) x = static_cast<T>(normal(rng));
  return out;
}

// Memory of `count` elements. What is not touched of a large one takes none, but has no guard behind it.
template <typename T>
class Memory {
 public:
  explicit Memory(size_t count) : bytes_(count * sizeof(T)), mapped_(bytes_ > (size_t{1} << 30)) {
    void* memory =
        !mapped_ ? std::malloc(bytes_)
                 : mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!memory || memory == MAP_FAILED) std::printf("FAIL no memory\n"), std::exit(1);
    data_ = static_cast<T*>(memory);
  }
  Memory(const Memory&) = delete;
  ~Memory() {
    if (mapped_)
      munmap(data_, bytes_);
    else
      std::free(data_);
  }
  T* data() const { return data_; }

 private:
  size_t bytes_;
  bool mapped_;
  T* data_;
};

// A device copy with a row stride of its own, NaN behind each row; absent when empty.
template <typename T>
struct Device {
  std::unique_ptr<Memory<T>> memory;
  PackedRows<const T> operand;
  Device(const Packed& rows, int64_t pad) {
    if (rows.empty()) return;
    const int64_t n = rows[0].size(), stride = n + pad;
    memory = std::make_unique<Memory<T>>((rows.size() - 1) * stride + n + 1);
    T* data = memory->data();
    for (size_t r = 0; r < rows.size(); ++r) {
      for (int64_t i = 0; i < n; ++i) data[r * stride + i] = static_cast<T>(rows[r][i]);
      if (pad > 0 || r + 1 == rows.size()) data[r * stride + n] = std::nan("");
    }
    operand = {data, rows.size() == 1 ? 0 : stride};
  }
};

static const double* row(const Packed& x, int64_t t) { return x.empty() ? nullptr : x[x.size() == 1 ? 0 : t].data(); }

struct Inputs {
  Packed R, G, L, dY, ddR, ddG, ddL, bias;
};
struct Outputs {
  Packed Y, dR, dG, dL, ddY;
};

// C += op(A) op(B), sizes m x k x n
static void gemm(double* C, const double* A, bool At, const double* B, bool Bt, int64_t m, int64_t k, int64_t n) {
  if (!A || !B) return;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < k; ++l)
      for (int64_t j = 0; j < n; ++j)
        C[i * n + j] += (At ? A[l * m + i] : A[i * k + l]) * (Bt ? B[j * k + l] : B[l * n + j]);
}
static Row product(const double* A, bool At, const double* B, bool Bt, int64_t m, int64_t k, int64_t n) {
  Row C(m * n);
  gemm(C.data(), A, At, B, Bt, m, k, n);
  return C;
}

static Outputs reference(const Group& group, int64_t T, const Inputs& in, Order order, int64_t R_rows, int64_t L_rows) {
  Outputs out;
  out.Y = out.dG = out.ddY = Packed(T, Row(group.G));
  out.dR = Packed(R_rows, Row(group.R));
  out.dL = Packed(L_rows, Row(group.L));
  for (int64_t t = 0; t < T; ++t)
    for (const Problem& s : group.problems)
      for (int64_t b = 0; b < s.B; ++b) {
        const int64_t p = s.p, q = s.q, g = s.G + b * p * q;
        auto at = [&](const Packed& x, int64_t offset) { return x.empty() ? nullptr : row(x, t) + offset; };
        const double *R = at(in.R, s.R), *L = at(in.L, s.L), *G = at(in.G, g), *dY = at(in.dY, g);
        const double *ddR = at(in.ddR, s.R), *ddL = at(in.ddL, s.L), *ddG = at(in.ddG, g);
        double* dR = out.dR.empty() ? nullptr : const_cast<double*>(row(out.dR, t)) + s.R;
        double* dL = out.dL.empty() ? nullptr : const_cast<double*>(row(out.dL, t)) + s.L;
        auto trilinear = [&](double* Y, const double* R, const double* G, const double* L) {
          if (R && G && L) gemm(Y, R, true, product(G, false, L, false, p, q, q).data(), false, p, p, q);
        };
        auto backward = [&](const double* R, const double* G, const double* L, bool want_R, bool want_G, bool want_L) {
          if (want_G && R && L)
            gemm(&out.dG[t][g], R, false, product(dY, false, L, true, p, q, q).data(), false, p, p, q);
          if (want_R && G && L) gemm(dR, product(G, false, L, false, p, q, q).data(), false, dY, true, p, q, p);
          if (want_L && R && G) gemm(dL, product(G, true, R, false, q, p, p).data(), false, dY, false, q, p, q);
        };
        if (order == Order::forward) {
          trilinear(&out.Y[t][g], R, G, L);
          if (!in.bias.empty())
            for (int64_t i = 0; i < p * q; ++i) out.Y[t][g + i] += row(in.bias, t)[s.bias + i];
        } else if (order == Order::backward) {
          backward(R, G, L, true, true, true);
        } else {
          trilinear(&out.ddY[t][g], ddR, G, L), trilinear(&out.ddY[t][g], R, ddG, L),
              trilinear(&out.ddY[t][g], R, G, ddL);
          backward(ddR, G, L, false, true, true);
          backward(R, ddG, L, true, false, true);
          backward(R, G, ddL, true, true, false);
        }
      }
  return out;
}

template <typename T>
void compare(const std::vector<T>& got, const Packed& want, const char* what) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  double scale = 1;
  for (const Row& r : want)
    for (double x : r) scale = std::max(scale, std::fabs(x));
  size_t e = 0;
  for (const Row& r : want)
    for (double x : r) {
      const double error = std::fabs(static_cast<double>(got[e]) - x) / scale;
      if (!(error <= tolerance)) {
        std::printf("FAIL %s element %zu: got %g want %g (scale %g)\n", what, e, (double)got[e], x, scale);
        std::exit(1);
      }
      worst = std::max(worst, error / tolerance);
      ++e;
    }
  if (e != got.size()) std::printf("FAIL %s size %zu %zu\n", what, got.size(), e), std::exit(1);
  ++checks;
}

template <typename T>
void run_case(const std::vector<int64_t>& shapes, int64_t T_, bool shared_R, bool shared_L, bool with_bias,
              unsigned need, unsigned present, int64_t pad, Choice choice) {
  const Group group = make_group(shapes);
  const int64_t R_rows = shared_R ? 1 : T_, L_rows = shared_L ? 1 : T_;
  Inputs in;
  in.R = random_rows<T>(R_rows, group.R), in.L = random_rows<T>(L_rows, group.L);
  in.G = random_rows<T>(T_, group.G), in.dY = random_rows<T>(T_, group.G);
  if (with_bias) in.bias = random_rows<T>(shared_R ? 1 : T_, group.bias);
  if (present & 1) in.ddR = random_rows<T>(R_rows, group.R);
  if (present & 2) in.ddG = random_rows<T>(T_, group.G);
  if (present & 4) in.ddL = random_rows<T>(L_rows, group.L);
  const Device<T> R(in.R, pad), G(in.G, pad), L(in.L, 2 * pad), dY(in.dY, pad), bias(in.bias, pad);
  const Device<T> ddR(in.ddR, pad), ddG(in.ddG, pad), ddL(in.ddL, pad);
  const T nan = std::nan("");
  const bool need_R = need & 1, need_G = need & 2, need_L = need & 4, need_Y = need & 8;

  for (Order order : {Order::forward, Order::backward, Order::double_backward}) {
    const bool factors = order != Order::forward;
    const int64_t dR_rows = factors && need_R ? R_rows : 0, dL_rows = factors && need_L ? L_rows : 0;
    const bool last = order == Order::double_backward;
    Request request{order, T_, sizeof(T), dR_rows, dL_rows};
    request.need_G = factors && need_G;
    request.need_Y = last && need_Y;
    request.has_R = last && (present & 1), request.has_G = last && (present & 2), request.has_L = last && (present & 4);
    request.choice = choice;
    const Schedule schedule = make_schedule(group, request);
    std::vector<T> scratch(schedule.scratch, nan), big(T_ * group.G, nan), ddY(need_Y ? T_ * group.G : 0, nan);
    std::vector<T> dR(dR_rows * group.R, nan), dL(dL_rows * group.L, nan);
    Data<T> data{};
    data[kR] = R.operand, data[kG] = G.operand, data[kL] = L.operand;
    if (order == Order::forward) {
      data[kBias] = bias.operand;
      data[kY] = {big.data(), group.G};
    } else {
      data[kdY] = dY.operand;
      if (dR_rows) data[kdR] = {dR.data(), group.R};
      if (need_G) data[kdG] = {big.data(), group.G};
      if (dL_rows) data[kdL] = {dL.data(), group.L};
    }
    if (last) {
      data[kddR] = ddR.operand, data[kddG] = ddG.operand, data[kddL] = ddL.operand;
      if (need_Y) data[kddY] = {ddY.data(), group.G};
    }
    data[kIntermediates] = {scratch.data(), schedule.scratch_columns};
    data[kScratch] = {scratch.data(), schedule.scratch_columns};
    constexpr void (*kernels[])(Arguments<T, Table>) = {forward_kernel<T>, backward_kernel<T>,
                                                        double_backward_kernel<T>};
    for (const Launch& part : schedule.launches) {
      const Arguments<T, Table> args{part.table, data};
      emulation::launch(kernels[static_cast<int>(order) - 1], part.blocks, kThreads, part.shared_bytes, args);
      emulation::launch(sum_kernel<T>, part.sum_blocks, kThreads, kThreads * sizeof(double), args);
    }
    for (const TiledLaunch& part : schedule.tiled)
      emulation::launch(tiled_kernel<T>, part.blocks, kThreads, kTiledShared * sizeof(T),
                        Arguments<T, TiledTable>{part.table, data});
    const Outputs want = reference(group, T_, in, order, R_rows, L_rows);
    if (order == Order::forward) {
      compare(big, want.Y, "Y");
      continue;
    }
    if (need_G) compare(big, want.dG, "dG");
    if (need_R) compare(dR, want.dR, "dR");
    if (need_L) compare(dL, want.dL, "dL");
    if (need_Y && order == Order::double_backward) compare(ddY, want.ddY, "ddY");
  }
}

// By products of all threads, and by a warp for each matrix wherever that is possible.
template <typename T>
void run_case(const std::vector<int64_t>& shapes, int64_t T_, bool shared_R, bool shared_L, bool with_bias,
              unsigned need, unsigned present, int64_t pad) {
  for (Choice choice : {Choice::products, Choice::lanes})
    run_case<T>(shapes, T_, shared_R, shared_L, with_bias, need, present, pad, choice);
}

// Few blocks, but of every kind: several chunks of a problem, sums over them and over tasks, tiles of every shape.
static void run_smallest() {
  run_case<float>({301, 4, 7, 2, 3, 6}, 2, true, false, true, 15, 7, 1);
  run_case<double>({1, 130, 3, 1, 2, 130}, 1, false, false, false, 15, 7, 0);
}

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "smallest") == 0) {
    run_smallest();
    std::printf("%ld comparisons, worst error %.2f of the tolerance\n", checks, worst);
    return 0;
  }
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 40;
  const std::vector<int64_t> sizes = {1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 23, 31, 32, 33, 64, 70};
  auto pick = [&](int64_t n) { return static_cast<int64_t>(rng() % n); };
  // Every subset of outputs and of cotangents on one small group.
  for (unsigned need = 0; need < 16; ++need)
    for (unsigned present = 0; present < 8; ++present) {
      run_case<double>({2, 3, 5, 1, 1, 1, 40, 4, 7, 3, 6, 1}, 3, need % 2, present % 2, need % 3, need, present, 2);
    }
  for (int64_t T : {0, 1, 4})
    for (int shared = 0; shared < 4; ++shared) {
      run_case<double>({3, 5, 2, 100, 3, 3}, T, shared & 1, shared & 2, true, 15, 7, 0);
      run_case<float>({}, T, shared & 1, shared & 2, false, 15, 7, 0);
    }
  for (int i = 0; i < rounds; ++i) {
    std::vector<int64_t> shapes;
    for (int64_t n = 1 + pick(4); n > 0; --n) {
      shapes.push_back(1 + pick(i % 3 ? 5 : 40));
      shapes.push_back(sizes[pick(sizes.size() - (i % 2) * 5)]);
      shapes.push_back(sizes[pick(sizes.size() - (i % 2) * 5)]);
    }
    const int64_t T = 1 + pick(3), pad = pick(3);
    const unsigned need = pick(16), present = pick(8);
    run_case<float>(shapes, T, pick(2), pick(2), pick(2), need, present, pad);
    run_case<double>(shapes, T, pick(2), pick(2), pick(2), need, present, pad);
  }
  // More problems than one table holds, factors beyond shared memory, intermediates beyond shared memory.
  std::vector<int64_t> many;
  for (int i = 0; i < 70; ++i) many.insert(many.end(), {1 + i % 3, 1 + i % 5, 1 + i % 4});
  run_case<float>(many, 2, true, false, true, 15, 7, 1);
  run_case<float>({1, 130, 3, 1, 2, 300, 2, 64, 90}, 2, true, false, true, 15, 7, 1);
  run_case<double>({2, 90, 60, 5000, 1, 1}, 2, false, true, true, 15, 7, 1);
  run_case<float>({1, 1600, 1}, 1, true, false, true, 15, 7, 1);
  // Rows further apart than 32 bits can count.
  run_case<float>({3, 5, 4, 1, 2, 260}, 2, false, false, true, 15, 7, int64_t{1} << 31);
  std::printf("%ld comparisons, worst error %.2f of the tolerance\n", checks, worst);
}

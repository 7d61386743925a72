// kfo_ext._plan: the host-side plan, cost model and build information, as the kernels themselves see them. No tensors
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"
#include "cpu/schedule.h"
#include "cuda/conv2d.h"
#include "cuda/schedule.h"
#include "plan.h"

namespace py = pybind11;

namespace {

using Shapes = std::vector<int64_t>;

// Outside this module an order is its number: 1 forward, 2 backward, 3 double backward.
kfo::Order order_of(int number) {
  if (number < 1 || number > 3) throw std::invalid_argument("order: expected 1, 2 or 3, got " + std::to_string(number));
  return static_cast<kfo::Order>(number);
}

void check_tasks(int64_t tasks) {
  if (tasks < 0) throw std::invalid_argument("tasks: expected at least 0, got " + std::to_string(tasks));
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

py::list problems(const Shapes& shapes) {
  py::list out;
  for (const kfo::Problem& problem : kfo::make_group(shapes).problems)
    out.append(py::dict(py::arg("B") = problem.B, py::arg("p") = problem.p, py::arg("q") = problem.q,
                        py::arg("R") = problem.R, py::arg("G") = problem.G, py::arg("L") = problem.L,
                        py::arg("bias") = problem.bias));
  return out;
}

py::tuple sizes(const Shapes& shapes) {
  const kfo::Group group = kfo::make_group(shapes);
  return py::make_tuple(group.R, group.G, group.L, group.bias);
}

py::list chunks(const Shapes& shapes, int64_t tasks, int order, bool shared_R, bool shared_L) {
  check_tasks(tasks);
  const kfo::Order checked = order_of(order);
  kfo::cpu::Schedule schedule;
  {
    const py::gil_scoped_release release;
    schedule = kfo::cpu::make_schedule(shapes, tasks, checked, shared_R, shared_L);
  }
  py::list out;
  for (const kfo::cpu::Chunk& chunk : schedule.chunks)
    out.append(py::make_tuple(chunk.problem, chunk.task, chunk.begin, chunk.end));
  return out;
}

void check_element_size(int64_t size) {
  if (size != 4 && size != 8) throw std::invalid_argument("element_size: expected 4 or 8, got " + std::to_string(size));
}

kfo::cuda::Schedule cuda_schedule(const Shapes& shapes, int64_t tasks, int order, int64_t element_size, bool shared_R,
                                  bool shared_L) {
  check_tasks(tasks);
  check_element_size(element_size);
  kfo::cuda::Request request{order_of(order), tasks, element_size};
  if (request.order != kfo::Order::forward) {
    request.dR_rows = shared_R ? 1 : tasks;
    request.dL_rows = shared_L ? 1 : tasks;
    request.need_G = true;
  }
  if (request.order == kfo::Order::double_backward)
    request.need_Y = request.has_R = request.has_G = request.has_L = true;
  return kfo::cuda::make_schedule(kfo::make_group(shapes), request);
}

py::list cuda_launches(const Shapes& shapes, int64_t tasks, int order, int64_t element_size, bool shared_R,
                       bool shared_L) {
  const kfo::cuda::Schedule schedule = cuda_schedule(shapes, tasks, order, element_size, shared_R, shared_L);
  py::list out;
  const auto add = [&](const char* kernel, int64_t blocks, int64_t shared_bytes) {
    if (blocks) out.append(py::make_tuple(kernel, blocks, shared_bytes));
  };
  const char* names[] = {"forward_kernel", "backward_kernel", "double_backward_kernel"};
  for (const kfo::cuda::Launch& part : schedule.launches) {
    add(names[order - 1], part.blocks, part.shared_bytes);
    add("sum_kernel", part.sum_blocks, kfo::cuda::kThreads * element_size);
  }
  for (const kfo::cuda::TiledLaunch& part : schedule.tiled)
    add("tiled_kernel", part.blocks, kfo::cuda::kTiledShared * element_size);
  return out;
}

// How the order's kernel cuts each problem whose factors fit in shared memory.
py::list cuda_cuts(const Shapes& shapes, int64_t tasks, int order, int64_t element_size, bool shared_R, bool shared_L) {
  py::list out;
  for (const kfo::cuda::Launch& part : cuda_schedule(shapes, tasks, order, element_size, shared_R, shared_L).launches)
    for (const kfo::cuda::Entry& entry : std::vector(part.table.entries, part.table.entries + part.table.count)) {
      py::list tiles;
      for (int kind = 0; kind < kfo::cuda::kKinds; ++kind)
        tiles.append(py::make_tuple(int{entry.side[kind]}, 1 << entry.share[kind]));
      out.append(py::make_tuple(int{entry.p}, int{entry.q}, entry.rows + (entry.longer > 0), entry.chunks(),
                                entry.path == kfo::cuda::kLanes, tiles));
    }
  return out;
}

int64_t cuda_scratch(const Shapes& shapes, int64_t tasks, int order, int64_t element_size, bool shared_R,
                     bool shared_L) {
  return cuda_schedule(shapes, tasks, order, element_size, shared_R, shared_L).scratch * element_size;
}

using Launches = std::vector<std::tuple<std::string, int64_t, int64_t>>;

template <class T>
std::array<Launches, 3> conv2d_launches(const kfo::Conv2dShape& s, int64_t tasks) {
  using kfo::cuda::ConvLaunch;
  std::array<Launches, 3> out;
  for (const bool input : {false, true}) {
    kfo::cuda::GatherArguments<T> args{};
    const ConvLaunch launch = kfo::cuda::cut_gather(args, s, tasks, input);
    out[input] = {{"convolution_kernel", launch.blocks, launch.shared_bytes}};
  }
  kfo::cuda::WeightArguments<T> args{};
  const ConvLaunch launch = kfo::cuda::cut_weight(args, s, tasks);
  out[2] = {{"convolution_weight_kernel", launch.blocks, launch.shared_bytes},
            {"convolution_weight_sum_kernel", kfo::cuda::weight_sum_blocks(args, tasks),
             kfo::cuda::weight_sum_shared_bytes<T>()}};
  return out;
}

std::array<Launches, 3> cuda_conv2d_launches(const std::array<int64_t, 9>& sizes, int64_t tasks, int64_t element_size) {
  check_tasks(tasks);
  check_element_size(element_size);
  const auto [N, H, W, C, O, KH, KW, stride, padding] = sizes;
  for (const int64_t size : {H, W, C, O, KH, KW, stride})
    if (size < 1) throw std::invalid_argument("sizes: expected at least 1, got " + std::to_string(size));
  if (N < 0 || padding < 0 || H + 2 * padding < KH || W + 2 * padding < KW)
    throw std::invalid_argument("sizes: expected padded images at least as large as the kernel");
  const kfo::Conv2dShape shape{N, H, W, C, O, KH, KW, stride, padding};
  return element_size == 4 ? conv2d_launches<float>(shape, tasks) : conv2d_launches<double>(shape, tasks);
}

double flops(const Shapes& shapes, int64_t tasks, int order) {
  check_tasks(tasks);
  return kfo::flops(kfo::make_group(shapes), tasks, order_of(order));
}

double bytes(const Shapes& shapes, int64_t tasks, int order, int64_t factor_rows, int64_t element_size) {
  check_tasks(tasks);
  return kfo::bytes(kfo::make_group(shapes), tasks, factor_rows, element_size, order_of(order));
}

py::dict build_info() {
  const kfo::BuildInfo& info = kfo::kBuildInfo;
  return py::dict(py::arg("id") = info.id, py::arg("version") = info.version, py::arg("compiler") = info.compiler,
                  py::arg("nvcc") = *info.nvcc ? py::object(py::str(info.nvcc)) : py::object(py::none()),
                  py::arg("architectures") = words(info.architectures),
                  py::arg("instruction_sets") = words(info.instruction_sets), py::arg("torch") = info.torch);
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "The plan of a group of Kronecker problems, given as flat (B, p, q) triples.";
  m.def("problems", &problems, py::arg("shapes"),
        "Each problem's B, p, q and its offsets in the packed rows of R, G, L and bias.");
  m.def("sizes", &sizes, py::arg("shapes"), "Columns of packed R, G, L and bias.");
  m.def("chunks", &chunks, py::arg("shapes"), py::arg("tasks"), py::arg("order"), py::arg("shared_R") = false,
        py::arg("shared_L") = false,
        "The CPU library's units of work (problem, task, begin, end), the costliest first. When both factors are "
        "shared,\n"
        "rows run on over the tasks: row r is matrix r % B of task r // B.");
  m.def(
      "cuda_launches", &cuda_launches, py::arg("shapes"), py::arg("tasks"), py::arg("order"), py::arg("element_size"),
      py::arg("shared_R") = false, py::arg("shared_L") = false,
      "The CUDA library's launches (kernel, thread blocks, bytes of shared memory of each), with every output wanted\n"
      "and every operand present.");
  m.def("cuda_cuts", &cuda_cuts, py::arg("shapes"), py::arg("tasks"), py::arg("order"), py::arg("element_size"),
        py::arg("shared_R") = false, py::arg("shared_L") = false,
        "For each problem of the order's own kernel, in the order of its blocks: p, q, the most matrices of a block, "
        "chunks\n"
        "of B, whether a warp computes each matrix, and if not, the side of a tile and how many threads share it, for\n"
        "products of (n p, q), (n q, p), (p, p) and (q, q).");
  m.def("cuda_scratch", &cuda_scratch, py::arg("shapes"), py::arg("tasks"), py::arg("order"), py::arg("element_size"),
        py::arg("shared_R") = false, py::arg("shared_L") = false,
        "Bytes of scratch memory of the same launches: partial sums and large intermediates.");
  m.def("cuda_conv2d_launches", &cuda_conv2d_launches, py::arg("sizes"), py::arg("tasks"), py::arg("element_size"),
        "The CUDA library's launches (kernel, thread blocks, bytes of shared memory of each) for conv2d, conv2d_input "
        "and\n"
        "conv2d_weight; sizes: images, height, width, in channels, out channels, kernel height and width, stride, "
        "padding.");
  m.attr("cuda_threads") = kfo::cuda::kThreads;
  m.def("flops", &flops, py::arg("shapes"), py::arg("tasks"), py::arg("order"),
        "Operations of one call with every output wanted, 2 per multiply-add.");
  m.def("bytes", &bytes, py::arg("shapes"), py::arg("tasks"), py::arg("order"), py::arg("factor_rows"),
        py::arg("element_size"), "Bytes one call must move with every output wanted.");
  m.def("build_id", [] { return kfo::kBuildInfo.id; }, "The id that all binaries of one build share.");
  m.def("build_info", &build_info, "What the binaries were built from and with; nvcc is None without CUDA.");
}

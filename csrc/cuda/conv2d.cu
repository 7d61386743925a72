// The convolution of each task's images with its own weights and its two gradients on CUDA: outputs and launches.
#include <vector>

#include "../check_conv2d.h"
#include "../tensors.h"
#include "conv2d_gather.cuh"
#include "conv2d_weight.cuh"
#include "launch.h"

namespace kfo::cuda {

namespace {

// Whether 16 bytes at a time may be read or written: rows of whole vectors, each task's at a 16-byte boundary.
template <typename T>
bool fits_vectors(const PackedRows<T>& rows, int64_t channels) {
  constexpr uintptr_t bytes = 16;
  return channels * sizeof(T) % bytes == 0 && rows.stride * sizeof(T) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % bytes == 0;
}

template <typename T>
PackedRows<T> rows_of(const Tensor& output) {
  return {static_cast<T*>(output.mutable_data_ptr()), output.stride(0)};
}

// conv2d, or conv2d_input: `to` is y or dx, `from` the other images.
void gather(const char* op, const Tensor& to, const Tensor& from, const Tensor& weight, const Conv2dShape& s,
            bool input) {
  const Input in_from(from), in_weight(weight);
  const Launcher launcher(op, from.get_device_index());
  with_type(from, [&](auto zero) {
    using T = decltype(zero);
    GatherArguments<T> args{};
    const ConvLaunch launch = cut_gather(args, s, from.size(0), input);
    args.from = in_from.rows<T>(), args.weight = in_weight.rows<T>(), args.to = rows_of<T>(to);
    args.from_vectors = fits_vectors(args.from, args.from_channels);
    args.to_vectors = fits_vectors(args.to, args.to_channels);
    launcher.launch<convolution_kernel<T>>(launch.blocks, launch.shared_bytes, args);
  });
}

}  // namespace

Tensor conv2d_cuda(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  const Conv2dShape s = check_conv2d(x, weight, stride, padding);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = new_tensor(x, {x.size(0), s.N, s.Ho(), s.Wo(), s.O});
  gather("conv2d", y, x, weight, s, false);
  return y;
}

Tensor conv2d_input_cuda(const Tensor& dy, const Tensor& weight, const std::vector<int64_t>& size, int64_t stride,
                         int64_t padding) {
  const Conv2dShape s = check_conv2d_input(dy, weight, size, stride, padding);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  const Tensor dx = new_tensor(dy, {dy.size(0), s.N, s.H, s.W, s.C});
  gather("conv2d_input", dx, dy, weight, s, true);
  return dx;
}

Tensor conv2d_weight_cuda(const Tensor& x, const Tensor& dy, const std::vector<int64_t>& kernel_size, int64_t stride,
                          int64_t padding) {
  const Conv2dShape s = check_conv2d_weight(x, dy, kernel_size, stride, padding);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t tasks = x.size(0);
  const Input in_x(x), in_dy(dy);
  const Tensor dweight = new_tensor(x, {tasks, s.O, s.C, s.KH, s.KW});
  const Launcher launcher("conv2d_weight", x.get_device_index());
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    WeightArguments<T> args{};
    const ConvLaunch launch = cut_weight(args, s, tasks);
    // Freed on return but safe: torch's allocator reuses it on this stream only.
    const Tensor scratch = new_tensor(x, {partial_sums(args, tasks)});
    args.x = in_x.rows<T>(), args.dy = in_dy.rows<T>(), args.dweight = rows_of<T>(dweight);
    args.partials = static_cast<T*>(scratch.mutable_data_ptr());
    args.x_vectors = fits_vectors(args.x, s.C), args.dy_vectors = fits_vectors(args.dy, s.O);
    launcher.launch<convolution_weight_kernel<T>>(launch.blocks, launch.shared_bytes, args);
    launcher.launch<convolution_weight_sum_kernel<T>>(weight_sum_blocks(args, tasks), weight_sum_shared_bytes<T>(),
                                                      args);
  });
  return dweight;
}

}  // namespace kfo::cuda

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CUDA, m) {
  m.impl("conv2d", TORCH_BOX(&kfo::cuda::conv2d_cuda));
  m.impl("conv2d_input", TORCH_BOX(&kfo::cuda::conv2d_input_cuda));
  m.impl("conv2d_weight", TORCH_BOX(&kfo::cuda::conv2d_weight_cuda));
}

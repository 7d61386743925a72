#include "launch.h"
#include "transform.cuh"

namespace kfo::cuda {

Tensor transform_cuda(const Tensor& R, const Tensor& G, const Tensor& L, const std::vector<int64_t>& shapes,
                      const std::optional<Tensor>& bias) {
  const Group group = make_group(shapes);
  const int64_t tasks = check_transform(group, shapes, R, G, L, bias);
  const torch::stable::accelerator::DeviceGuard guard(G.get_device_index());
  const Input in_R(R), in_G(G), in_L(L), in_bias(bias);
  const Tensor Y = new_output(G, true, tasks, group.G);
  const Schedule schedule = make_schedule(group, tasks, Order::forward, G.element_size(), 0, 0);
  with_type(G.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Forward<T> args{};
    args.R = in_R.operand<T>();
    args.G = in_G.operand<T>();
    args.L = in_L.operand<T>();
    args.bias = in_bias.operand<T>();
    args.Y = output<T>(Y);
    launch_order<T>(forward_kernel<T>, args, schedule, G);
  });
  return Y;
}

}  // namespace kfo::cuda

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CUDA, m) { m.impl("transform", TORCH_BOX(&kfo::cuda::transform_cuda)); }

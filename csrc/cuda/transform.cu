#include "orders.h"
#include "transform.cuh"

namespace kfo::cuda {

Tensor transform_cuda(const Tensor& R, const Tensor& G, const Tensor& L, const std::vector<int64_t>& shapes,
                      const std::optional<Tensor>& bias) {
  const Group group = make_group(shapes);
  const int64_t tasks = check_transform(group, shapes, R, G, L, bias);
  const torch::stable::accelerator::DeviceGuard guard(G.get_device_index());
  const Input in_R(R), in_G(G), in_L(L), in_bias(bias);
  const Tensor Y = new_tensor(G, {tasks, group.G});
  const auto schedule = schedule_of(shapes, group, {Order::forward, tasks, static_cast<int64_t>(G.element_size())});
  with_type(G, [&](auto zero) {
    using T = decltype(zero);
    Data<T> data{};
    data[kR] = in_R.rows<T>();
    data[kG] = in_G.rows<T>();
    data[kL] = in_L.rows<T>();
    data[kBias] = in_bias.rows<T>();
    data[kY] = output<T>(Y);
    run<forward_kernel<T>>("transform", *schedule, G, data);
  });
  return Y;
}

}  // namespace kfo::cuda

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CUDA, m) { m.impl("transform", TORCH_BOX(&kfo::cuda::transform_cuda)); }

#include <tuple>

#include "orders.h"
#include "transform_double_backward.cuh"

namespace kfo::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor> transform_double_backward_cuda(
    const Tensor& R, const Tensor& G, const Tensor& L, const Tensor& dY, const std::optional<Tensor>& ddR,
    const std::optional<Tensor>& ddG, const std::optional<Tensor>& ddL, const std::vector<int64_t>& shapes,
    const std::vector<bool>& need) {
  const Group group = make_group(shapes);
  const int64_t tasks = check_transform_double_backward(group, shapes, R, G, L, dY, ddR, ddG, ddL, need);
  const torch::stable::accelerator::DeviceGuard guard(G.get_device_index());
  const Input in_R(R), in_G(G), in_L(L), in_dY(dY), in_ddR(ddR), in_ddG(ddG), in_ddL(ddL);
  const Tensor dR = new_output(G, need[0], {R.size(0), group.R});
  const Tensor dG = new_output(G, need[1], {tasks, group.G});
  const Tensor dL = new_output(G, need[2], {L.size(0), group.L});
  const Tensor ddY = new_output(G, need[3], {tasks, group.G});
  Request request{Order::double_backward, tasks, static_cast<int64_t>(G.element_size()), dR.size(0), dL.size(0)};
  request.need_G = need[1];
  request.need_Y = need[3];
  request.has_R = ddR.has_value();
  request.has_G = ddG.has_value();
  request.has_L = ddL.has_value();
  const auto schedule = schedule_of(shapes, group, request);
  with_type(G, [&](auto zero) {
    using T = decltype(zero);
    Data<T> data{};
    data[kR] = in_R.rows<T>();
    data[kG] = in_G.rows<T>();
    data[kL] = in_L.rows<T>();
    data[kdY] = in_dY.rows<T>();
    data[kddR] = in_ddR.rows<T>();
    data[kddG] = in_ddG.rows<T>();
    data[kddL] = in_ddL.rows<T>();
    data[kdR] = output<T>(dR);
    data[kdG] = output<T>(dG);
    data[kdL] = output<T>(dL);
    data[kddY] = output<T>(ddY);
    run<double_backward_kernel<T>>("transform_double_backward", *schedule, G, data);
  });
  return {dR, dG, dL, ddY};
}

}  // namespace kfo::cuda

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CUDA, m) {
  m.impl("transform_double_backward", TORCH_BOX(&kfo::cuda::transform_double_backward_cuda));
}

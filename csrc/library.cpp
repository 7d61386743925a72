// The schemas of the ops; each library of kernels adds its implementations under its dispatch key.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(kfo_ext, m) {
  m.def("transform(Tensor R, Tensor G, Tensor L, int[] shapes, Tensor? bias=None) -> Tensor");
  m.def(
      "transform_backward(Tensor R, Tensor G, Tensor L, Tensor dY, int[] shapes, bool[] need)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "transform_double_backward(Tensor R, Tensor G, Tensor L, Tensor dY, Tensor? ddR, Tensor? ddG, Tensor? ddL,"
      " int[] shapes, bool[] need) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("conv2d(Tensor x, Tensor weight, int stride, int padding) -> Tensor");
  m.def("conv2d_input(Tensor dy, Tensor weight, int[] size, int stride, int padding) -> Tensor");
  m.def("conv2d_weight(Tensor x, Tensor dy, int[] kernel_size, int stride, int padding) -> Tensor");
  m.def("batch_norm_relu(Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_relu_backward(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor dy, bool relu,"
      " bool[] need) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_relu_double_backward(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor dy,"
      " Tensor? ddx, Tensor? ddweight, Tensor? ddbias, bool relu, bool[] need) -> (Tensor, Tensor, Tensor)");
}

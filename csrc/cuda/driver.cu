// The versions of CUDA that decide whether this library runs, asked of the driver without initialising it.
#include <cuda_runtime_api.h>

// driver: the latest version that the driver supports, 0 without one; runtime: that of this library. As 13000 for 13.0.
extern "C" __attribute__((visibility("default"))) void kfo_cuda_versions(int* driver, int* runtime) {
  *runtime = CUDART_VERSION;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}

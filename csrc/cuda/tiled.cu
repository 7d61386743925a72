#include "orders.h"
#include "tiled.cuh"

namespace kfo::cuda {

template <typename T>
void launch_tiles(const Launcher& launcher, const TiledLaunch& part, const Data<T>& data) {
  launcher.launch<tiled_kernel<T>>(part.blocks, kTiledShared * sizeof(T), Arguments<T, TiledTable>{part.table, data});
}

template void launch_tiles(const Launcher&, const TiledLaunch&, const Data<float>&);
template void launch_tiles(const Launcher&, const TiledLaunch&, const Data<double>&);

}  // namespace kfo::cuda

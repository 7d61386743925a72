#include "build_info.h"

namespace kfo {

const BuildInfo kBuildInfo = {
    KFO_BUILD_ID, KFO_VERSION, KFO_COMPILER, KFO_NVCC, KFO_ARCHITECTURES, KFO_INSTRUCTION_SETS, KFO_TORCH,
};

}  // namespace kfo

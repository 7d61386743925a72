// What this build was made from and with.
#pragma once

namespace kfo {

struct BuildInfo {
  const char* id;
  const char* version;
  const char* compiler;
  const char* nvcc;           // empty: built without CUDA
  const char* architectures;  // space-separated, as nvcc names them
  const char* instruction_sets;
  const char* torch;
};

extern const BuildInfo kBuildInfo;

}  // namespace kfo

extern "C" __attribute__((visibility("default"))) const char* kfo_cuda_build_id() { return KFO_BUILD_ID; }

extern "C" __attribute__((visibility("default"))) const char* kfo_cpu_build_id() { return KFO_BUILD_ID; }

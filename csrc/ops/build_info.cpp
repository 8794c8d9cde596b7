// How this library was built, for the loader and `prfl-fast doctor`.
extern "C" __attribute__((visibility("default"))) const char* prfl_fast_build_info() { return PRFL_BUILD_INFO; }

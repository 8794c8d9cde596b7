#include "common/stream.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace prfl {
namespace {

using StreamGetter = int32_t (*)(int32_t, void**);

// torch loads libtorch_cuda.so with RTLD_LOCAL, so a weak symbol of it is never bound: ask the loaded library itself.
StreamGetter find_stream_getter() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr
             ? nullptr
             : reinterpret_cast<StreamGetter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

void* current_cuda_stream(int32_t device) {
  static const StreamGetter get = find_stream_getter();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) {
    throw std::runtime_error("prfl_fast: torch's current CUDA stream cannot be found; is this a CUDA build of torch?");
  }
  return stream;
}

DeviceScope::DeviceScope(int32_t device) {
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  previous_ = current;
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) static_cast<void>(cudaSetDevice(previous_));
}

}  // namespace prfl

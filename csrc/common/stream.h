// CUDA without linking against a CUDA build of torch: the library also has to load where there is none.
#pragma once

#include <cstdint>

namespace prfl {

// torch's current stream of a device, as a cudaStream_t.
void* current_cuda_stream(int32_t device);

// Makes a device current for the calling thread, and the one before again when it goes.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace prfl

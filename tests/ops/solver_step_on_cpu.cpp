// The CUDA source of the solver step in the place of its CPU code: each call is copied to the runner's device memory,
// launched under several orders of threads, and copied back.
#include <cstdio>
#include <memory>

#include "cuda_on_cpu.h"
#include "ops/solver_step/launch.h"
#include "ops/solver_step/variants.cuh"

namespace prfl::solver_step {
namespace {

using cuda_on_cpu::Buffer;
using cuda_on_cpu::Counters;
using cuda_on_cpu::Error;
using Bytes = Buffer<unsigned char>;

constexpr uint64_t kSeeds = 4;

// Of the latest call, and how many there have been.
Counters traffic;
uint64_t calls = 0;

struct Launcher {
  uint64_t seed;
  Counters* counters;

  template <typename T, int kRows, bool kTransposed>
  void launch(const LinearMap& map, unsigned blocks) const {
    *counters = cuda_on_cpu::launch({blocks, kThreads, 0, seed}, [&] { solver_step_kernel<T, kRows, kTransposed>(map); });
  }
};

size_t size_of(Scalar scalar) { return scalar == Scalar::f64 ? 8 : scalar == Scalar::f32 ? 4 : 2; }

class Device {
 public:
  explicit Device(const LinearMap& host) : map_(host) {
    for (int t = 0; t < host.terms; ++t) map_.term[t].data = upload("term " + std::to_string(t), host.term[t]);
    map_.second.data = upload("second", host.second);
    if (host.mask.data != nullptr) {
      size_t bytes = 1;
      for (int d = 0; d < host.mask.dims; ++d) bytes += (host.mask.size[d] - 1) * host.mask.stride[d];
      map_.mask.data = copy("mask", host.mask.data, bytes);
    }
    for (int r = 0; r < host.rows; ++r) map_.row[r].data = reserve("row " + std::to_string(r), host.row[r]);
    map_.extra.data = reserve("extra", host.extra);
  }

  // Every order has to store the same bits.
  void run(Scalar state, bool transposed, uint64_t seed) {
    for (auto& target : targets_) target.buffer->poison();
    const Launcher launcher{seed, &traffic};
    transposed ? launch_rows<true>(map_, state, launcher) : launch_rows<false>(map_, state, launcher);
    for (auto& target : targets_) {
      const size_t bytes = target.buffer->size();
      if (seed > 0 && std::memcmp(target.host, target.buffer->host(), bytes) != 0) {
        throw Error("another order of threads, another result: seed " + std::to_string(seed));
      }
      std::memcpy(target.host, target.buffer->host(), bytes);
    }
  }

 private:
  struct Copied {
    std::unique_ptr<Bytes> buffer;
    void* host;
  };

  // As far from an aligned address as the original is: the kernel looks at that.
  static std::unique_ptr<Bytes> place(const std::string& name, const void* host, size_t bytes) {
    return std::make_unique<Bytes>(name, bytes, reinterpret_cast<uintptr_t>(host) % 64);
  }
  const unsigned char* copy(const std::string& name, const void* host, size_t bytes) {
    sources_.push_back(place(name, host, bytes));
    std::memcpy(sources_.back()->host(), host, bytes);
    return sources_.back()->device();
  }
  const void* upload(const std::string& name, const Source& source) {
    return source.data == nullptr ? nullptr : copy(name, source.data, map_.length * size_of(source.scalar));
  }
  void* reserve(const std::string& name, const Target& target) {
    if (target.data == nullptr) return nullptr;
    targets_.push_back({place(name, target.data, map_.length * size_of(target.scalar)), target.data});
    return targets_.back().buffer->device();
  }

  LinearMap map_;
  std::vector<std::unique_ptr<Bytes>> sources_;
  std::vector<Copied> targets_;
};

}  // namespace

// register.cpp hands out ranges of elements; whoever has the first runs the whole launch.
void run_cpu(const LinearMap& map, Scalar state, bool transposed, int64_t start, int64_t) {
  if (start != 0) return;
  ++calls;
  try {
    Device device(map);
    for (uint64_t seed = 0; seed < kSeeds; ++seed) device.run(state, transposed, seed);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());  // torch passes on that there was an error, and not which
    throw;
  }
}

}  // namespace prfl::solver_step

// Calls so far; of the latest one bytes loaded, bytes stored, sectors loaded, sectors stored.
extern "C" __attribute__((visibility("default"))) void solver_step_traffic(uint64_t* into) {
  using prfl::solver_step::traffic;
  const uint64_t all[] = {prfl::solver_step::calls, traffic.loaded, traffic.stored, traffic.load_sectors,
                          traffic.store_sectors};
  std::copy(std::begin(all), std::end(all), into);
}

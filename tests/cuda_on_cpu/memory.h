// Device memory. A device address is a number in a range that the process may not touch: only the accessors of access.h
// turn it into bytes, so an access that goes around them faults, and one that goes through them is checked to the byte.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "race.h"
#include "report.h"

namespace cuda_on_cpu {

enum class Space { global, shared };

constexpr const char* name(Space space) { return space == Space::global ? "global" : "shared"; }

// NaN in every floating-point type, -1 in every signed integer type.
constexpr unsigned char kPoison = 0xFF;

class Region {
 public:
  // `misaligned`: bytes between an address that is aligned as an allocation is and the first byte.
  Region(std::string name, Space space, size_t bytes, size_t misaligned = 0)
      : name(std::move(name)), space(space), bytes(bytes), shadow(bytes), host_(bytes) {
    reserved_ = 2 * kGuard + (misaligned + bytes + kPage - 1) / kPage * kPage;
    start_ = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start_ == MAP_FAILED) throw std::bad_alloc();
    address = reinterpret_cast<uintptr_t>(start_) + kGuard + misaligned;
    all()[reinterpret_cast<uintptr_t>(start_)] = this;
    poison();
  }
  ~Region() {
    all().erase(reinterpret_cast<uintptr_t>(start_));
    munmap(start_, reserved_);
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // The region, guards included, that an address lies in; null: none.
  static Region* find(uintptr_t address) {
    auto next = all().upper_bound(address);
    if (next == all().begin()) return nullptr;
    Region* region = std::prev(next)->second;
    return address - reinterpret_cast<uintptr_t>(region->start_) < region->reserved_ ? region : nullptr;
  }

  // "byte 12 of global 'x' (400 bytes)"
  std::string place(uintptr_t at) const {
    const auto offset = static_cast<int64_t>(at - address);
    return "byte " + std::to_string(offset) + " of " + cuda_on_cpu::name(space) + " '" + name + "' (" +
           std::to_string(bytes) + " bytes)";
  }

  void poison() { std::memset(host_.data(), kPoison, bytes); }
  unsigned char* host() { return host_.data(); }

  const std::string name;
  const Space space;
  const size_t bytes;
  uintptr_t address;
  Shadow shadow;

 private:
  static constexpr size_t kPage = 4 << 10, kGuard = 64 << 10;

  static std::map<uintptr_t, Region*>& all() {
    static std::map<uintptr_t, Region*> regions;
    return regions;
  }

  std::vector<unsigned char> host_;
  void* start_;
  size_t reserved_;
};

// A named array in global memory, poisoned until the host writes it.
template <typename T>
class Buffer {
 public:
  Buffer(const std::string& name, size_t count, size_t misaligned = 0)
      : region_(name, Space::global, count * sizeof(T), misaligned) {}
  Buffer(const std::string& name, const std::vector<T>& values, size_t misaligned = 0)
      : Buffer(name, values.size(), misaligned) {
    std::memcpy(region_.host(), values.data(), region_.bytes);
  }

  T* device() { return reinterpret_cast<T*>(region_.address); }
  T* host() { return reinterpret_cast<T*>(region_.host()); }
  size_t size() const { return region_.bytes / sizeof(T); }
  T& operator[](size_t i) { return host()[i]; }
  void poison() { region_.poison(); }

 private:
  Region region_;
};

}  // namespace cuda_on_cpu

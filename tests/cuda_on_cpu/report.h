// What a finding is made of: the error, the place in the source, and names of threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_on_cpu {

// Something that a GPU would do wrong, or that is undefined there. Thrown out of launch().
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The line of the kernel that calls; as a default argument, `Site site = Site::here()`.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
  }
};

// "0-31, 40, 42": numbers in ascending order.
inline std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (last > i) text += "-" + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

inline std::string ranges(uint32_t bits) {
  std::vector<unsigned> numbers;
  for (unsigned i = 0; i < 32; ++i) {
    if (bits >> i & 1u) numbers.push_back(i);
  }
  return ranges(numbers);
}

}  // namespace cuda_on_cpu

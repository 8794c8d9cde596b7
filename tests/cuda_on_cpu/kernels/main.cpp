// main CASE...: runs each case under several seeds; one line per case, "ok ..." or "error ...".
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>

#include "cuda_on_cpu.h"
#include "kernels/correct.cuh"
#include "kernels/defects.cuh"
#include "kernels/matrix.cuh"

namespace {

using namespace cuda_on_cpu;
using Case = std::function<Counters(uint64_t seed)>;

constexpr uint64_t kSeeds = 6;

float uniform(Random& random) { return static_cast<float>(random.next() >> 40) / (1 << 23) - 1.0f; }

template <typename T = float>
std::vector<T> random_values(size_t count, uint64_t seed) {
  Random random(seed + 1000);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(uniform(random));
  return values;
}

// |mine - exact| <= bound, for numbers only.
void expect(const char* what, size_t i, double mine, double exact, double bound = 0.0) {
  if (!(std::fabs(mine - exact) <= bound)) {
    throw Error(std::string("wrong result: ") + what + "[" + std::to_string(i) + "] is " + std::to_string(mine) +
                ", expected " + std::to_string(exact));
  }
}

Counters block_sum(uint64_t seed) {
  constexpr int length = 1000, blocks = 8;
  const auto values = random_values(length, seed);
  Buffer<float> from("from", values), to("to", blocks);
  const Counters counters =
      launch({blocks, kernels::kThreads, 0, seed}, [&] { kernels::block_sum(from.device(), to.device(), length); });
  for (int b = 0; b < blocks; ++b) {
    double sum = 0.0;
    for (int i = b * kernels::kThreads; i < std::min(length, (b + 1) * kernels::kThreads); ++i) sum += values[i];
    // 7 additions deep, each of at most 128 in size, rounded to half an eps.
    expect("sum", b, to[b], sum, 7 * 128 * 0x1p-24);
  }
  return counters;
}

Counters warp_sums(uint64_t seed) {
  constexpr int length = 3 * 96;
  Counters counters;
  for (int width : {32, 16, 4, 1}) {
    std::vector<double> values(length);
    Random random(seed);
    for (double& value : values) value = static_cast<double>(random.below(1 << 20));  // sums are exact
    Buffer<double> from("from", values), by_xor("xor", length), by_down("down", length), by_up("up", length);
    counters = launch({3, 96, 0, seed}, [&] {
      kernels::warp_sums(from.device(), by_xor.device(), by_down.device(), by_up.device(), width);
    });
    for (int i = 0; i < length; ++i) {
      const int first = i / width * width;
      double sum = 0.0, prefix = 0.0;
      for (int j = first; j < first + width; ++j) sum += values[j];
      for (int j = first; j <= i; ++j) prefix += values[j];
      expect("xor", i, by_xor[i], sum);
      expect("down", i, by_down[i], sum);
      expect("up", i, by_up[i], prefix);
    }
  }
  return counters;
}

Counters transposition(uint64_t seed) {
  constexpr int rows = 67, columns = 101;
  const auto values = random_values(rows * columns, seed);
  Buffer<float> from("from", values), to("to", values.size());
  const Counters counters = launch({dim3((columns + 31) / 32, (rows + 31) / 32), dim3(32, 8), 0, seed},
                                   [&] { kernels::transposition(from.device(), to.device(), rows, columns); });
  for (int i = 0; i < rows * columns; ++i) expect("to", i, to[i], values[i % rows * columns + i / rows]);
  return counters;
}

Counters row_norm(uint64_t seed) {
  constexpr int rows = 64, channels = 5120;
  const auto values = random_values(rows * channels, seed);
  Buffer<float> from("from", values), to("to", values.size());
  const Counters counters = launch(
      {rows, 256, 0, seed}, [&] { kernels::row_norm(from.device(), to.device(), channels, 1e-6f); });
  for (int r = 0; r < rows; ++r) {
    double sum = 0.0;
    for (int i = 0; i < channels; ++i) sum += static_cast<double>(values[r * channels + i]) * values[r * channels + i];
    const double scale = 1.0 / std::sqrt(sum / channels + 1e-6);
    for (int i = r * channels; i < (r + 1) * channels; ++i) {
      // A sum of positive terms: each of a thread's 20 products and additions and of 10 shuffles rounds by half an eps,
      // which the root halves; mean, eps, root and product add one each. Values are below 2 after the norm.
      expect("to", i, to[i], values[i] * scale, 2 * (50 / 2 + 4) * 0x1p-24);
    }
  }
  return counters;
}

Counters histogram(uint64_t seed) {
  constexpr int length = 777;
  Random random(seed);
  std::vector<int> values(length), expected(16);
  for (int& value : values) ++expected[value = static_cast<int>(random.below(16))];
  Buffer<int> from("values", values);
  Buffer<unsigned> counts("counts", std::vector<unsigned>(16, 0));
  const Counters counters =
      launch({7, 128, 0, seed}, [&] { kernels::histogram(from.device(), counts.device(), length); });
  for (int i = 0; i < 16; ++i) expect("counts", i, counts[i], expected[i]);
  return counters;
}

Counters half_warps(uint64_t seed) {
  std::vector<int> values(32);
  std::iota(values.begin(), values.end(), 100);
  Buffer<int> from("from", values), to("to", 32);
  const Counters counters = launch({1, 32, 0, seed}, [&] { kernels::half_warps(from.device(), to.device()); });
  for (int i = 0; i < 32; ++i) expect("to", i, to[i], i < 16 ? values[i] + 2 : values[i ^ 15] + 3);
  return counters;
}

Counters word_of_two_halves(uint64_t seed) {
  Buffer<int> from("from", std::vector<int>(1, 41)), to("to", 32);
  const Counters counters = launch({1, 32, 0, seed}, [&] { kernels::word_of_two_halves(from.device(), to.device()); });
  for (int i = 0; i < 32; ++i) expect("to", i, to[i], 42);
  return counters;
}

Counters prefix_sum(uint64_t seed) {
  constexpr int length = 200;
  std::vector<int> values(length);
  std::iota(values.begin(), values.end(), -50);
  Buffer<int> from("from", values), to("to", length);
  const Counters counters = launch(
      {1, length, 2 * length * sizeof(int), seed}, [&] { kernels::prefix_sum(from.device(), to.device()); });
  int sum = 0;
  for (int i = 0; i < length; ++i) expect("to", i, to[i], sum += values[i]);
  return counters;
}

Counters numbers(uint64_t seed) {
  Buffer<unsigned> to("to", 2 * 3 * 4 * 5 * 6 * 7);
  const Counters counters = launch({dim3(2, 3, 4), dim3(5, 6, 7), 0, seed}, [&] { kernels::numbers(to.device()); });
  for (size_t i = 0; i < to.size(); ++i) expect("to", i, to[i], static_cast<double>(i));
  return counters;
}

Counters votes(uint64_t seed) {
  std::vector<int> values(40);
  for (size_t i = 0; i < values.size(); ++i) values[i] = i % 3 == 0 || i >= 32;
  Buffer<int> from("from", values), to("to", values.size());
  const Counters counters = launch({1, 64, 0, seed}, [&] { kernels::votes(from.device(), to.device(), 40); });
  for (int i = 0; i < 40; ++i) expect("to", i, to[i], i < 32 ? 1 | 11 << 2 : 3 | 8 << 2);
  return counters;
}

Counters strided(uint64_t seed) {
  Buffer<int> to("to", 96 * 32);
  const Counters counters = launch({1, 96, 0, seed}, [&] { kernels::strided(to.device()); });
  for (int i = 0; i < 96 * 32; ++i) expect("to", i, to[i], i % 32 == 0 ? i / 32 : -1);
  return counters;
}

Counters wide(uint64_t seed) {
  std::vector<kernels::Wide> values(64);
  for (int i = 0; i < 64; ++i) values[i] = {{1.0 * i, 2.0 * i, 3.0 * i, 4.0}};
  Buffer<kernels::Wide> from("from", values);
  Buffer<double> to("to", 64);
  const Counters counters = launch({1, 64, 0, seed}, [&] { kernels::wide(from.device(), to.device()); });
  for (int i = 0; i < 64; ++i) expect("to", i, to[i], 6.0 * i + 4.0);
  return counters;
}

// Small integers: exact in every order. All of c is compared, for k of one to four stages.
template <typename E, bool kByRows, kernels::Defect kDefect = kernels::Defect::none>
Counters matrix_product(uint64_t seed) {
  Counters counters;
  for (int k : {16, 32, 64}) {
    Random random(seed + k);
    std::vector<E> a(16 * k), b(16 * k);
    std::vector<double> exact(256);
    for (auto* values : {&a, &b}) {
      for (E& value : *values) value = prfl::narrow<E>(static_cast<float>(random.below(17)) - 8.0f);
    }
    for (int i = 0; i < 256; ++i) {
      for (int j = 0; j < k; ++j) {
        exact[i] += prfl::widen(a[i / 16 * k + j]) * prfl::widen(b[kByRows ? j * 16 + i % 16 : i % 16 * k + j]);
      }
    }
    Buffer<E> from_a("a", a), from_b("b", b);
    Buffer<float> to("c", 256);
    counters = launch({1, 32, 0, seed}, [&] {
      kernels::matrix_product<E, kByRows, kDefect>(from_a.device(), from_b.device(), to.device(), k);
    });
    for (int i = 0; i < 256; ++i) expect("c", i, to[i], exact[i]);
  }
  return counters;
}

Counters short_copies(uint64_t seed) {
  const auto values = random_values(71, seed);
  Buffer<float> from("from", values), to("to", 128);
  const Counters counters = launch({1, 32, 0, seed}, [&] { kernels::short_copies(from.device(), to.device(), 71); });
  for (int i = 0; i < 128; ++i) expect("to", i, to[i], i < 71 ? values[i] : 0.0f);
  return counters;
}

// 64 floats and three bytes: the next float ends one byte too far.
Counters one_byte_too_far(uint64_t seed) {
  Buffer<unsigned char> from("from", 64 * sizeof(float) + 3);
  Buffer<float> to("to", 64);
  return launch({1, 64, 0, seed}, [&] {
    kernels::reads_one_too_far(reinterpret_cast<const float*>(from.device()), to.device());
  });
}

// A launch of a kernel with a defect; what it stores must be numbers.
template <typename Kernel>
Case defect(Kernel kernel, dim3 grid = 1, dim3 block = 64, size_t to_length = 64) {
  return [=](uint64_t seed) {
    Buffer<float> from("from", random_values(64, seed)), to("to", to_length);
    const Counters counters = launch({grid, block, 0, seed}, [&] { kernel(from.device(), to.device()); });
    for (size_t i = 0; i < to.size(); ++i) {
      if (std::isnan(to[i])) throw Error("not a number: to[" + std::to_string(i) + "]");
    }
    return counters;
  };
}

#define CASE(name) {#name, name}
#define DEFECT(name, ...) {#name, defect(kernels::name, ##__VA_ARGS__)}

const std::map<std::string, Case> cases = {
    CASE(block_sum), CASE(warp_sums), CASE(transposition), CASE(row_norm), CASE(histogram),
    CASE(half_warps), CASE(prefix_sum), CASE(numbers), CASE(votes), CASE(strided),
    CASE(wide), CASE(word_of_two_halves), DEFECT(one_half_waited_for, 1, 32, 32),
    DEFECT(no_syncthreads), DEFECT(no_syncwarp, 1, 32, 32), DEFECT(shuffle_for_syncwarp, 1, 32, 32),
    DEFECT(syncwarp_of_half, 1, 32, 32), DEFECT(syncwarp_for_syncthreads), DEFECT(write_after_read, 1, 32, 32),
    DEFECT(branch_around_barrier), DEFECT(barrier_in_both_branches), DEFECT(syncwarp_in_branch),
    DEFECT(reads_one_too_far), DEFECT(reads_one_too_early), DEFECT(writes_one_too_far),
    CASE(one_byte_too_far), DEFECT(shared_out_of_bounds), DEFECT(uninitialised),
    DEFECT(left_by_another_block, 2, 64, 128), DEFECT(misaligned), DEFECT(blocks_write_one_place, 2),
    DEFECT(blocks_read_and_write, 2, 64, 128), DEFECT(atomic_and_plain, 1, 64, 1), DEFECT(shuffle_from_inactive),
    DEFECT(shuffle_from_exited, 1, 32, 32), DEFECT(shuffle_in_branch), DEFECT(mask_without_itself),
    CASE(short_copies),
    {"product_f16", matrix_product<prfl::Half, false>},
    {"product_bf16", matrix_product<prfl::BFloat16, false>},
    {"product_by_rows", matrix_product<prfl::BFloat16, true>},
    {"product_no_wait", matrix_product<prfl::BFloat16, false, kernels::Defect::no_wait>},
    {"product_early_read", matrix_product<prfl::BFloat16, false, kernels::Defect::early_read>},
    {"product_no_syncwarp", matrix_product<prfl::BFloat16, false, kernels::Defect::no_syncwarp>},
    {"product_no_syncwarp_after", matrix_product<prfl::BFloat16, false, kernels::Defect::no_syncwarp_after>},
    {"product_half_a_warp", matrix_product<prfl::BFloat16, false, kernels::Defect::half_a_warp>},
    DEFECT(plain_access), DEFECT(wrong_space), DEFECT(no_dynamic_shared), DEFECT(recursion_without_end),
};

}  // namespace

int main(int count, char** arguments) {
  for (int a = 1; a < count; ++a) {
    const auto found = cases.find(arguments[a]);
    if (found == cases.end()) return 2;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
      const auto start = std::chrono::steady_clock::now();
      try {
        const Counters c = found->second(seed);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        std::printf("%s %d ok %.4f %lu %lu %lu %lu %lu\n", arguments[a], static_cast<int>(seed), took.count(), c.loaded,
                    c.stored, c.atomic, c.load_sectors, c.store_sectors);
      } catch (const Error& error) {
        std::printf("%s %d error %s\n", arguments[a], static_cast<int>(seed), error.what());
      }
    }
  }
  return 0;
}

// prfl_fast::solver_step and prfl_fast::solver_step_transpose for torch; schemas stand in prfl_fast/ops/solver_step.
#include <optional>
#include <vector>

#include "common/tensors.h"
#include "ops/solver_step/launch.h"
#ifdef PRFL_WITH_CUDA
#include "common/stream.h"
#endif

namespace prfl::solver_step {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread of their own

using MaybeTensor = std::optional<Tensor>;

// Collects the tensors of one call; what it had to make contiguous lives as long as it does.
class Call {
 public:
  Call(const std::vector<Tensor>& terms, int64_t rows, const std::vector<double>& coefficients) {
    STD_TORCH_CHECK(!terms.empty() && terms.size() <= kMaxTerms, "solver_step: expected 1 to ", kMaxTerms,
                    " terms, got ", terms.size());
    STD_TORCH_CHECK(rows >= 1 && rows <= kMaxTerms && coefficients.size() == terms.size() * rows,
                    "solver_step: expected 1 to ", kMaxTerms, " rows of ", terms.size(), " coefficients, got ",
                    coefficients.size(), " coefficients");
    map.length = terms[0].numel();
    map.terms = static_cast<int>(terms.size());
    map.rows = static_cast<int>(rows);
    map.guided = -1;
    for (int t = 0; t < map.terms; ++t) {
      map.term[t] = source(terms[t], terms[0]);
      for (int r = 0; r < map.rows; ++r) map.coefficient[t][r] = coefficients[r * map.terms + t];
    }
  }

  Source source(const Tensor& tensor, const Tensor& like) {
    STD_TORCH_CHECK(same_sizes(tensor, like) && tensor.device() == like.device(),
                    "solver_step: expected tensors of one shape on one device");
    kept_.push_back(as_contiguous(tensor));
    return {kept_.back().const_data_ptr(), scalar_of(tensor)};
  }

  Target target(const Tensor& like, Scalar scalar, std::vector<Tensor>& results) {
    results.push_back(empty_of(like, scalar));
    return {results.back().mutable_data_ptr(), scalar};
  }

  void set_mask(const MaybeTensor& given, const Tensor& like) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Bool && same_sizes(*given, like) &&
                        given->device() == like.device(),
                    "solver_step: expected a bool mask of the state's shape, on its device");
    if (map.length == 0) return;
    kept_.push_back(*given);
    if (!collapse(kept_.back())) {
      kept_.back() = torch::stable::contiguous(*given);
      collapse(kept_.back());
    }
    map.mask.data = static_cast<const uint8_t*>(kept_.back().const_data_ptr());
  }

  LinearMap map{};

 private:
  static bool same_sizes(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim()) return false;
    for (int64_t d = 0; d < a.dim(); ++d) {
      if (a.size(d) != b.size(d)) return false;
    }
    return true;
  }

  // Neighbouring dimensions that one stride walks through become one; false when more are left than fit.
  bool collapse(const Tensor& mask) {
    std::vector<int64_t> sizes, strides;  // innermost first
    for (int64_t d = mask.dim() - 1; d >= 0; --d) {
      const int64_t size = mask.size(d), stride = mask.stride(d);
      if (size == 1) continue;
      if (!sizes.empty() && stride == strides.back() * sizes.back()) {
        sizes.back() *= size;
      } else {
        sizes.push_back(size);
        strides.push_back(stride);
      }
    }
    if (sizes.empty()) {
      sizes.push_back(1);
      strides.push_back(1);
    }
    const int dims = static_cast<int>(sizes.size());
    if (dims > kMaxMaskDims) return false;
    map.mask.dims = dims;
    for (int d = 0; d < dims; ++d) {
      map.mask.size[d] = sizes[dims - 1 - d];
      map.mask.stride[d] = strides[dims - 1 - d];
    }
    return true;
  }

  std::vector<Tensor> kept_;
};

void run(LinearMap& map, Scalar state, bool transposed, [[maybe_unused]] const Tensor& like) {
  if (map.length == 0) return;
  map.plain = count_plain(map, state, transposed);
#ifdef PRFL_WITH_CUDA
  if (like.is_cuda()) {
    const int32_t device = like.get_device_index();
    const DeviceScope scope(device);
    return launch_cuda(map, state, transposed, current_cuda_stream(device));
  }
#endif
  torch::stable::parallel_for(0, map.length, kGrain, [&](int64_t start, int64_t stop) {
    run_cpu(map, state, transposed, start, stop);
  });
}

Scalar state_scalar(int64_t number) {
  const Scalar scalar = scalar_of(number);
  STD_TORCH_CHECK(scalar == Scalar::f32 || scalar == Scalar::f64, "solver_step: expected a float32 or float64 state");
  return scalar;
}

void set_guidance(LinearMap& map, Scalar state, double scale, int64_t dtype) {
  map.guidance = scale;
  map.guidance_scalar = scalar_of(dtype);
  STD_TORCH_CHECK(map.guidance_scalar != Scalar::f64 || state == Scalar::f64,
                  "solver_step: guidance_dtype: float64 needs a float64 state");
}

std::vector<Tensor> step(
    std::vector<Tensor> terms,
    MaybeTensor unconditional,
    MaybeTensor mask,
    std::vector<double> coefficients,
    int64_t guided,
    double guidance_scale,
    int64_t guidance_dtype,
    int64_t dtype,
    int64_t copy_dtype) {
  const Scalar state = state_scalar(dtype);
  Call call(terms, terms.empty() ? 0 : static_cast<int64_t>(coefficients.size() / terms.size()), coefficients);
  LinearMap& map = call.map;
  if (unconditional.has_value()) {
    STD_TORCH_CHECK(guided >= 0 && guided < map.terms, "solver_step: guided: no such term: ", guided);
    map.second = call.source(*unconditional, terms[0]);
    map.guided = static_cast<int>(guided);
    set_guidance(map, state, guidance_scale, guidance_dtype);
    STD_TORCH_CHECK(guided > 0 || !mask.has_value(), "solver_step: with a mask, expected x as the first term");
  }
  call.set_mask(mask, terms[0]);
  std::vector<Tensor> results;
  results.reserve(map.rows + 1);
  for (int r = 0; r < map.rows; ++r) map.row[r] = call.target(terms[0], state, results);
  if (copy_dtype >= 0) map.extra = call.target(terms[0], scalar_of(copy_dtype), results);
  run(map, state, false, terms[0]);
  return results;
}

std::vector<Tensor> step_transpose(
    std::vector<Tensor> cotangents,
    MaybeTensor copy_cotangent,
    MaybeTensor mask,
    std::vector<double> coefficients,
    std::vector<int64_t> dtypes,
    int64_t guided,
    double guidance_scale,
    int64_t guidance_dtype,
    int64_t unconditional_dtype) {
  Call call(cotangents, static_cast<int64_t>(dtypes.size()), coefficients);
  const Scalar state = state_scalar(static_cast<int64_t>(scalar_of(cotangents[0])));
  LinearMap& map = call.map;
  if (copy_cotangent.has_value()) map.second = call.source(*copy_cotangent, cotangents[0]);
  call.set_mask(mask, cotangents[0]);
  std::vector<Tensor> results;
  results.reserve(map.rows + 1);
  for (int r = 0; r < map.rows; ++r) map.row[r] = call.target(cotangents[0], scalar_of(dtypes[r]), results);
  if (unconditional_dtype >= 0) {
    STD_TORCH_CHECK(guided >= 0 && guided < map.rows, "solver_step: guided: no such row: ", guided);
    map.extra = call.target(cotangents[0], scalar_of(unconditional_dtype), results);
    map.guided = static_cast<int>(guided);
    set_guidance(map, state, guidance_scale, guidance_dtype);
  }
  run(map, state, true, cotangents[0]);
  return results;
}

}  // namespace
}  // namespace prfl::solver_step

STABLE_TORCH_LIBRARY_IMPL(prfl_fast, CPU, m) {
  m.impl("solver_step", TORCH_BOX(&prfl::solver_step::step));
  m.impl("solver_step_transpose", TORCH_BOX(&prfl::solver_step::step_transpose));
}

#ifdef PRFL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(prfl_fast, CUDA, m) {
  m.impl("solver_step", TORCH_BOX(&prfl::solver_step::step));
  m.impl("solver_step_transpose", TORCH_BOX(&prfl::solver_step::step_transpose));
}
#endif

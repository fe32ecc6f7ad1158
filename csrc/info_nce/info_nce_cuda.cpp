// Registers InfoNCE's two operators for CUDA tensors when copgen_fast._cuda is imported; schemas are in bindings.cpp.
// They fill the tensors they are given; copgen_fast/ops checks shapes.
#include "info_nce_cuda.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>

namespace copgen {

// In info_nce.cu.
cudaError_t start_row_losses(cudaStream_t stream, Plan plan, const Similarity& matrix, int band, float* scratch,
                             float* losses, float* lse, int64_t* nearest, float* nearest_logit);
cudaError_t start_row_gradients(cudaStream_t stream, Plan plan, const Similarity& matrix, const Statistics& stats,
                                float* grad_rows, int grad_d);

namespace {

// Floats for a triangle's column sums, of which each launch fills a band: enough for one launch of 16,384 pairs on a
// card of 4 GB. By the card's memory and not by what is free, as bands decide the order of sums, and so their rounding.
int64_t scratch_floats(const at::Tensor& rows) {
  static thread_local std::array<int64_t, 64> known{};
  int64_t& floats = known[rows.get_device() % known.size()];
  if (floats == 0) {
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, rows.get_device()));
    floats = std::max(int64_t{8} << 20, static_cast<int64_t>(properties.totalGlobalMem / 64 / sizeof(float)));
  }
  return floats;
}

int multiprocessors(const at::Tensor& rows) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, rows.get_device()));
  return count;
}

// Contiguous, aligned vectors [n, d], d a multiple of 8: a copy, filled up by zeros, where they are not.
at::Tensor laid_out(const at::Tensor& vectors, const char* name) {
  TORCH_CHECK(vectors.scalar_type() == at::kHalf, name, ": the CUDA operators take float16, got ",
              vectors.scalar_type());
  const int64_t missing = (8 - vectors.size(1) % 8) % 8;
  const bool aligned = reinterpret_cast<uintptr_t>(vectors.const_data_ptr()) % 16 == 0;
  if (missing > 0) return at::constant_pad_nd(vectors, {0, missing});
  return aligned && vectors.is_contiguous() ? vectors : at::clone(vectors, at::MemoryFormat::Contiguous);
}

// `rows` and `columns` as laid_out gives them.
Similarity similarity(const at::Tensor& rows, const at::Tensor& columns, double temperature, double bound,
                      int64_t offset, int64_t shift, bool exclude_self) {
  Similarity matrix{};
  matrix.rows = static_cast<const uint16_t*>(rows.const_data_ptr());
  matrix.columns = static_cast<const uint16_t*>(columns.const_data_ptr());
  matrix.m = static_cast<int>(rows.size(0));
  matrix.k = static_cast<int>(columns.size(0));
  matrix.d = static_cast<int>(rows.size(1));
  matrix.scale = static_cast<float>(1 / temperature);
  matrix.bound = static_cast<float>(bound);
  matrix.offset = static_cast<int>(offset);
  matrix.shift = static_cast<int>(shift);
  matrix.exclude_self = exclude_self;
  return matrix;
}

template <class T>
T* data(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->data_ptr<T>() : nullptr;
}

// These signatures must equal those of the CPU's functions, or PyTorch aborts.

void row_losses(const at::Tensor& rows, const std::optional<at::Tensor>& columns, double temperature, double bound,
                int64_t offset, int64_t shift, bool exclude_self, at::Tensor losses, at::Tensor lse,
                std::optional<at::Tensor> nearest, std::optional<at::Tensor> nearest_logit) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor x = laid_out(rows, "rows"), y = columns ? laid_out(*columns, "columns") : x;
  const Similarity matrix = similarity(x, y, temperature, bound, offset, shift, exclude_self);
  const Plan plan = choose_losses_plan(matrix, multiprocessors(rows), !columns, nearest.has_value());
  const int band = triangle_band(matrix.m, scratch_floats(rows));
  at::Tensor scratch;
  if (plan == Plan::kTriangle) scratch = at::empty({triangle_scratch(matrix.m, band)}, losses.options());
  C10_CUDA_CHECK(start_row_losses(c10::cuda::getCurrentCUDAStream(), plan, matrix, band,
                                  scratch.defined() ? scratch.data_ptr<float>() : nullptr, losses.data_ptr<float>(),
                                  lse.data_ptr<float>(), data<int64_t>(nearest), data<float>(nearest_logit)));
}

void row_gradients(const at::Tensor& rows, const std::optional<at::Tensor>& columns, double temperature, double bound,
                   const std::optional<at::Tensor>& row_lse, const std::optional<at::Tensor>& row_grad,
                   const std::optional<at::Tensor>& column_lse, const std::optional<at::Tensor>& column_grad,
                   int64_t offset, int64_t shift, bool exclude_self, at::Tensor grad_rows) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor x = laid_out(rows, "rows"), y = columns ? laid_out(*columns, "columns") : x;
  const Similarity matrix = similarity(x, y, temperature, bound, offset, shift, exclude_self);
  Statistics stats{data<float>(row_lse), data<float>(row_grad), data<float>(column_lse), data<float>(column_grad)};
  if (!columns) stats.column_lse = stats.row_lse, stats.column_grad = stats.row_grad;
  const Plan plan = choose_gradients_plan(matrix, multiprocessors(rows));
  C10_CUDA_CHECK(start_row_gradients(c10::cuda::getCurrentCUDAStream(), plan, matrix, stats,
                                     grad_rows.data_ptr<float>(), static_cast<int>(rows.size(1))));
}

}  // namespace
}  // namespace copgen

TORCH_LIBRARY_IMPL(copgen_fast_cpp, CUDA, m) {
  m.impl("row_losses", &copgen::row_losses);
  m.impl("row_gradients", &copgen::row_gradients);
}

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

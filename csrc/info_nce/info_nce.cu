// Launches InfoNCE's CUDA kernels; without PyTorch's headers, which make nvcc several times slower.
#include <type_traits>

#include "info_nce_plan.cuh"

namespace copgen {
namespace {

struct Launch {
  cudaStream_t stream;
  template <class... Parameters>
  void operator()(void (*kernel)(Parameters...), int x, int y, int threads,
                  std::common_type_t<Parameters>... arguments) const {
    kernel<<<dim3(x, y), threads, 0, stream>>>(arguments...);
  }
};

}  // namespace

cudaError_t start_row_losses(cudaStream_t stream, Plan plan, const Similarity& matrix, int band, float* scratch,
                             float* losses, float* lse, int64_t* nearest, float* nearest_logit) {
  launch_losses(Launch{stream}, plan, matrix, band, scratch, losses, lse, nearest, nearest_logit);
  return cudaGetLastError();
}

cudaError_t start_row_gradients(cudaStream_t stream, Plan plan, const Similarity& matrix, const Statistics& stats,
                                float* grad_rows, int grad_d) {
  launch_gradients(Launch{stream}, plan, matrix, stats, grad_rows, grad_d);
  return cudaGetLastError();
}

}  // namespace copgen

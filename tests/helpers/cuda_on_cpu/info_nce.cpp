// InfoNCE's CUDA kernels on the CPU, for ctypes; functions return zero for success. `plan` is a Plan of
// csrc/info_nce/info_nce_cuda.h.
#include "info_nce_plan.cuh"

using namespace copgen;

namespace {

struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int x, int y, int threads, Arguments... arguments) const {
    on_cpu::launch(kernel, x, y, threads, arguments...);
  }
};

template <class Run>
int guarded(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

// Reads shared memory before it writes it.
void unwritten_kernel(float* values) {
  __shared__ float shared[1];
  if (threadIdx.x) return;
  values[blockIdx.x] = shared[0];
  shared[0] = 1;
}

}  // namespace

extern "C" {

void unwritten(float* values, int blocks) { on_cpu::launch(unwritten_kernel, blocks, 1, 32, values); }

// The order of the warps, on which results depend where a barrier is missing: 0, 1 backwards, else a random one's seed.
void run_in_order(unsigned order) {
  on_cpu::machine.order = order;
  on_cpu::machine.random.seed(order);
}

int row_losses(int plan, Similarity matrix, int band, float* scratch, float* losses, float* lse, int64_t* nearest,
               float* nearest_logit) {
  return guarded([=] {
    launch_losses(Launch(), static_cast<Plan>(plan), matrix, band, scratch, losses, lse, nearest, nearest_logit);
  });
}

int row_gradients(int plan, Similarity matrix, Statistics stats, int grad_d, float* grad_rows) {
  return guarded([=] { launch_gradients(Launch(), static_cast<Plan>(plan), matrix, stats, grad_rows, grad_d); });
}

int choose(Similarity matrix, int multiprocessors, bool square, bool nearest) {
  return static_cast<int>(choose_losses_plan(matrix, multiprocessors, square, nearest));
}

int choose_band(int m, int64_t limit) { return triangle_band(m, limit); }
}

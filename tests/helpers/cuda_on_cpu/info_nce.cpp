// InfoNCE's CUDA kernels on the CPU, for ctypes; functions that launch return a Result. `plan` is a Plan of
// csrc/info_nce/info_nce_cuda.h.
#include "faults.h"
#include "fences.h"
#include "info_nce_launch.h"

using namespace copgen;

namespace {

enum Result { kDone, kThreadsWaitForever, kBeyondATensor };

template <class Run>
int guarded(const Run& run) {
  try {
    return on_cpu::touches_a_fence(run) ? kBeyondATensor : kDone;
  } catch (const std::exception&) {
    return kThreadsWaitForever;
  }
}

}  // namespace

extern "C" {

void* fenced(size_t bytes, bool at_start) { return on_cpu::fenced(bytes, at_start); }

void unfenced(void* memory, size_t bytes) { on_cpu::unfenced(memory, bytes); }

int launch_fault(const char* name, float* values) {
  return guarded([=] { on_cpu::launch_fault(name, values); });
}

// The order of blocks and warps, on which results depend where a barrier is missing: 0, 1 backwards, else a random
// one's seed.
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

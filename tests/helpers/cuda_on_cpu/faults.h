// Kernels with a fault each, for tests of what the emulator notices. They get `values` [blockDim.x].
#pragma once

#include <map>
#include <string>

#include "cuda_fp16.h"

namespace on_cpu {

inline void faultless(float* values) { values[threadIdx.x] += 1; }

inline void reads_beyond(float* values) { values[threadIdx.x] += values[threadIdx.x + 1]; }

inline void writes_before(float* values) { values[static_cast<int>(threadIdx.x) - 1] = 1; }

inline void reads_what_is_unwritten(float* values) {
  __shared__ float shared[1];
  values[threadIdx.x] = shared[0];
}

// Each thread reads what a thread of another warp writes.
inline void lacks_a_barrier(float* values) {
  __shared__ float shared[64];
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = 1;
  values[threadIdx.x] = shared[(threadIdx.x + 32) % 64];
}

inline void waits_alone(float*) {
  if (threadIdx.x) __syncthreads();
}

inline void waits_apart(float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

template <int kSize>
void writes_beyond_shared_memory(float* values) {
  __shared__ float shared[kSize];
  float* volatile start = shared;
  start[threadIdx.x + 1] = 0;
  values[threadIdx.x] = start[threadIdx.x];
}

inline void indexes_beyond_registers(float* values) {
  float registers[2] = {0, 1};
  const unsigned i = static_cast<unsigned>(values[0]) + 2;
  values[threadIdx.x] = registers[i];
}

// Launches the kernel of that name on a block of 64 threads.
inline void launch_fault(const std::string& name, float* values) {
  static const std::map<std::string, void (*)(float*)> kernels{
      {"faultless", faultless},
      {"reads_beyond", reads_beyond},
      {"writes_before", writes_before},
      {"reads_what_is_unwritten", reads_what_is_unwritten},
      {"lacks_a_barrier", lacks_a_barrier},
      {"waits_alone", waits_alone},
      {"waits_apart", waits_apart},
      {"writes_beyond_shared_memory", writes_beyond_shared_memory<64>},
      {"indexes_beyond_registers", indexes_beyond_registers},
  };
  launch(kernels.at(name), 1, 1, 64, values);
}

}  // namespace on_cpu

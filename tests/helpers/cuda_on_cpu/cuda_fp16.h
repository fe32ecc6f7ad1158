// CUDA emulation for tests: replaces CUDA's header of this name, so that a C++ compiler takes csrc/*/*.cuh and one CPU
// thread runs their kernels. Blocks run one after the other, each with shared memory that is NaN at first; a CUDA
// thread is a fiber that runs until it waits for its warp or its block. An access beyond a fenced tensor (fences.h)
// ends the launch; AddressSanitizer takes care of arrays in shared memory, too.
#pragma once

#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // the sanitizer guards no thread-local memory
#else
#define __shared__ static thread_local  // one block at a time; nothing else is in this library's thread-local memory
#endif

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(128 << 10);
  bool started, waiting, done;
  const void* operand;  // of what the warp does together
  void* result;
};

struct Machine {
  std::vector<Fiber> fibers;
  int threads = 0, current = 0, waiting = 0;
  int barrier = 0;                  // the line where threads wait for their block
  bool apart = false;               // they wait at several
  int in_warp[32] = {};             // lanes that wait
  const void* operation[32] = {};   // for what
  unsigned order = 0;               // of blocks and warps: 0 as numbered, 1 backwards, else random, by this seed
  std::mt19937 random;
  jmp_buf scheduler;
  std::function<void()> body;
};
inline Machine machine;

inline void suspend() {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.waiting = true;
  if (!_setjmp(fiber.resume)) _longjmp(machine.scheduler, 1);
}

inline void enter() {
  machine.body();
  machine.fibers[machine.current].done = true;
  _longjmp(machine.scheduler, 1);
}

inline void step(int t) {
  Fiber& fiber = machine.fibers[t];
  machine.current = t;
  threadIdx = {static_cast<unsigned>(t), 0};
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// 0 to count - 1 in the machine's order.
inline std::vector<int> ordered(int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order > 1) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

#ifdef __SANITIZE_ADDRESS__
inline void forget_shared_memory() {}
#else
inline thread_local volatile char anchor;

// Fills the block's shared memory with bytes that make a NaN of every float and half.
inline void forget_shared_memory() {
  static char* start = nullptr;
  static size_t size = 0;
  const auto find = [](dl_phdr_info* info, size_t, void*) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      char* block = static_cast<char*>(info->dlpi_tls_data);
      const size_t bytes = info->dlpi_phdr[i].p_memsz;
      const char* inside = const_cast<const char*>(&anchor);
      if (info->dlpi_phdr[i].p_type != PT_TLS || !block || inside < block || inside >= block + bytes) continue;
      start = block, size = bytes;
    }
    return 0;
  };
  anchor = 1;  // so that the memory is there
  if (!start) dl_iterate_phdr(find, nullptr);
  if (!start) abort();
  memset(start, 0xff, size);
}
#endif

inline void run_block() {
  forget_shared_memory();
  for (int w = 0; w < 32; ++w) machine.in_warp[w] = 0;
  machine.waiting = 0, machine.apart = false;
  for (Fiber& fiber : machine.fibers) fiber.started = fiber.waiting = fiber.done = false;
  for (bool alive = true, progress = false, moved; alive;) {
    alive = false;
    for (const int warp : ordered(machine.threads / 32)) {
      do {
        moved = false;
        for (int t = warp * 32; t < warp * 32 + 32; ++t) {
          alive = alive || !machine.fibers[t].done;
          if (machine.fibers[t].done || machine.fibers[t].waiting) continue;
          step(t);
          moved = true;
        }
        progress = progress || moved;
        // As far as the warp gets without the others or, in a random order, at times not as far.
      } while (moved && (machine.order < 2 || machine.random() % 4));
    }
    if (machine.apart || (alive && !progress)) throw std::runtime_error("threads wait for others that never come");
    progress = false;
  }
}

// Waits for the warp's lanes; the last to come works out all results from all operands.
template <class Operand, class Result, class Work>
void together(const void* name, const Operand& operand, Result& result, const Work& work) {
  const int warp = machine.current / 32;
  machine.fibers[machine.current].operand = &operand;
  machine.fibers[machine.current].result = &result;
  if (machine.in_warp[warp]++ == 0) machine.operation[warp] = name;
  if (machine.operation[warp] != name) abort();  // lanes of a warp do different things
  if (machine.in_warp[warp] < 32) return suspend();
  machine.in_warp[warp] = 0;
  Fiber* lanes = &machine.fibers[warp * 32];
  work([lanes](int l) -> const Operand& { return *static_cast<const Operand*>(lanes[l].operand); },
       [lanes](int l) -> Result& { return *static_cast<Result*>(lanes[l].result); });
  for (int l = 0; l < 32; ++l) lanes[l].waiting = false;
}

inline float to_float(uint32_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int b = 0; b < 1 << 16; ++b) {
      const uint16_t short_bits = static_cast<uint16_t>(b);
      _Float16 half;
      memcpy(&half, &short_bits, 2);
      values[b] = static_cast<float>(half);
    }
    return values;
  }();
  return table[bits & 0xffff];
}

// A grid, block by block. Arguments as a launch takes them.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int x, int y, int threads, Arguments... arguments) {
  machine.threads = threads;
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers.resize(threads);
  machine.body = [=] { kernel(arguments...); };
  blockDim = {static_cast<unsigned>(threads), 1}, gridDim = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
  for (const int block : ordered(x * y)) {
    blockIdx = {static_cast<unsigned>(block % x), static_cast<unsigned>(block / x)};
    run_block();
  }
}

}  // namespace on_cpu

inline void __syncthreads(int line = __builtin_LINE()) {
  on_cpu::Machine& machine = on_cpu::machine;
  if (machine.waiting && machine.barrier != line) machine.apart = true;
  machine.barrier = line;
  if (++machine.waiting < machine.threads) return on_cpu::suspend();
  machine.waiting = 0;
  for (int t = 0; t < machine.threads; ++t) machine.fibers[t].waiting = false;
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int step) {
  static const char name = 0;
  T result;
  on_cpu::together(&name, x, result, [step](auto operand, auto result) {
    for (int l = 0; l < 32; ++l) result(l) = operand(l ^ step);
  });
  return result;
}

namespace copgen {

inline void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  static const char name = 0;
  const uint32_t words[3] = {a0, a1, b};
  on_cpu::together(&name, words, c, [](auto operand, auto result) {
    float left[16][8], right[8][8];
    for (int l = 0; l < 32; ++l) {
      for (int e = 0; e < 2; ++e) {
        left[l / 4][l % 4 * 2 + e] = on_cpu::to_float(operand(l)[0] >> 16 * e);
        left[l / 4 + 8][l % 4 * 2 + e] = on_cpu::to_float(operand(l)[1] >> 16 * e);
        right[l % 4 * 2 + e][l / 4] = on_cpu::to_float(operand(l)[2] >> 16 * e);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int e = 0; e < 4; ++e) {
        float sum = result(l)[e];
        for (int k = 0; k < 8; ++k) sum += left[l / 4 + e / 2 * 8][k] * right[k][l % 4 * 2 + e % 2];
        result(l)[e] = sum;
      }
    }
  });
}

inline void load_transposed(uint32_t (&b)[4], const void* row) {
  static const char name = 0;
  if (reinterpret_cast<uintptr_t>(row) % 16) abort();  // which a GPU takes for a fault
  on_cpu::together(&name, row, b, [](auto operand, auto result) {
    for (int l = 0; l < 32; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto at = [&](int r) -> uint32_t { return static_cast<const uint16_t*>(operand(matrix * 8 + r))[l / 4]; };
        result(l)[matrix] = at(l % 4 * 2) | at(l % 4 * 2 + 1) << 16;
      }
    }
  });
}

inline float power_of_two(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0 : y;
}

inline uint32_t pack(float x, float y) {
  const _Float16 both[2] = {static_cast<_Float16>(x), static_cast<_Float16>(y)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}

}  // namespace copgen

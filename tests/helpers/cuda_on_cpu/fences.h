// Memory amid a gigabyte on both sides that can't be touched, so that an access beyond its end (or before its start, as
// wanted) is noticed: what a GPU would let pass.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace on_cpu {

constexpr size_t kFence = size_t{1} << 30;

inline size_t pages(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

// `bytes` of memory that end where the fence starts or, `at_start`, that start where it ends.
inline void* fenced(size_t bytes, bool at_start) {
  const size_t size = pages(bytes);
  void* all = mmap(nullptr, size + 2 * kFence, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char* inside = static_cast<char*>(all) + kFence;
  if (all == MAP_FAILED || mprotect(inside, size, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  return inside + (at_start ? 0 : size - bytes);
}

inline void unfenced(void* memory, size_t bytes) {
  const uintptr_t page = sysconf(_SC_PAGESIZE), inside = reinterpret_cast<uintptr_t>(memory) / page * page;
  munmap(reinterpret_cast<void*>(inside - kFence), pages(bytes) + 2 * kFence);
}

inline sigjmp_buf beyond;

// Runs a function; returns whether it touched a fence, where it then ended.
template <class Run>
bool touches_a_fence(const Run& run) {
  struct sigaction jump = {}, before[2];
  jump.sa_handler = [](int) { siglongjmp(beyond, 1); };
  sigaction(SIGSEGV, &jump, &before[0]);
  sigaction(SIGBUS, &jump, &before[1]);
  const bool touched = sigsetjmp(beyond, 1);
  if (!touched) run();
  sigaction(SIGSEGV, &before[0], nullptr);
  sigaction(SIGBUS, &before[1], nullptr);
  return touched;
}

}  // namespace on_cpu

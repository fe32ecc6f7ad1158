// How csrc/info_nce/info_nce_plan.cuh launches its kernels on the CPU.
#pragma once

#include "info_nce_plan.cuh"

namespace copgen {

struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int x, int y, int threads, Arguments... arguments) const {
    on_cpu::launch(kernel, x, y, threads, arguments...);
  }
};

}  // namespace copgen

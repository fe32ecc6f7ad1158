// A program for a compiler's sanitizers: InfoNCE's CUDA kernels on the CPU, on random cases, each tensor an allocation
// of its own. `sanitized CASES` ends with 0 where all results are numbers; `sanitized fault NAME` launches a kernel of
// faults.h.
#include <link.h>
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

// Without linkage, as AddressSanitizer guards no static array of a template that has linkage.
namespace {

#include "cuda_fp16.h"
#include "faults.h"
#include "info_nce_launch.h"

using namespace copgen;

std::mt19937 random_bits;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

std::vector<uint16_t> halves(int64_t rows, int d, int filled) {
  std::vector<uint16_t> all(rows * filled);
  std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(d)));
  for (int64_t n = 0; n < rows * d; ++n) all[n / d * filled + n % d] = pack(normal(random_bits), 0) & 0xffff;
  return all;
}

std::vector<float> floats(int64_t count, float low, float high) {
  std::vector<float> all(count);
  for (float& x : all) x = std::uniform_real_distribution<float>(low, high)(random_bits);
  return all;
}

bool written(const std::vector<float>& values) {
  return std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
}

bool run_case() {
  const bool square = between(0, 1);
  const int d = between(1, 150), filled = ceil_div(d, 8) * 8, m = between(2, 100), k = square ? m : between(m, 140);
  const std::vector<uint16_t> rows = halves(m, d, filled), columns = square ? rows : halves(k, d, filled);
  Similarity matrix{rows.data(), square ? rows.data() : columns.data(), m, k, filled, 10, 1e3f, 0, -1, square};
  matrix.offset = square ? 0 : between(0, k - m);
  if (between(0, 3)) matrix.shift = square ? m / 2 : between(0, m - 1);
  const bool nearest = between(0, 1), bounded = between(0, 1);
  if (bounded) matrix.bound = 40;
  const Plan plan = square && bounded && !nearest && between(0, 1) ? Plan::kTriangle : Plan(between(0, 1));
  const int band = between(1, ceil_div(m, 64));

  std::vector<float> scratch(triangle_scratch(m, band), NAN), losses(m, NAN), lse(m, NAN), logits(m, NAN);
  std::vector<int64_t> indices(m, -1);
  launch_losses(Launch(), plan, matrix, band, scratch.data(), losses.data(), lse.data(),
                nearest ? indices.data() : nullptr, nearest ? logits.data() : nullptr);
  if (!written(losses) || !written(lse) || (nearest && !written(logits))) return false;

  // Lses of columns as large as other ranks' rows may make them.
  const std::vector<float> grads = floats(m, -1, 1), column_lse = floats(k, 2, 3), column_grads = floats(k, -1, 1);
  Statistics stats{lse.data(), grads.data(), column_lse.data(), column_grads.data()};
  if (square) stats.column_lse = lse.data(), stats.column_grad = grads.data();
  if (!square && between(0, 1)) stats.row_lse = stats.row_grad = nullptr;
  std::vector<float> grad_rows(static_cast<int64_t>(m) * d, NAN);
  launch_gradients(Launch(), Plan(between(0, 1)), matrix, stats, grad_rows.data(), d);
  return written(grad_rows);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3) {
    std::vector<float> values(64);
    on_cpu::launch_fault(arguments[2], values.data());
    return 0;
  }
  for (int number = 0, cases = std::atoi(arguments[1]); number < cases; ++number) {
    random_bits.seed(number);
    on_cpu::machine.order = number;
    on_cpu::machine.random.seed(number);
    if (run_case()) continue;
    std::fprintf(stderr, "case %d: a result is no number\n", number);
    return 1;
  }
  std::printf("%s cases\n", arguments[1]);
}

// Problem description and choice of kernels of the CUDA InfoNCE: plain C++, for the operators and the kernels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace copgen {

// s_ij = rows_i . columns_j / temperature, and its special entries. Vectors are contiguous fp16 and aligned to 16
// bytes, so that d is a multiple of 8; zeros may fill up.
struct Similarity {
  const uint16_t* rows;     // [m, d]
  const uint16_t* columns;  // [k, d]
  int m, k, d;
  float scale;  // 1 / temperature
  float bound;  // |s_ij| <= about bound
  int offset;   // row 0 is column `offset`
  int shift;    // row i's target is column offset + (i + shift) % m; -1: there is none
  bool exclude_self;
};

// Gradients of the losses and log-sum-exps, per row and per column; null where a loss has no such part.
struct Statistics {
  const float *row_lse, *row_grad;        // [m]
  const float *column_lse, *column_grad;  // [k]
};

enum class Plan {
  kWide,     // 64 rows a block: least traffic
  kThin,     // 16 rows a block: more blocks
  kTriangle  // 64 rows a block, each pair of rows once
};

constexpr int kChunk = 128;  // dimensions in shared memory at once, and of gradients that a block computes

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Whether one shift serves all rows: exponentials neither over- nor underflow.
inline bool is_bounded(const Similarity& matrix) { return matrix.bound <= 40; }

// `chunks`: how many blocks share a row.
inline Plan choose_plan(const Similarity& matrix, int multiprocessors, int chunks) {
  return static_cast<int64_t>(ceil_div(matrix.m, 64)) * chunks >= multiprocessors ? Plan::kWide : Plan::kThin;
}

inline Plan choose_gradients_plan(const Similarity& matrix, int multiprocessors) {
  return choose_plan(matrix, multiprocessors, ceil_div(matrix.d, kChunk));
}

inline Plan choose_losses_plan(const Similarity& matrix, int multiprocessors, bool square, bool nearest) {
  // A triangle's blocks have half the work of others, so half as many may be too few for those.
  const bool many = matrix.m > 2048 && 2 * ceil_div(matrix.m, 64) >= multiprocessors;
  if (square && !nearest && many && is_bounded(matrix)) return Plan::kTriangle;
  return choose_plan(matrix, multiprocessors, 1);
}

// A triangle's row blocks leave column sums in a scratch buffer, as many blocks at once as `limit` floats hold.
inline int triangle_band(int m, int64_t limit) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(ceil_div(m, 64), limit / std::max(m, 1))));
}

// Floats of that buffer: the band's column sums, and sums carried from band to band.
inline int64_t triangle_scratch(int m, int band) { return (static_cast<int64_t>(band) + 1) * m; }

}  // namespace copgen

// CUDA kernel of InfoNCE's gradient: the similarities again, their weights, and the weights times the columns.
//
// W_ij = g_i (exp(s_ij - lse_i) - [j is target(i)]) + h_j (exp(s_ij - lse_j) - [j is target(i)]), without the
// exponentials where j is self(i);   grad_i = sum_j W_ij columns_j / temperature
// The lse that are given are in units of products, times the temperature.
#pragma once

#include "similarity.cuh"

namespace copgen {

// The tensor cores take the weights as fp16. up^2 brings the largest |g| or |h| to 2^12 .. 2^14 and, since |W| is at
// most twice that, the weights into range; down^2 takes them back. Powers of two: exact. Their squares need not be
// floats, and so they are applied twice.
struct Range {
  float up, down;
  __device__ explicit Range(int exponent) : up(ldexpf(1, exponent)), down(ldexpf(1, -exponent)) {}
};

// The exponent of up, from the largest |g| and |h|; called by all threads of a block.
template <int kThreads>
__device__ __forceinline__ int range_exponent(const Similarity& matrix, const Statistics& stats) {
  __shared__ float parts[kThreads / 32];
  float largest = 0;
  if (stats.row_grad)
    for (int i = threadIdx.x; i < matrix.m; i += kThreads) largest = fmaxf(largest, fabsf(stats.row_grad[i]));
  if (stats.column_grad && stats.column_grad != stats.row_grad)
    for (int j = threadIdx.x; j < matrix.k; j += kThreads) largest = fmaxf(largest, fabsf(stats.column_grad[j]));
#pragma unroll
  for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, step));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) largest = fmaxf(largest, parts[w]);
  if (!(largest > 0) || isinf(largest)) return 0;
  const int up = 13 - ilogbf(largest);
  return up >= 0 ? up / 2 : -((1 - up) / 2);  // rounded down
}

// A row's or a column's part of a weight.
struct Weight {
  float grad;  // g_i or h_j, in range
  float lse;   // or, of bounded logits, grad exp(-scale lse): they share an exponential then
};

template <bool kBounded>
__device__ __forceinline__ Weight weight(const float* grads, const float* lses, int i, int count, float up,
                                         float scale) {
  if (grads == nullptr || i >= count) return {0, 0};
  const float grad = grads[i] * up * up;
  return {grad, kBounded ? grad * exponential(-scale * lses[i]) : lses[i]};
}

// Loads the columns' parts of the weights with the columns.
template <class Shape, bool kBounded>
struct ColumnWeights {
  const Similarity& matrix;
  const Statistics& stats;
  float up;
  Weight* shared;
  Weight mine;
  __device__ void fetch(int j0) {
    if (threadIdx.x < Shape::kColumns)
      mine = weight<kBounded>(stats.column_grad, stats.column_lse, j0 + threadIdx.x, matrix.k, up, matrix.scale);
  }
  __device__ void store() {
    if (threadIdx.x < Shape::kColumns) shared[threadIdx.x] = mine;
  }
};

// A share of a sum: at most 1, also where a large product is rounded otherwise than lse was. Keeps NaN.
__device__ __forceinline__ float share(float product, float scale, float lse) {
  const float logit = scale * (product - lse);
  return exponential(logit > 0 ? 0.0f : logit);
}

// Products of one tile to weights, in place. j0 is this thread's first column, `columns` points to its weights.
template <class Shape, bool kBounded, bool kPlain>
__device__ __forceinline__ void to_weights(const Similarity& matrix, const Statistics& stats, int i, int j0,
                                           const Weight (&rows)[2], const Weight* columns,
                                           float (&s)[Shape::kTiles][4]) {
  const float log2_e = 1.4426950408889634f;
  const int self[2] = {self_of(matrix, i), self_of(matrix, i + 8)};
  const int target[2] = {target_of(matrix, i), target_of(matrix, i + 8)};
#pragma unroll
  for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Weight& row = rows[e / 2];
      const Weight column = columns[8 * n + e % 2];
      float w = 0;
      if (kBounded) {
        w = power_of_two(s[n][e] * (matrix.scale * log2_e)) * (row.lse + column.lse);
      } else {
        if (stats.row_grad) w = row.grad * share(s[n][e], matrix.scale, row.lse);
        if (stats.column_grad) w += column.grad * share(s[n][e], matrix.scale, column.lse);
      }
      if (!kPlain) {
        const int j = j0 + 8 * n + e % 2;
        if (j >= matrix.k || j == self[e / 2]) w = 0;
        if (j == target[e / 2]) w -= row.grad + column.grad;
      }
      s[n][e] = w;
    }
  }
}

// The first warp gets the sum of all warps' x.
template <int kWarps>
__device__ __forceinline__ void sum_over_warps(float (&x)[kPieces][4], float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int active = kWarps / 2; active > 0; active /= 2) {
    float* mine = shared + (warp % active) * kPieces * 4 * 32 + lane;
    if (warp >= active && warp < 2 * active)
#pragma unroll
      for (int v = 0; v < kPieces * 4; ++v) mine[v * 32] = x[v / 4][v % 4];
    __syncthreads();
    if (warp < active)
#pragma unroll
      for (int v = 0; v < kPieces * 4; ++v) x[v / 4][v % 4] += mine[v * 32];
    __syncthreads();
  }
}

// Grid: blocks of Shape::kRows rows x chunks of kChunk dimensions of grad_rows [m, grad_d]. Of a square matrix the
// columns' statistics are the rows'.
template <class Shape, bool kBounded>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kRowWarps == 1 ? 1 : 2)
    row_gradients_kernel(Similarity matrix, Statistics stats, float* grad_rows, int grad_d) {
  __shared__ uint4 tile[Shape::kColumns * kPieces];
  __shared__ Weight column_weights[Shape::kColumns];
  const Place<Shape> at;
  const int i0 = blockIdx.x * Shape::kRows, i = i0 + at.row, d0 = blockIdx.y * kChunk;
  const int tiles = (matrix.k + Shape::kColumns - 1) / Shape::kColumns;
  const Range range(range_exponent<Shape::kThreads>(matrix, stats));
  const Weight rows[2] = {weight<kBounded>(stats.row_grad, stats.row_lse, i, matrix.m, range.up, matrix.scale),
                          weight<kBounded>(stats.row_grad, stats.row_lse, i + 8, matrix.m, range.up, matrix.scale)};
  ColumnWeights<Shape, kBounded> extra{matrix, stats, range.up, column_weights, {0, 0}};
  float grad[kPieces][4] = {};
  walk<Shape>(
      matrix, i0, tiles, blockIdx.y, tile, [](int t) { return t * Shape::kColumns; }, extra,
      [&](int j0, float (&s)[Shape::kTiles][4]) {
        const int j = j0 + at.column;
        const Weight* columns = column_weights + at.column + 2 * at.quad;
        if (is_plain(matrix, i0 + at.first_row, 16, j, Shape::kWarpColumns))
          to_weights<Shape, kBounded, true>(matrix, stats, i, j + 2 * at.quad, rows, columns, s);
        else
          to_weights<Shape, kBounded, false>(matrix, stats, i, j + 2 * at.quad, rows, columns, s);
#pragma unroll
        for (int n = 0; n < Shape::kTiles; ++n) {
          // The accumulator's layout is that of the next product's left factor.
          const uint32_t upper = pack(s[n][0], s[n][1]), lower = pack(s[n][2], s[n][3]);
#pragma unroll
          for (int piece = 0; piece < kPieces; piece += 4) {
            if (d0 + piece * 8 >= matrix.d) break;
            uint32_t b[4];
            load_transposed(b, tile + swizzled(at.column + n * 8 + at.lane % 8, piece + at.lane / 8));
#pragma unroll
            for (int p = 0; p < 4; ++p) multiply_add(grad[piece + p], upper, lower, b[p]);
          }
        }
      });

  if (Shape::kColumnWarps > 1) {
    static_assert(Shape::kColumnWarps == 1 || Shape::kRowWarps == 1, "warps share out rows or columns, not both");
    static_assert(Shape::kColumnWarps / 2 * kPieces * 4 * 32 * 4 <= sizeof(tile), "the sum does not fit in the tile");
    sum_over_warps<Shape::kColumnWarps>(grad, reinterpret_cast<float*>(tile));
    if (at.warp > 0) return;
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = i + e / 2 * 8, d = d0 + p * 8 + 2 * at.quad + e % 2;
      if (row < matrix.m && d < grad_d)
        grad_rows[static_cast<int64_t>(row) * grad_d + d] = grad[p][e] * matrix.scale * range.down * range.down;
    }
  }
}

}  // namespace copgen

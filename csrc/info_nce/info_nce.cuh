// CUDA kernels of InfoNCE over a similarity matrix that is never stored; without PyTorch's headers.
//
// s_ij = rows_i . columns_j / temperature;   lse_i = log sum over j != self(i) of exp(s_ij);
// loss_i = lse_i - s_i,target(i), or lse_i where there is no target. The lse that is stored is in units of products,
// times the temperature.
// Rows and columns are contiguous fp16, and products accumulate in float. All sums have a fixed order.
#pragma once

#include <cmath>

#include "similarity.cuh"

namespace copgen {

constexpr float kLowest = -3e38f;  // below every product, and finite, so that differences are no NaN
constexpr int kNowhere = 0x7fffffff;

// A row's sum of exponentials over some columns, divided by that of max where the logits are not bounded. Products are
// not yet divided by the temperature: only their differences are, as a large logit is rounded by more than 1.
struct RowSum {
  float max, sum, target;  // max and target are products
  float best;  // largest product
  int index;   // and its first column

  __device__ static RowSum empty() { return {kLowest, 0, 0, -INFINITY, kNowhere}; }

  template <bool kBounded, bool kNearest>
  __device__ __forceinline__ void merge(const RowSum& other, float scale) {
    if (kBounded) {
      sum += other.sum;
    } else {
      const float both = fmaxf(max, other.max);
      sum = sum * exponential(scale * (max - both)) + other.sum * exponential(scale * (other.max - both));
      max = both;
    }
    target += other.target;  // only one of the two has seen it
    if (kNearest && (other.best > best || (other.best == best && other.index < index)))
      best = other.best, index = other.index;
  }
};

// Merges the four lanes that share a row.
template <bool kBounded, bool kNearest>
__device__ __forceinline__ void merge_quad(RowSum& row, float scale) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    RowSum other = RowSum::empty();
    other.sum = __shfl_xor_sync(kWarp, row.sum, step);
    other.target = __shfl_xor_sync(kWarp, row.target, step);
    if (!kBounded) other.max = __shfl_xor_sync(kWarp, row.max, step);
    if (kNearest) other.best = __shfl_xor_sync(kWarp, row.best, step);
    if (kNearest) other.index = __shfl_xor_sync(kWarp, row.index, step);
    row.merge<kBounded, kNearest>(other, scale);
  }
}

// Adds one row's part of a tile; kPlain: no column of it is missing, the row's self, or its target.
template <class Shape, bool kBounded, bool kNearest, bool kPlain>
__device__ __forceinline__ void add_tile(const Similarity& matrix, int i, int j0, int half,
                                         float (&s)[Shape::kTiles][4], RowSum& row) {
  const float log2_e = 1.4426950408889634f;
  const int self = kPlain ? -1 : self_of(matrix, i), target = kPlain ? -1 : target_of(matrix, i);
  float max = row.max, sum = 0;
#pragma unroll
  for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& x = s[n][2 * half + e];
      const int j = j0 + 8 * n + e;
      if (!kPlain && j == target) row.target = x;
      if (!kPlain && (j >= matrix.k || j == self)) x = -INFINITY;
      if (kNearest && x > row.best) row.best = x, row.index = j;
      if (kBounded) {
        sum += power_of_two(fmaf(x, matrix.scale * log2_e, -matrix.bound * log2_e));
      } else {
        max = fmaxf(max, x);
      }
    }
  }
  if (!kBounded) {
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n)
      sum += exponential(matrix.scale * (s[n][2 * half] - max)) + exponential(matrix.scale * (s[n][2 * half + 1] - max));
    row.sum *= exponential(matrix.scale * (row.max - max));
    row.max = max;
  }
  row.sum += sum;
}

// Grid: blocks of Shape::kRows rows. nearest and nearest_logit (kNearest): the largest logit, first column and value.
template <class Shape, bool kBounded, bool kNearest>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kRowWarps == 1 ? 2 : 3)
    row_losses_kernel(Similarity matrix, float* losses, float* lse, int64_t* nearest, float* nearest_logit) {
  __shared__ uint4 tile[Shape::kColumns * kPieces];
  __shared__ RowSum parts[Shape::kColumnWarps][Shape::kRows];
  const Place<Shape> at;
  const int i0 = blockIdx.x * Shape::kRows;
  const int tiles = (matrix.k + Shape::kColumns - 1) / Shape::kColumns;
  const int chunks = (matrix.d + kChunk - 1) / kChunk;
  RowSum rows[2] = {RowSum::empty(), RowSum::empty()};
  NoExtra none;
  walk<Shape>(
      matrix, i0, tiles, chunks - 1, tile, [](int t) { return t * Shape::kColumns; }, none,
      [&](int j0, float (&s)[Shape::kTiles][4]) {
        const int j = j0 + at.column + 2 * at.quad;
        const bool plain = is_plain(matrix, i0 + at.first_row, 16, j0 + at.column, Shape::kWarpColumns);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = i0 + at.row + 8 * half;
          if (plain)
            add_tile<Shape, kBounded, kNearest, true>(matrix, i, j, half, s, rows[half]);
          else
            add_tile<Shape, kBounded, kNearest, false>(matrix, i, j, half, s, rows[half]);
        }
      });

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    merge_quad<kBounded, kNearest>(rows[half], matrix.scale);
    if (at.quad == 0) parts[at.warp % Shape::kColumnWarps][at.row + 8 * half] = rows[half];
  }
  __syncthreads();
  const int i = i0 + threadIdx.x;
  if (threadIdx.x >= Shape::kRows || i >= matrix.m) return;
  RowSum row = parts[0][threadIdx.x];
  for (int w = 1; w < Shape::kColumnWarps; ++w) row.merge<kBounded, kNearest>(parts[w][threadIdx.x], matrix.scale);
  const float log_sum = logf(row.sum);  // without a target its product is zero
  if (kBounded) {
    lse[i] = (matrix.bound + log_sum) / matrix.scale;
    losses[i] = matrix.bound - row.target * matrix.scale + log_sum;
  } else {
    lse[i] = row.max + log_sum / matrix.scale;
    losses[i] = matrix.scale * (row.max - row.target) + log_sum;
  }
  if (kNearest) {
    nearest[i] = row.index == kNowhere ? 0 : row.index;
    nearest_logit[i] = row.best * matrix.scale;
  }
}

// A symmetric matrix: half of its tiles, each of which serves its rows and its columns.

// Number of tiles of row block `block`: at distances 0, 1, ... up to half the circle of `blocks`, each pair once.
__device__ __forceinline__ int triangle_tiles(int block, int blocks) {
  return blocks / 2 + 1 - (blocks % 2 == 0 && block >= blocks / 2);
}

// Sums 16 values each over the eight lanes of the same quad position; lane l gets those of index l / 4 * 2 and one on.
__device__ __forceinline__ void sum_over_rows(float (&x)[16], int lane) {
#pragma unroll
  for (int size = 8; size > 1; size /= 2) {
    const bool upper = lane & 2 * size;
#pragma unroll
    for (int n = 0; n < size; ++n) {
      const float sent = upper ? x[n] : x[n + size], kept = upper ? x[n + size] : x[n];
      x[n] = kept + __shfl_xor_sync(kWarp, sent, 2 * size);
    }
  }
}

// Grid: the row blocks of a band, from block `band` on; rows are columns, logits are bounded. Fills
//   row_sums [m]           of exp(s - bound), over the tiles of a row's own block
//   column_sums [band, m]  the same, over the rows of one block: as many as triangle_tiles says
//   targets [m]            logits, where there is a target
__global__ void __launch_bounds__(Wide::kThreads, 3)
    triangle_kernel(Similarity matrix, int band, float* row_sums, float* column_sums, float* targets) {
  __shared__ uint4 tile[Wide::kColumns * kPieces];
  __shared__ float parts[Wide::kRowWarps][Wide::kColumns];
  const float log2_e = 1.4426950408889634f;
  const Place<Wide> at;
  const int block = band + blockIdx.x, blocks = (matrix.m + Wide::kRows - 1) / Wide::kRows;
  const int i0 = block * Wide::kRows, warp_i0 = i0 + at.first_row;
  const int chunks = (matrix.d + kChunk - 1) / kChunk;
  float sums[2] = {0, 0};
  NoExtra none;
  walk<Wide>(
      matrix, i0, triangle_tiles(block, blocks), chunks - 1, tile,
      [=](int t) { return (block + t < blocks ? block + t : block + t - blocks) * Wide::kColumns; }, none,
      [&](int j0, float (&s)[Wide::kTiles][4]) {
        const bool plain =
            is_plain(matrix, warp_i0, 16, j0, Wide::kColumns) && is_plain(matrix, j0, Wide::kColumns, warp_i0, 16);
        float columns[2 * Wide::kTiles] = {}, row_parts[2] = {0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = i0 + at.row + 8 * half, self = self_of(matrix, i), target = target_of(matrix, i);
          const int source = target < 0 ? -1 : (i + matrix.m - matrix.shift % matrix.m) % matrix.m;  // i is its target
#pragma unroll
          for (int c = 0; c < 2 * Wide::kTiles; ++c) {
            const float x = s[c / 2][2 * half + c % 2];
            float p = power_of_two(fmaf(x, matrix.scale * log2_e, -matrix.bound * log2_e));
            if (!plain) {
              const int j = j0 + c / 2 * 8 + 2 * at.quad + c % 2;
              const bool inside = i < matrix.m && j < matrix.m;
              if (inside && j == target) targets[i] = x * matrix.scale;
              if (inside && j0 != i0 && j == source) targets[j] = x * matrix.scale;
              if (!inside || j == self) p = 0;
            }
            row_parts[half] += p;
            columns[c] += p;
          }
          sums[half] += row_parts[half];
        }
        if (j0 == i0) return;
        sum_over_rows(columns, at.lane);
        parts[at.warp][at.lane / 4 * 8 + 2 * at.quad] = columns[0];
        parts[at.warp][at.lane / 4 * 8 + 2 * at.quad + 1] = columns[1];
        __syncthreads();
        const int j = j0 + threadIdx.x;
        if (threadIdx.x >= Wide::kColumns || j >= matrix.m) return;
        float sum = parts[0][threadIdx.x];
        for (int w = 1; w < Wide::kRowWarps; ++w) sum += parts[w][threadIdx.x];
        column_sums[static_cast<int64_t>(blockIdx.x) * matrix.m + j] = sum;
      });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    for (int step = 1; step < 4; step *= 2) sums[half] += __shfl_xor_sync(kWarp, sums[half], step);
    const int i = i0 + at.row + 8 * half;
    if (at.quad == 0 && i < matrix.m) row_sums[i] = sums[half];
  }
}

// A thread a row: adds the column sums of a band of `size` row blocks to those of the bands before it (`carried` [m],
// used only with several bands). At the last band it replaces the row sums in lse and the target logits in losses by
// the results.
__global__ void triangle_sums_kernel(int m, float bound, float scale, bool has_target, int band, int size,
                                     const float* column_sums, float* carried, float* losses, float* lse) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= m) return;
  const int blocks = (m + Wide::kRows - 1) / Wide::kRows, own = i / Wide::kRows;
  float sum = band == 0 ? 0 : carried[i];
#pragma unroll 8
  for (int t = 1; t <= blocks / 2; ++t) {
    const int block = own >= t ? own - t : own - t + blocks;
    const bool here = block >= band && block < band + size && t < triangle_tiles(block, blocks);
    sum += here ? column_sums[static_cast<int64_t>(block - band) * m + i] : 0.0f;
  }
  if (band + size < blocks) {
    carried[i] = sum;
    return;
  }
  const float log_sum = logf(lse[i] + sum);
  lse[i] = (bound + log_sum) / scale;
  losses[i] = bound - (has_target ? losses[i] : 0.0f) + log_sum;
}

}  // namespace copgen

// Tiles of similarities s_ij = rows_i . columns_j / temperature, in registers only.
//
// A block owns some rows and walks over tiles of columns; each warp of it computes 16 rows by 8 kTiles columns of a
// tile. The fp16 columns pass through shared memory, kChunk of their dimensions at a time; the next piece is on its
// way from global memory while the tensor cores work on this one. The rows stay in registers where they fit.
#pragma once

#include "info_nce_cuda.h"
#include "mma.cuh"

namespace copgen {

// The column left out of row i's sum, or -1.
__device__ __forceinline__ int self_of(const Similarity& matrix, int i) {
  return matrix.exclude_self ? matrix.offset + i : -1;
}

// Row i's target column, or -1.
__device__ __forceinline__ int target_of(const Similarity& matrix, int i) {
  return matrix.shift < 0 ? -1 : matrix.offset + (i + matrix.shift) % matrix.m;
}

constexpr int kPieces = kChunk / 8;  // 16-byte pieces of a row of a tile
constexpr int kFetch = 8;            // pieces that a thread fetches per tile
constexpr unsigned kWarp = ~0u;      // all lanes

// A block of kRowWarps x kColumnWarps warps: 16 kRowWarps rows, and 8 kTiles kColumnWarps columns at a time.
template <int kRowWarps_, int kColumnWarps_, int kTiles_>
struct Shape {
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kTiles = kTiles_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kRows = 16 * kRowWarps;
  static constexpr int kWarpColumns = 8 * kTiles;
  static constexpr int kColumns = kWarpColumns * kColumnWarps;
  static_assert(kColumns * kPieces == kFetch * kThreads, "threads do not divide the tile evenly");
};
using Wide = Shape<4, 1, 8>;  // enough rows for every multiprocessor: least traffic
using Thin = Shape<1, 8, 2>;  // few rows: many blocks, whose warps share the columns out

// Position of this thread in the block.
template <class Shape>
struct Place {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int quad = lane % 4;                                            // holds columns 2 quad, 2 quad + 1 of eight
  int row = warp / Shape::kColumnWarps * 16 + lane / 4;           // and rows `row`, `row + 8` of the block
  int column = warp % Shape::kColumnWarps * Shape::kWarpColumns;  // the warp's first column in a tile
  int first_row = warp / Shape::kColumnWarps * 16;                // the warp's first row in the block
};

// Index of piece `piece` of row `row` of a tile, without bank conflicts between eight rows' same piece (transposing
// load) or two rows' four neighbouring pieces (plain load).
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kPieces + (piece ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

// Eight values of vector `i` of `count` from dimension k on, zero beyond the edges.
__device__ __forceinline__ uint4 load_piece(const uint16_t* data, int64_t i, int count, int k, int d) {
  uint4 piece = {0, 0, 0, 0};
  if (i < count && k < d) piece = *reinterpret_cast<const uint4*>(data + i * d + k);
  return piece;
}

__device__ __forceinline__ uint32_t word(const uint4& piece, int w) {
  return w == 0 ? piece.x : w == 1 ? piece.y : w == 2 ? piece.z : piece.w;
}

// Adds the products of one chunk. A step of eight dimensions takes two of each of four pieces: the order of
// dimensions is free as long as rows and columns agree, and so both load 16 bytes at a time.
template <class Shape>
__device__ __forceinline__ void multiply(float (&s)[Shape::kTiles][4], const uint4 (&rows)[2][kPieces / 4],
                                         const uint4* tile, const Place<Shape>& at, int dimensions) {
  constexpr int kGroup = Shape::kTiles < 4 ? Shape::kTiles : 4;
#pragma unroll
  for (int kk = 0; kk < kPieces / 4; ++kk) {
    if (kk * 32 >= dimensions) break;
#pragma unroll
    for (int group = 0; group < Shape::kTiles; group += kGroup) {
      uint4 columns[kGroup];
#pragma unroll
      for (int t = 0; t < kGroup; ++t)
        columns[t] = tile[swizzled(at.column + (group + t) * 8 + at.lane / 4, kk * 4 + at.quad)];
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int t = 0; t < kGroup; ++t)
          multiply_add(s[group + t], word(rows[0][kk], w), word(rows[1][kk], w), word(columns[t], w));
    }
  }
}

// Calls visit(j0, s) for tiles t = 0 .. tiles - 1 of columns j0 = first(t), ...; s holds the products, not yet
// divided by the temperature, of this thread's rows and columns as multiply_add's c. While visit runs, `tile` holds
// chunk `last` of the columns; what extra.fetch(j0) and then extra.store() put into shared memory is there too.
template <class Shape, class First, class Extra, class Visit>
__device__ __forceinline__ void walk(const Similarity& matrix, int i0, int tiles, int last, uint4* tile,
                                     const First& first, Extra& extra, const Visit& visit) {
  const Place<Shape> at;
  const int chunks = (matrix.d + kChunk - 1) / kChunk;
  constexpr int kStep = Shape::kThreads / kPieces;
  const int my_piece = threadIdx.x % kPieces, my_row = threadIdx.x / kPieces;
  uint4 fetched[kFetch], rows[2][kPieces / 4];
  float s[Shape::kTiles][4] = {};
  const auto fetch = [&](int j0, int chunk) {
    const int k = chunk * kChunk + my_piece * 8;
#pragma unroll
    for (int f = 0; f < kFetch; ++f)
      fetched[f] = load_piece(matrix.columns, j0 + my_row + f * kStep, matrix.k, k, matrix.d);
  };
  const auto fetch_rows = [&](int chunk) {
    const int i = i0 + at.row, k = chunk * kChunk + at.quad * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int p = 0; p < kPieces / 4; ++p)
        rows[half][p] = load_piece(matrix.rows, i + 8 * half, matrix.m, k + p * 32, matrix.d);
  };

  int chunk = (last + 1) % chunks;
  fetch(first(0), chunk);
  extra.fetch(first(0));
  if (chunks == 1) fetch_rows(0);
  for (int t = 0; t < tiles;) {
#pragma unroll
    for (int f = 0; f < kFetch; ++f) tile[swizzled(my_row + f * kStep, my_piece)] = fetched[f];
    extra.store();
    __syncthreads();
    const bool complete = chunk == last;
    const int next = t + complete, next_chunk = chunk + 1 == chunks ? 0 : chunk + 1;
    if (next < tiles) {
      fetch(first(next), next_chunk);
      if (complete) extra.fetch(first(next));
    }
    if (chunks > 1) fetch_rows(chunk);
    multiply<Shape>(s, rows, tile, at, matrix.d - chunk * kChunk);
    if (complete) {
      visit(first(t), s);
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = 0;
    }
    __syncthreads();
    t = next, chunk = next_chunk;
  }
}

__device__ __forceinline__ bool intersect(int a, int a_size, int b, int b_size) {
  return a < b + b_size && b < a + a_size;
}

// Whether columns j0 .. j0 + n - 1 all exist and none is the self or the target of rows i0 .. i0 + m - 1. (May be
// false where it could be true.)
__device__ __forceinline__ bool is_plain(const Similarity& matrix, int i0, int m, int j0, int n) {
  if (j0 + n > matrix.k) return false;
  const int j = j0 - matrix.offset;
  if (matrix.exclude_self && intersect(j, n, i0, m)) return false;
  if (matrix.shift < 0) return true;
  const int target = (i0 + matrix.shift) % matrix.m;
  return !intersect(j, n, target, m) && !intersect(j, n, target - matrix.m, m);
}

// Loads the columns alone.
struct NoExtra {
  __device__ void fetch(int) {}
  __device__ void store() {}
};

}  // namespace copgen

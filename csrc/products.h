// A thread's own matrix product, of blocks that are in its cache.
//
// float: oneDNN's microkernel, which is faster at such sizes than the BLAS that PyTorch's operators call; where there
// is no oneDNN, PyTorch calls the BLAS. A kernel is generated for each combination of sizes, distances of rows and
// `add`, and kept by each thread: use few.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdint>

namespace copgen {

// C = A B, or C += A B if `add`. A [m, k], B [k, n] and C [m, n] lie row by row, rows lda, ldb and ldc values apart;
// m, n and k are at least 1.
inline void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                     float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c);
}

inline void multiply(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb,
                     double* c, int64_t ldc, bool add) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  const auto matrix = [](const double* x, int64_t rows, int64_t columns, int64_t ld) {
    return at::from_blob(const_cast<double*>(x), {rows, columns}, {ld, 1}, at::kDouble);
  };
  at::Tensor into = matrix(c, m, n, ldc);
  at::addmm_out(into, into, matrix(a, m, k, lda), matrix(b, k, n, ldb), add, 1);
}

// C = A B in parts of k: the microkernel sums in order, and over one long sum rounding errors would add up.
template <typename T>
void multiply_in_parts(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                       int64_t ldc) {
  constexpr int64_t kPart = 128;
  for (int64_t i = 0; i < k; i += kPart)
    multiply(m, n, std::min(kPart, k - i), a + i, lda, b + i * ldb, ldb, c, ldc, i > 0);
}

// B = A transposed: A [n, m] and B [m, n] lie row by row, rows lda and ldb values apart.
template <typename T>
void transpose(int64_t n, int64_t m, const T* a, int64_t lda, T* b, int64_t ldb) {
  constexpr int64_t kBlock = 16;  // columns of A whose places in B stay in the cache
  for (int64_t first = 0; first < m; first += kBlock)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = first; j < std::min(m, first + kBlock); ++j) b[j * ldb + i] = a[i * lda + j];
}

}  // namespace copgen

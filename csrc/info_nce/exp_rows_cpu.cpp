// The functions of exp_rows.h, vectorised once per instruction set.
#include <cmath>
#include <cstring>

#include "exp_rows.h"
#include "target_clones.h"

namespace copgen {
namespace body {

COPGEN_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) to about one unit in the last place for x <= 88, 0 below -87.3 (where results would be denormal); keeps NaN.
// x = n log 2 + r with |r| <= log 2 / 2, and the exponential of r is a polynomial (Cephes' coefficients).
COPGEN_INLINE float exponential(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which the low bits hold
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.3f ? 0.0f : p * power;
}

template <typename T>
COPGEN_INLINE T sum_exp(T* __restrict s, int64_t n, T scale, T shift, T* __restrict columns) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const T e = exponential(scale * s[j] - shift);
    sum += e;
    columns[j] += e;
    s[j] = e;
  }
  return sum;
}

template <typename T>
COPGEN_INLINE T sum_exp_below(const T* __restrict s, int64_t n, T scale, T top) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exponential(scale * (s[j] - top));
  return sum;
}

template <typename T>
COPGEN_INLINE void add_exp_below(const T* __restrict s, int64_t n, T scale, const T* __restrict top,
                                 T* __restrict columns) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) columns[j] += exponential(scale * (s[j] - top[j]));
}

// A NaN is not larger, but its exponential is NaN whatever the shift.
template <typename T>
COPGEN_INLINE T raise(const T* __restrict s, int64_t n, T* __restrict columns) {
  T top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) {
    top = s[j] > top ? s[j] : top;
    columns[j] = s[j] > columns[j] ? s[j] : columns[j];
  }
  return top;
}

template <typename T>
COPGEN_INLINE void weigh(const T* s, int64_t n, T scale, T shift, T row, const T* columns, T* w) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) w[j] = (row + columns[j]) * exponential(scale * s[j] - shift);
}

template <typename T>
COPGEN_INLINE void weigh_known(const T* e, int64_t n, T row, const T* columns, T* w) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) w[j] = (row + columns[j]) * e[j];
}

// A share of a sum, exp(scale (s - lse)): at most 1, also where a large s is rounded otherwise than lse was. Keeps NaN.
template <typename T>
COPGEN_INLINE T share(T s, T scale, T lse) {
  const T x = scale * (s - lse);
  return exponential(x > 0 ? T(0) : x);
}

template <typename T>
COPGEN_INLINE void weigh_apart(const T* s, int64_t n, T scale, T row_lse, T row_grad, const T* column_lse,
                               const T* column_grad, T* w) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j)
    w[j] = row_grad * share(s[j], scale, row_lse) + column_grad[j] * share(s[j], scale, column_lse[j]);
}

}  // namespace body

#define COPGEN_DEFINE_EXP_ROWS(T)                                                                        \
  COPGEN_CLONES_##T T sum_exp(T* s, int64_t n, T scale, T shift, T* columns) {                           \
    return body::sum_exp(s, n, scale, shift, columns);                                                   \
  }                                                                                                      \
  COPGEN_CLONES_##T T sum_exp_below(const T* s, int64_t n, T scale, T top) {                             \
    return body::sum_exp_below(s, n, scale, top);                                                        \
  }                                                                                                      \
  COPGEN_CLONES_##T void add_exp_below(const T* s, int64_t n, T scale, const T* top, T* columns) {       \
    body::add_exp_below(s, n, scale, top, columns);                                                      \
  }                                                                                                      \
  COPGEN_CLONES_##T T raise(const T* s, int64_t n, T* columns) { return body::raise(s, n, columns); }    \
  COPGEN_CLONES_##T void weigh(const T* s, int64_t n, T scale, T shift, T row, const T* columns, T* w) { \
    body::weigh(s, n, scale, shift, row, columns, w);                                                    \
  }                                                                                                      \
  COPGEN_CLONES_##T void weigh_known(const T* e, int64_t n, T row, const T* columns, T* w) {             \
    body::weigh_known(e, n, row, columns, w);                                                            \
  }                                                                                                      \
  COPGEN_CLONES_##T void weigh_apart(const T* s, int64_t n, T scale, T row_lse, T row_grad,              \
                                     const T* column_lse, const T* column_grad, T* w) {                  \
    body::weigh_apart(s, n, scale, row_lse, row_grad, column_lse, column_grad, w);                       \
  }

COPGEN_DEFINE_EXP_ROWS(float)
COPGEN_DEFINE_EXP_ROWS(double)

}  // namespace copgen

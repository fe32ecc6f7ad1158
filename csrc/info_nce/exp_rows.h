// Vectorised loops over a row of InfoNCE's similarities. Defined in exp_rows_cpu.cpp.
//
// A row holds n products s_j of one vector with n columns; `scale` is 1 / temperature. T is float or double.
#pragma once

#include <cstdint>

namespace copgen {

#define COPGEN_DECLARE_EXP_ROWS(T)                                                                   \
  /* s = exp(scale s - shift), in place. Returns the sum, and adds each term to its column. */       \
  T sum_exp(T* s, int64_t n, T scale, T shift, T* columns);                                          \
  /* Returns the sum of exp(scale (s - top)). */                                                     \
  T sum_exp_below(const T* s, int64_t n, T scale, T top);                                            \
  /* Adds exp(scale (s - top)) to each column, which has its own top. */                             \
  void add_exp_below(const T* s, int64_t n, T scale, const T* top, T* columns);                      \
  /* Returns the largest s, and raises each column to its s. */                                      \
  T raise(const T* s, int64_t n, T* columns);                                                        \
  /* w = (row + column) exp(scale s - shift); w may be s. */                                         \
  void weigh(const T* s, int64_t n, T scale, T shift, T row, const T* columns, T* w);                \
  /* w = (row + column) e, of exponentials that are known. */                                        \
  void weigh_known(const T* e, int64_t n, T row, const T* columns, T* w);                            \
  /* w = row_grad exp(scale (s - row_lse)) + column_grad exp(scale (s - column_lse)); w may be s. */ \
  void weigh_apart(const T* s, int64_t n, T scale, T row_lse, T row_grad, const T* column_lse,       \
                   const T* column_grad, T* w);

COPGEN_DECLARE_EXP_ROWS(float)
COPGEN_DECLARE_EXP_ROWS(double)
#undef COPGEN_DECLARE_EXP_ROWS

}  // namespace copgen

// The functions of rows.h, vectorised once per instruction set.
#include "row_color.h"
#include "row_io.h"
#include "rows.h"

namespace copgen {

#define COPGEN_DEFINE_ROWS(T)                                                                                     \
  COPGEN_CLONES_##T void load_row(const Images& images, int64_t n, int64_t y, int64_t x, int64_t count, T* row) { \
    body::load_row(images, n, y, x, count, row);                                                                  \
  }                                                                                                               \
  COPGEN_CLONES_##T bool leaves(const T* row, int64_t n, T low, T high) {                                         \
    return body::leaves(row, n, low, high);                                                                       \
  }                                                                                                               \
  COPGEN_CLONES_##T void store_row(const Images& images, int64_t n, int64_t y, int64_t count, const T* row) {     \
    body::store_row(images, n, y, count, row);                                                                    \
  }                                                                                                               \
  COPGEN_CLONES_##T void to_quads(const T* row, int64_t n, T* quads) { body::to_quads(row, n, quads); }           \
  COPGEN_CLONES_##T void resize_row(const Taps<T>& taps, const T* quads, int64_t channel, T* row) {               \
    body::resize_row(taps, quads, channel, row);                                                                  \
  }                                                                                                               \
  COPGEN_CLONES_##T void combine_rows(const Taps<T>& taps, int64_t i, const T* rows, int64_t size, T* out) {      \
    body::combine_rows(taps, i, rows, size, out);                                                                 \
  }                                                                                                               \
  COPGEN_CLONES_##T void blend_with_constant(T* x, int64_t n, T f, T offset) {                                    \
    body::blend_with_constant(x, n, f, offset);                                                                   \
  }                                                                                                               \
  COPGEN_CLONES_##T T blend_with_constant_backward(const T* x, T* g, int64_t n, T f, T offset,                    \
                                                   bool straight_through) {                                       \
    return body::blend_with_constant_backward(x, g, n, f, offset, straight_through);                              \
  }                                                                                                               \
  COPGEN_CLONES_##T void saturate(T* x, int64_t n, T f) { body::saturate(x, n, f); }                              \
  COPGEN_CLONES_##T void saturate_backward(const T* x, T* g, int64_t n, T f, bool straight_through) {             \
    body::saturate_backward(x, g, n, f, straight_through);                                                        \
  }                                                                                                               \
  COPGEN_CLONES_##T void shift_hue(T* x, int64_t n, T shift) { body::shift_hue(x, n, shift); }                    \
  COPGEN_CLONES_##T void shift_hue_backward(const T* x, T* g, int64_t n, T shift) {                               \
    body::shift_hue_backward(x, g, n, shift);                                                                     \
  }                                                                                                               \
  COPGEN_CLONES_##T T sum_of_luminance(const T* x, int64_t n) { return body::sum_of_luminance(x, n); }            \
  COPGEN_CLONES_##T void add_to_luminance(T* g, int64_t n, T value) { body::add_to_luminance(g, n, value); }      \
  COPGEN_CLONES_##T void to_gray(T* x, int64_t n) { body::to_gray(x, n); }                                        \
  COPGEN_CLONES_##T void to_gray_backward(T* g, int64_t n) { body::to_gray_backward(g, n); }                      \
  COPGEN_CLONES_##T void solarize(T* x, int64_t n, T threshold) { body::solarize(x, n, threshold); }              \
  COPGEN_CLONES_##T void solarize_backward(const T* x, T* g, int64_t n, T threshold) {                            \
    body::solarize_backward(x, g, n, threshold);                                                                  \
  }                                                                                                               \
  COPGEN_CLONES_##T void normalize(T* x, int64_t n, const T* mean, const T* scale) {                              \
    body::normalize(x, n, mean, scale);                                                                           \
  }                                                                                                               \
  COPGEN_CLONES_##T void filter_row(const T* padded, const T* weight, int64_t taps, int64_t n, T* out) {          \
    body::filter_row(padded, weight, taps, n, out);                                                               \
  }                                                                                                               \
  COPGEN_CLONES_##T void add_row(const T* in, T weight, int64_t n, T* out) { body::add_row(in, weight, n, out); }

COPGEN_DEFINE_ROWS(float)
COPGEN_DEFINE_ROWS(double)

}  // namespace copgen

// Vectorised loops over a row of pixels, of the augmentation on the CPU. Defined in rows_cpu.cpp.
//
// T is float or double. A row of `n` pixels is red, green and blue one after the other, `3 n` values; quads are
// pixels of four values (red, green, blue, unused). `x` is changed in place; a backward function takes the x from
// before its step and changes the gradient g.
#pragma once

#include <ATen/core/Tensor.h>

#include "resize.h"
#include "target_clones.h"

namespace copgen {

// A batch [N, 3, H, W] of any dtype and strides. uint8 images hold 255ths.
struct Images {
  void* data;
  at::ScalarType dtype;
  int64_t batch, channel, row, column;  // strides, in elements

  explicit Images(const at::Tensor& t)
      : data(t.data_ptr()),
        dtype(t.scalar_type()),
        batch(t.stride(0)),
        channel(t.stride(1)),
        row(t.stride(2)),
        column(t.stride(3)) {}
};

#define COPGEN_DECLARE_ROWS(T)                                                                       \
  /* `count` pixels from row y, column x of image n. */                                              \
  void load_row(const Images& images, int64_t n, int64_t y, int64_t x, int64_t count, T* row);       \
  /* Whether a value is outside [low, high]; NaN is not. */                                           \
  bool leaves(const T* row, int64_t n, T low, T high);                                               \
  /* Into row y of image n, from its start. */                                                       \
  void store_row(const Images& images, int64_t n, int64_t y, int64_t count, const T* row);           \
  void to_quads(const T* row, int64_t n, T* quads);                                                  \
  /* Resize along x: adds `taps.count` pixels to a row whose channels are `channel` values apart. */ \
  void resize_row(const Taps<T>& taps, const T* quads, int64_t channel, T* row);                     \
  /* Resize along y: output i from rows of `size` values, one after the other. */                    \
  void combine_rows(const Taps<T>& taps, int64_t i, const T* rows, int64_t size, T* out);            \
  /* clamp(f x + offset) */                                                                          \
  void blend_with_constant(T* x, int64_t n, T f, T offset);                                          \
  /* Returns the sum of the gradient that the clamp lets pass. */                                    \
  T blend_with_constant_backward(const T* x, T* g, int64_t n, T f, T offset, bool straight_through); \
  /* clamp(f x + (1 - f) luminance(x)) */                                                            \
  void saturate(T* x, int64_t n, T f);                                                               \
  void saturate_backward(const T* x, T* g, int64_t n, T f, bool straight_through);                   \
  /* `shift` in [0, 1) turns of HSV's hue. */                                                        \
  void shift_hue(T* x, int64_t n, T shift);                                                          \
  void shift_hue_backward(const T* x, T* g, int64_t n, T shift);                                     \
  T sum_of_luminance(const T* x, int64_t n);                                                         \
  /* What `value` for every pixel's luminance means for its channels. */                             \
  void add_to_luminance(T* g, int64_t n, T value);                                                   \
  void to_gray(T* x, int64_t n);                                                                     \
  void to_gray_backward(T* g, int64_t n);                                                            \
  void solarize(T* x, int64_t n, T threshold);                                                       \
  void solarize_backward(const T* x, T* g, int64_t n, T threshold);                                  \
  /* (x - mean) scale, channel by channel. */                                                        \
  void normalize(T* x, int64_t n, const T* mean, const T* scale);                                    \
  /* out[x] = sum over k < taps of weight[k] padded[x + k] */                                        \
  void filter_row(const T* padded, const T* weight, int64_t taps, int64_t n, T* out);                \
  void add_row(const T* in, T weight, int64_t n, T* out);

COPGEN_DECLARE_ROWS(float)
COPGEN_DECLARE_ROWS(double)
#undef COPGEN_DECLARE_ROWS

}  // namespace copgen

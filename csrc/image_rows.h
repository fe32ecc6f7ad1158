// Rows of images of any dtype and layout, to and from the dtype of the arithmetic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "vectorize.h"

namespace copgen {

// A batch [N, 3, H, W] as raw memory.
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

// uint8 images hold 255ths.
template <typename T, typename S>
COPGEN_INLINE T to_unit(S value) {
  return static_cast<T>(value);
}
template <>
COPGEN_INLINE float to_unit<float, uint8_t>(uint8_t value) {
  return static_cast<float>(value) / 255.0f;
}
template <>
COPGEN_INLINE double to_unit<double, uint8_t>(uint8_t value) {
  return static_cast<double>(value) / 255.0;
}

// Pixel x, channel c goes to out[x * pixel_step + c * channel_step].
template <typename T, typename S>
COPGEN_INLINE void load_as(
    const S* in, int64_t column, int64_t channel, int64_t count, T* out, int64_t pixel_step, int64_t channel_step) {
  for (int64_t x = 0; x < count; ++x)
    for (int64_t c = 0; c < 3; ++c)
      out[x * pixel_step + c * channel_step] = to_unit<T, S>(in[x * column + c * channel]);
}

template <typename T, typename S>
COPGEN_INLINE void store_as(
    S* out, int64_t column, int64_t channel, int64_t count, const T* in, int64_t pixel_step, int64_t channel_step) {
  for (int64_t x = 0; x < count; ++x)
    for (int64_t c = 0; c < 3; ++c)
      out[x * column + c * channel] = static_cast<S>(in[x * pixel_step + c * channel_step]);
}

// The constants let the compiler see contiguous channels and interleaved ones, and vectorise both.
#define COPGEN_BY_LAYOUT(function, S, images, pointer, ...)                  \
  if (images.column == 1)                                                    \
    function<T, S>(pointer, 1, images.channel, __VA_ARGS__);                 \
  else if (images.column == 3 && images.channel == 1)                        \
    function<T, S>(pointer, 3, 1, __VA_ARGS__);                              \
  else                                                                       \
    function<T, S>(pointer, images.column, images.channel, __VA_ARGS__);

#define COPGEN_BY_FLOAT_DTYPE(function, images, offset, ...)                                                       \
  switch (images.dtype) {                                                                                          \
    case at::kFloat: {                                                                                             \
      COPGEN_BY_LAYOUT(function, float, images, static_cast<float*>(images.data) + (offset), __VA_ARGS__) break;   \
    }                                                                                                              \
    case at::kDouble: {                                                                                            \
      COPGEN_BY_LAYOUT(function, double, images, static_cast<double*>(images.data) + (offset), __VA_ARGS__) break; \
    }                                                                                                              \
    case at::kHalf: {                                                                                              \
      COPGEN_BY_LAYOUT(function, c10::Half, images, static_cast<c10::Half*>(images.data) + (offset), __VA_ARGS__)  \
      break;                                                                                                       \
    }                                                                                                              \
    case at::kBFloat16: {                                                                                          \
      COPGEN_BY_LAYOUT(                                                                                            \
          function, c10::BFloat16, images, static_cast<c10::BFloat16*>(images.data) + (offset), __VA_ARGS__)       \
      break;                                                                                                       \
    }                                                                                                              \
    case at::kByte: {                                                                                              \
      COPGEN_BY_LAYOUT(function, uint8_t, images, static_cast<uint8_t*>(images.data) + (offset), __VA_ARGS__)      \
      break;                                                                                                       \
    }                                                                                                              \
    default:                                                                                                       \
      break;                                                                                                       \
  }

// `count` pixels from row y, column x of image n, as interleaved quads (r, g, b, untouched).
template <typename T>
COPGEN_INLINE void load_quads(const Images& images, int64_t n, int64_t y, int64_t x, int64_t count, T* out) {
  const int64_t offset = n * images.batch + y * images.row + x * images.column;
  COPGEN_BY_FLOAT_DTYPE(load_as, images, offset, count, out, 4, 1)
}

// The same as three channels of `count` values, one after the other.
template <typename T>
COPGEN_INLINE void load_channels(const Images& images, int64_t n, int64_t y, int64_t count, T* out) {
  const int64_t offset = n * images.batch + y * images.row;
  COPGEN_BY_FLOAT_DTYPE(load_as, images, offset, count, out, 1, count)
}

template <typename T>
COPGEN_INLINE void store_quads(const Images& images, int64_t n, int64_t y, int64_t count, const T* in) {
  const int64_t offset = n * images.batch + y * images.row;
  COPGEN_BY_FLOAT_DTYPE(store_as, images, offset, count, in, 4, 1)
}

template <typename T>
COPGEN_INLINE void store_channels(const Images& images, int64_t n, int64_t y, int64_t count, const T* in) {
  const int64_t offset = n * images.batch + y * images.row;
  COPGEN_BY_FLOAT_DTYPE(store_as, images, offset, count, in, 1, count)
}

}  // namespace copgen

// Bodies of the loading, storing, resizing and filtering functions of rows.h.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "rows.h"

namespace copgen {
namespace body {

// Four values in a vector register; they may lie at any address.
template <typename T>
struct Quad {
  typedef T type __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
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

template <typename T, typename S>
COPGEN_INLINE void load_as(const S* in, int64_t column, int64_t channel, int64_t count, T* row) {
  if (column == 1) {
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < count; ++x) row[c * count + x] = to_unit<T, S>(in[c * channel + x]);
    return;
  }
  for (int64_t x = 0; x < count; ++x)
    for (int64_t c = 0; c < 3; ++c) row[c * count + x] = to_unit<T, S>(in[x * column + c * channel]);
}

template <typename T, typename S>
COPGEN_INLINE void store_as(S* out, int64_t column, int64_t channel, int64_t count, const T* row) {
  if (column == 1) {
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < count; ++x) out[c * channel + x] = static_cast<S>(row[c * count + x]);
    return;
  }
  for (int64_t x = 0; x < count; ++x)
    for (int64_t c = 0; c < 3; ++c) out[x * column + c * channel] = static_cast<S>(row[c * count + x]);
}

// Calls function<T, S>(pointer to the pixel at `offset`, column stride, channel stride, ...) for the images' dtype S.
#define COPGEN_BY_DTYPE(function, images, offset, ...)                                                            \
  switch (images.dtype) {                                                                                         \
    case at::kByte:                                                                                               \
      function<T>(static_cast<uint8_t*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);       \
      break;                                                                                                      \
    case at::kHalf:                                                                                               \
      function<T>(static_cast<c10::Half*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);     \
      break;                                                                                                      \
    case at::kBFloat16:                                                                                           \
      function<T>(static_cast<c10::BFloat16*>(images.data) + offset, images.column, images.channel, __VA_ARGS__); \
      break;                                                                                                      \
    case at::kFloat:                                                                                              \
      function<T>(static_cast<float*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);         \
      break;                                                                                                      \
    default:                                                                                                      \
      function<T>(static_cast<double*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);        \
  }

template <typename T>
COPGEN_INLINE void load_row(const Images& images, int64_t n, int64_t y, int64_t x, int64_t count, T* row) {
  const int64_t offset = n * images.batch + y * images.row + x * images.column;
  COPGEN_BY_DTYPE(load_as, images, offset, count, row)
}

template <typename T>
COPGEN_INLINE bool leaves(const T* row, int64_t n, T low, T high) {
  int outside = 0;
#pragma omp simd reduction(| : outside)
  for (int64_t x = 0; x < 3 * n; ++x) outside |= (row[x] < low) | (row[x] > high);
  return outside;
}

template <typename T>
COPGEN_INLINE void store_row(const Images& images, int64_t n, int64_t y, int64_t count, const T* row) {
  const int64_t offset = n * images.batch + y * images.row;
  COPGEN_BY_DTYPE(store_as, images, offset, count, row)
}

// Transposes a matrix of four vectors.
template <typename V>
COPGEN_INLINE void transpose(V& a, V& b, V& c, V& d) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  const V ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const V cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
#else
  const V e = a, f = b, g = c, h = d;
  a = V{e[0], f[0], g[0], h[0]};
  b = V{e[1], f[1], g[1], h[1]};
  c = V{e[2], f[2], g[2], h[2]};
  d = V{e[3], f[3], g[3], h[3]};
#endif
}

template <typename T>
COPGEN_INLINE void to_quads(const T* __restrict row, int64_t n, T* __restrict quads) {
  using Quad4 = typename Quad<T>::type;
  Quad4* out = reinterpret_cast<Quad4*>(quads);
  int64_t x = 0;
  for (; x + 4 <= n; x += 4) {
    Quad4 a = *reinterpret_cast<const Quad4*>(row + x), b = *reinterpret_cast<const Quad4*>(row + n + x);
    Quad4 c = *reinterpret_cast<const Quad4*>(row + 2 * n + x), d = c;
    transpose(a, b, c, d);
    out[x] = a;
    out[x + 1] = b;
    out[x + 2] = c;
    out[x + 3] = d;
  }
  for (; x < n; ++x) out[x] = Quad4{row[x], row[n + x], row[2 * n + x], T(0)};
}

template <typename T>
COPGEN_INLINE typename Quad<T>::type resized_pixel(const Taps<T>& taps, const T* quads, int64_t x) {
  using Quad4 = typename Quad<T>::type;
  const Quad4* pixel = reinterpret_cast<const Quad4*>(quads) + taps.start[x];
  const T* w = taps.weight.data() + x * taps.width;
  Quad4 sum = pixel[0] * w[0];
  for (int64_t k = 1; k < taps.width; ++k) sum += pixel[k] * w[k];
  return sum;
}

template <typename T>
COPGEN_INLINE void resize_row(const Taps<T>& taps, const T* quads, int64_t channel, T* row) {
  using Quad4 = typename Quad<T>::type;
  int64_t x = 0;
  for (; x + 4 <= taps.count; x += 4) {
    Quad4 a = resized_pixel(taps, quads, x), b = resized_pixel(taps, quads, x + 1);
    Quad4 c = resized_pixel(taps, quads, x + 2), d = resized_pixel(taps, quads, x + 3);
    transpose(a, b, c, d);
    *reinterpret_cast<Quad4*>(row + x) += a;
    *reinterpret_cast<Quad4*>(row + channel + x) += b;
    *reinterpret_cast<Quad4*>(row + 2 * channel + x) += c;
  }
  for (; x < taps.count; ++x) {
    const Quad4 sum = resized_pixel(taps, quads, x);
    for (int64_t c = 0; c < 3; ++c) row[c * channel + x] += sum[c];
  }
}

// Along y: output row i of rows that are `size` values long, one after the other.
template <typename T>
COPGEN_INLINE void combine_rows(const Taps<T>& taps, int64_t i, const T* rows, int64_t size, T* __restrict out) {
  const T* w = taps.weight.data() + i * taps.width;
  const T* first = rows + taps.start[i] * size;
  if (taps.width == 2) {  // every upscale
    const T *second = first + size, a = w[0], b = w[1];
    for (int64_t x = 0; x < size; ++x) out[x] = a * first[x] + b * second[x];
    return;
  }
  for (int64_t x = 0; x < size; ++x) out[x] = w[0] * first[x];
  for (int64_t k = 1; k < taps.width; ++k) {
    const T *row = first + k * size, a = w[k];
    for (int64_t x = 0; x < size; ++x) out[x] += a * row[x];
  }
}

template <typename T>
COPGEN_INLINE void filter_row(const T* __restrict padded, const T* weight, int64_t taps, int64_t n, T* __restrict out) {
  for (int64_t x = 0; x < n; ++x) out[x] = weight[0] * padded[x];
  for (int64_t k = 1; k < taps; ++k)
    for (int64_t x = 0; x < n; ++x) out[x] += weight[k] * padded[x + k];
}

template <typename T>
COPGEN_INLINE void add_row(const T* __restrict in, T weight, int64_t n, T* __restrict out) {
  for (int64_t x = 0; x < n; ++x) out[x] += weight * in[x];
}

}  // namespace body
}  // namespace copgen

// A tile of images: its values for the products with a weight, and outputs from such products, for all channels.
//
// A tile is computed for some channels at once, which stay in the first-level cache. Values of bfloat16 are sums in
// float32, rounded once; their products are float32.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "forms.h"
#include "half.h"
#include "target_clones.h"

namespace copgen {
namespace {

constexpr int64_t kLanes = 32;      // channels at once
constexpr int64_t kCacheLine = 64;  // bytes

// Where the values of a tile are: at[i * kReach + j] for row i and column j.
template <typename T, int count>
using Places = T* [count];

// What is added to outputs, and whether a ReLU follows. `image` points to what is added to a tile's first output, in
// an image of out's strides; null adds nothing.
template <typename S>
struct After {
  const S *bias, *image;
  bool relu;
};

namespace body {

// Conversions between bfloat16 and float32 go through a buffer, in loops that do nothing else: compilers do not
// vectorise larger loops over values of two sizes. Where nothing is to be converted, there is no buffer.
template <typename T, typename S>
COPGEN_INLINE const T* load(const S* in, int64_t count, T* buffer) {
  if constexpr (std::is_same_v<T, S>) {
    return in;
  } else {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) buffer[c] = widen(in[c]);
    return buffer;
  }
}

template <typename T, typename S>
COPGEN_INLINE T* place(S* out, T* buffer) {
  if constexpr (std::is_same_v<T, S>)
    return out;
  else
    return buffer;
}

template <typename T, typename S>
COPGEN_INLINE void store(const T* buffer, int64_t count, S* out) {
  if constexpr (!std::is_same_v<T, S>) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) out[c] = narrow<S>(buffer[c]);
  }
}

// Which of a form's products belongs to row i and column j.
template <typename F>
COPGEN_INLINE int64_t product(int i, int j) {
  return F::kOrder[i] * F::kValues + F::kOrder[j];
}

// S is stored, T computed with. Products are `stride` apart.
template <typename F, typename T, typename S>
COPGEN_INLINE void tile_values(const Places<const S, F::kReach * F::kReach>& in, S* out, int64_t stride,
                               const S* scale, int64_t first, int64_t count) {
  constexpr int kReach = F::kReach, kValues = F::kValues;
  T rows[kValues][kReach][kLanes], buffers[std::max(kReach, kValues)][kLanes], of_scale[kLanes];
  const T* factor = load(scale + first, count, of_scale);
  for (int j = 0; j < kReach; ++j) {
    const T* from[kReach];
    for (int i = 0; i < kReach; ++i) from[i] = load(in[i * kReach + j] + first, count, buffers[i]);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      T x[kReach], y[kValues];
      for (int i = 0; i < kReach; ++i) x[i] = from[i][c];
      F::values(x, y);
      for (int i = 0; i < kValues; ++i) rows[i][j][c] = y[i] * factor[c];
    }
  }
  for (int i = 0; i < kValues; ++i) {
    T* into[kValues];
    for (int j = 0; j < kValues; ++j) into[j] = place(out + product<F>(i, j) * stride + first, buffers[j]);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      T x[kReach], y[kValues];
      for (int j = 0; j < kReach; ++j) x[j] = rows[i][j][c];
      F::values(x, y);
      for (int j = 0; j < kValues; ++j) into[j][c] = y[j];
    }
    for (int j = 0; j < kValues; ++j) store(buffers[j], count, out + product<F>(i, j) * stride + first);
  }
}

template <typename F, typename T, typename S>
COPGEN_INLINE void tile_outputs(const T* in, int64_t stride, S* out, int64_t row, int64_t column,
                                const After<S>& after, int64_t first, int64_t count) {
  constexpr int kSide = F::kSide, kValues = F::kValues;
  T rows[kSide][kValues][kLanes], buffers[kSide][kLanes], of_bias[kLanes], of_image[kSide][kLanes];
  const T zeros[kLanes] = {}, *bias = load(after.bias + first, count, of_bias);
  const T least = after.relu ? T(0) : -std::numeric_limits<T>::infinity();
  for (int j = 0; j < kValues; ++j) {
    const T* from[kValues];
    for (int i = 0; i < kValues; ++i) from[i] = in + product<F>(i, j) * stride + first;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      T x[kValues], y[kSide];
      for (int i = 0; i < kValues; ++i) x[i] = from[i][c];
      F::outputs(x, y);
      for (int i = 0; i < kSide; ++i) rows[i][j][c] = y[i];
    }
  }
  for (int i = 0; i < kSide; ++i) {
    T* into[kSide];
    const T* image[kSide];
    for (int j = 0; j < kSide; ++j) {
      const int64_t at = i * row + j * column + first;
      into[j] = place(out + at, buffers[j]);
      image[j] = after.image ? load(after.image + at, count, of_image[j]) : zeros;
    }
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      T x[kValues], y[kSide];
      for (int j = 0; j < kValues; ++j) x[j] = rows[i][j][c];
      F::outputs(x, y);
      for (int j = 0; j < kSide; ++j) {
        const T sum = y[j] + bias[c] + image[j][c];
        into[j][c] = sum < least ? least : sum;  // NaN stays
      }
    }
    for (int j = 0; j < kSide; ++j) store(buffers[j], count, out + i * row + j * column + first);
  }
}

template <typename F, typename T, typename S>
COPGEN_INLINE void values_of_channels(const Places<const S, F::kReach * F::kReach>& in, S* out, int64_t stride,
                                      const S* scale, int64_t channels) {
  int64_t first = 0;
  for (; first + kLanes <= channels; first += kLanes) tile_values<F, T, S>(in, out, stride, scale, first, kLanes);
  if (first < channels) tile_values<F, T, S>(in, out, stride, scale, first, channels - first);
}

template <typename F, typename T, typename S>
COPGEN_INLINE void outputs_of_channels(const T* in, int64_t stride, S* out, int64_t row, int64_t column,
                                       const After<S>& after, int64_t channels) {
  int64_t first = 0;
  for (; first + kLanes <= channels; first += kLanes)
    tile_outputs<F, T, S>(in, stride, out, row, column, after, first, kLanes);
  if (first < channels) tile_outputs<F, T, S>(in, stride, out, row, column, after, first, channels - first);
}

}  // namespace body

// A form's functions by dtype; the loader chooses the processor's version. Values and Outputs find them by form.
template <typename F>
struct Values;
template <typename F>
struct Outputs;

#define COPGEN_VALUES_OF(F, T, S)                                                                                \
  [[maybe_unused]]                                                                                               \
  COPGEN_CLONES_##T void values_of_##F(const Places<const S, F::kReach * F::kReach>& in, S* out, int64_t stride, \
                                       const S* scale, int64_t channels) {                                       \
    body::values_of_channels<F, T, S>(in, out, stride, scale, channels);                                         \
  }

#define COPGEN_OUTPUTS_OF(F, T, S)                                                                        \
  [[maybe_unused]]                                                                                        \
  COPGEN_CLONES_##T void outputs_of_##F(const T* in, int64_t stride, S* out, int64_t row, int64_t column, \
                                        const After<S>& after, int64_t channels) {                        \
    body::outputs_of_channels<F, T, S>(in, stride, out, row, column, after, channels);                    \
  }

#define COPGEN_FUNCTIONS(Part, F, function)              \
  template <>                                            \
  struct Part<F> {                                       \
    template <typename... Arguments>                     \
    static void compute(const Arguments&... arguments) { \
      function##_of_##F(arguments...);                   \
    }                                                    \
  };

#define COPGEN_VALUES(F)                \
  COPGEN_VALUES_OF(F, float, float)     \
  COPGEN_VALUES_OF(F, double, double)   \
  COPGEN_VALUES_OF(F, float, BFloat16)  \
  COPGEN_FUNCTIONS(Values, F, values)

#define COPGEN_OUTPUTS(F)               \
  COPGEN_OUTPUTS_OF(F, float, float)    \
  COPGEN_OUTPUTS_OF(F, double, double)  \
  COPGEN_OUTPUTS_OF(F, float, BFloat16) \
  COPGEN_FUNCTIONS(Outputs, F, outputs)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename S>
const S* read(const at::Tensor& x) {
  return static_cast<const S*>(x.const_data_ptr());
}

template <typename S>
S* write(const at::Tensor& x) {
  return static_cast<S*>(x.mutable_data_ptr());
}

// Images [N, H, W, C] of adjacent channels as tiles, `high` x `wide` of them from an image's row of tiles `top` on.
template <typename F, typename S>
struct Tiled {
  const at::Tensor& images;
  int64_t high, wide, top;
  std::vector<S> zeros;

  Tiled(const at::Tensor& images, int64_t high, int64_t wide, int64_t top = 0)
      : images(images), high(high), wide(wide), top(top), zeros(images.size(3)) {}

  // The values of a tile's products, `stride` apart, of its pixels times `scale` [C]. What lies beyond the border is 0.
  void values(int64_t tile, const S* scale, S* out, int64_t stride) const {
    constexpr int kReach = F::kReach;
    const int64_t number = tile / (high * wide), row = top + tile / wide % high, column = tile % wide;
    const S* image = read<S>(images) + number * images.stride(0);
    Places<const S, kReach * kReach> from;
    for (int64_t k = 0; k < kReach * kReach; ++k) {
      const int64_t y = row * F::kStep + k / kReach - F::kBefore, z = column * F::kStep + k % kReach - F::kBefore;
      const bool inside = y >= 0 && y < images.size(1) && z >= 0 && z < images.size(2);
      from[k] = inside ? image + y * images.stride(1) + z * images.stride(2) : zeros.data();
    }
    Values<F>::compute(from, out, stride, scale, images.size(3));
  }
};

// A thread's matrices [products, rows, columns], which would else lie a power of two apart, at one place of a cache.
template <typename T>
struct Matrices {
  int64_t columns, stride;
  at::Tensor memory;
  T* data;

  Matrices(int64_t products, int64_t rows, int64_t columns, at::ScalarType dtype)
      : columns(columns),
        stride(rows * columns + kCacheLine / static_cast<int64_t>(sizeof(T))),
        memory(at::empty({products * stride}, dtype)),
        data(write<T>(memory)) {}
};

}  // namespace
}  // namespace copgen

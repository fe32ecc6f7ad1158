// The sums around the matrix products of Winograd's F(4 x 4, 3 x 3) on the CPU, channels last: from images to what the
// 36 products take, and from these to images. The points are 0, a, -a, 1/a, -1/a and infinity, a = sqrt(2); weights
// and their order are copgen_fast/ops/winograd.py's.
//
// A tile is computed for some channels at once, whose values stay in the first-level cache. Values of bfloat16 are sums
// in float32, rounded once.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "half.h"
#include "target_clones.h"

namespace copgen {
namespace {

constexpr int kSide = 4, kReach = 6;   // outputs of a tile along an axis, and the inputs they are made of
constexpr int64_t kLanes = 32;         // channels at once
constexpr int64_t kGrain = 32768;      // fewest values of a thread
constexpr int kOrder[2][kReach] = {{0, 1, 2, 3, 4, 5}, {5, 3, 4, 1, 2, 0}};  // the points, and their inverses
constexpr double kA = 1.4142135623730951, kB = 0.70710678118654752;

// Where the 36 values of a tile are: at[i * kReach + j] for row i and column j.
template <typename T>
using Places = T* [kReach * kReach];

// What is added to outputs, and whether a ReLU follows. `image` points to what is added to a tile's first output, in
// an image of out's strides; null adds nothing.
template <typename S>
struct After {
  const S *bias, *image;
  bool relu;
};

namespace body {

// Six neighbours to the values that multiply the weight's.
template <typename T>
COPGEN_INLINE void values(const T (&x)[kReach], T (&out)[kReach]) {
  const T q = x[3] - T(0.5) * x[1], r = x[4] - T(0.5) * x[2], s = x[3] - T(2) * x[1], t = x[4] - T(2) * x[2];
  out[0] = x[0] + x[4] - T(2.5) * x[2];
  out[1] = q + T(kB) * r;
  out[2] = q - T(kB) * r;
  out[3] = s + T(kA) * t;
  out[4] = s - T(kA) * t;
  out[5] = x[1] + x[5] - T(2.5) * x[3];
}

// Six products to four outputs.
template <typename T>
COPGEN_INLINE void outputs(const T (&x)[kReach], T (&out)[kSide]) {
  const T sum = x[1] + x[2], sum_inverse = x[3] + x[4], difference = x[1] - x[2], difference_inverse = x[3] - x[4];
  out[0] = x[0] + sum - sum_inverse;
  out[1] = T(kA) * (difference - T(0.5) * difference_inverse);
  out[2] = T(2) * (sum - T(0.25) * sum_inverse);
  out[3] = x[5] + T(2 * kA) * (difference - T(0.125) * difference_inverse);
}

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

// S is stored, T computed with.
template <typename T, typename S>
COPGEN_INLINE void tile_values(const Places<const S>& in, const Places<S>& out, const S* scale, int64_t first,
                               int64_t count) {
  T rows[kReach][kReach][kLanes], buffers[kReach][kLanes], of_scale[kLanes];
  const T* factor = load(scale + first, count, of_scale);
  for (int j = 0; j < kReach; ++j) {
    const T* from[kReach];
    for (int i = 0; i < kReach; ++i) from[i] = load(in[i * kReach + j] + first, count, buffers[i]);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      T x[kReach], y[kReach];
      for (int i = 0; i < kReach; ++i) x[i] = from[i][c];
      values(x, y);
      for (int i = 0; i < kReach; ++i) rows[i][j][c] = y[i] * factor[c];
    }
  }
  for (int i = 0; i < kReach; ++i) {
    T* into[kReach];
    for (int j = 0; j < kReach; ++j) into[j] = place(out[i * kReach + j] + first, buffers[j]);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      T x[kReach], y[kReach];
      for (int j = 0; j < kReach; ++j) x[j] = rows[i][j][c];
      values(x, y);
      for (int j = 0; j < kReach; ++j) into[j][c] = y[j];
    }
    for (int j = 0; j < kReach; ++j) store(buffers[j], count, out[i * kReach + j] + first);
  }
}

template <typename T, typename S>
COPGEN_INLINE void tile_outputs(const Places<const S>& in, S* out, int64_t row, int64_t column, const After<S>& after,
                                int64_t first, int64_t count) {
  T rows[kSide][kReach][kLanes], buffers[kReach][kLanes], of_bias[kLanes], of_image[kSide][kLanes];
  const T zeros[kLanes] = {}, *bias = load(after.bias + first, count, of_bias);
  const T least = after.relu ? T(0) : -std::numeric_limits<T>::infinity();
  for (int j = 0; j < kReach; ++j) {
    const T* from[kReach];
    for (int i = 0; i < kReach; ++i) from[i] = load(in[i * kReach + j] + first, count, buffers[i]);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      T x[kReach], y[kSide];
      for (int i = 0; i < kReach; ++i) x[i] = from[i][c];
      outputs(x, y);
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
      T x[kReach], y[kSide];
      for (int j = 0; j < kReach; ++j) x[j] = rows[i][j][c];
      outputs(x, y);
      for (int j = 0; j < kSide; ++j) {
        const T sum = y[j] + bias[c] + image[j][c];
        into[j][c] = sum < least ? least : sum;  // NaN stays
      }
    }
    for (int j = 0; j < kSide; ++j) store(buffers[j], count, out + i * row + j * column + first);
  }
}

template <typename T, typename S>
COPGEN_INLINE void values_of_channels(const Places<const S>& in, const Places<S>& out, const S* scale,
                                      int64_t channels) {
  int64_t first = 0;
  for (; first + kLanes <= channels; first += kLanes) tile_values<T, S>(in, out, scale, first, kLanes);
  if (first < channels) tile_values<T, S>(in, out, scale, first, channels - first);
}

template <typename T, typename S>
COPGEN_INLINE void outputs_of_channels(const Places<const S>& in, S* out, int64_t row, int64_t column,
                                       const After<S>& after, int64_t channels) {
  int64_t first = 0;
  for (; first + kLanes <= channels; first += kLanes) tile_outputs<T, S>(in, out, row, column, after, first, kLanes);
  if (first < channels) tile_outputs<T, S>(in, out, row, column, after, first, channels - first);
}

}  // namespace body

#define COPGEN_TILES(T, S)                                                                                         \
  COPGEN_CLONES_##T void tile_values(const Places<const S>& in, const Places<S>& out, const S* scale, int64_t n) {  \
    body::values_of_channels<T, S>(in, out, scale, n);                                                             \
  }                                                                                                                \
  COPGEN_CLONES_##T void tile_outputs(const Places<const S>& in, S* out, int64_t row, int64_t column,              \
                                      const After<S>& after, int64_t n) {                                          \
    body::outputs_of_channels<T, S>(in, out, row, column, after, n);                                               \
  }

COPGEN_TILES(float, float)
COPGEN_TILES(double, double)
COPGEN_TILES(float, BFloat16)

// Calls run(image, row of tiles, number of that row among all) for every row, in threads.
template <typename F>
void for_each_row(int64_t images, int64_t rows, int64_t values, const F& run) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, values));
  at::parallel_for(0, images * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i / rows, i % rows, i);
  });
}

int64_t tiles(int64_t side) { return (side + kSide - 1) / kSide; }

// Where the 36 values of a tile are in [36, tiles, channels].
template <typename T>
void find(T* data, const at::Tensor& of, int64_t tile, bool inverse, Places<T>& places) {
  for (int i = 0; i < kReach; ++i)
    for (int j = 0; j < kReach; ++j)
      places[i * kReach + j] = data + (kOrder[inverse][i] * kReach + kOrder[inverse][j]) * of.stride(0) +
                               tile * of.stride(1);
}

template <typename S>
const S* read(const at::Tensor& x) {
  return static_cast<const S*>(x.const_data_ptr());
}

template <typename S>
void values(const at::Tensor& x, const std::optional<at::Tensor>& scale, int64_t first, bool inverse,
            const at::Tensor& out) {
  const int64_t images = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3), wide = tiles(width);
  const std::vector<S> zeros(channels), ones(channels, narrow<S>(widen(S{}) + 1));
  const S *in = read<S>(x), *scales = scale ? read<S>(*scale) : ones.data();
  const int64_t scale_stride = scale ? scale->stride(0) : 0;
  S* into = static_cast<S*>(out.mutable_data_ptr());
  for_each_row(images, out.size(1) / (images * wide), 36 * wide * channels, [&](int64_t image, int64_t row, int64_t i) {
    for (int64_t tile = 0; tile < wide; ++tile) {
      Places<const S> from;
      for (int k = 0; k < kReach * kReach; ++k) {
        const int64_t y = first + row * kSide + k / kReach - 1, z = tile * kSide + k % kReach - 1;
        const bool inside = y >= 0 && y < height && z >= 0 && z < width;
        from[k] = inside ? in + image * x.stride(0) + y * x.stride(1) + z * x.stride(2) : zeros.data();
      }
      Places<S> to;
      find(into, out, i * wide + tile, inverse, to);
      tile_values(from, to, scales + image * scale_stride, channels);
    }
  });
}

// Copies those outputs of a tile that lie inside the image: `high` rows and `right` columns of it are left from the
// tile's first output on. Source and destination have strides of their own.
template <typename S>
void copy_tile(const S* from, int64_t row, int64_t column, S* to, int64_t to_row, int64_t to_column, int64_t high,
               int64_t right, int64_t channels) {
  for (int64_t y = 0; y < std::min<int64_t>(high, kSide); ++y)
    for (int64_t z = 0; z < std::min<int64_t>(right, kSide); ++z)
      std::copy_n(from + y * row + z * column, channels, to + y * to_row + z * to_column);
}

template <typename S>
void outputs(const at::Tensor& products, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& image,
             bool relu, bool inverse, const at::Tensor& out) {
  const int64_t height = out.size(1), width = out.size(2), channels = out.size(3), wide = tiles(width);
  const int64_t down = out.stride(1), along = out.stride(2), across = channels, below = kSide * channels;
  const std::vector<S> zeros(channels);
  const S *in = read<S>(products), *biases = bias ? read<S>(*bias) : zeros.data();
  const S* images = image ? read<S>(*image) : nullptr;
  S* into = static_cast<S*>(out.mutable_data_ptr());
  for_each_row(out.size(0), tiles(height), 36 * wide * channels, [&](int64_t number, int64_t row, int64_t i) {
    std::vector<S> whole, whole_image;  // a tile beyond the border
    for (int64_t tile = 0; tile < wide; ++tile) {
      Places<const S> from;
      find(in, products, i * wide + tile, inverse, from);
      const int64_t y = row * kSide, z = tile * kSide, high = height - y, right = width - z;
      const int64_t at = number * out.stride(0) + y * down + z * along;
      After<S> after{biases, images ? images + at : nullptr, relu};
      if (high >= kSide && right >= kSide) {
        tile_outputs(from, into + at, down, along, after, channels);
        continue;
      }
      whole.resize(kSide * below);
      if (after.image) {
        whole_image.resize(kSide * below);
        copy_tile(after.image, down, along, whole_image.data(), below, across, high, right, channels);
        after.image = whole_image.data();
      }
      tile_outputs(from, whole.data(), below, across, after, channels);
      copy_tile<S>(whole.data(), below, across, into + at, down, along, high, right, channels);
    }
  });
}

}  // namespace

#define COPGEN_BY_DTYPE(dtype, function, ...) \
  switch (dtype) {                            \
    case at::kDouble:                         \
      return function<double>(__VA_ARGS__);   \
    case at::kBFloat16:                       \
      return function<BFloat16>(__VA_ARGS__); \
    default:                                  \
      return function<float>(__VA_ARGS__);    \
  }

void winograd_values(const at::Tensor& x, const std::optional<at::Tensor>& scale, int64_t first, bool inverse,
                     at::Tensor out) {
  COPGEN_BY_DTYPE(x.scalar_type(), values, x, scale, first, inverse, out)
}

void winograd_outputs(const at::Tensor& products, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& image, bool relu, bool inverse, at::Tensor out) {
  COPGEN_BY_DTYPE(products.scalar_type(), outputs, products, bias, image, relu, inverse, out)
}

}  // namespace copgen

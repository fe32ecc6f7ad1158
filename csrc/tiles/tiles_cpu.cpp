// 3 x 3 convolutions on the CPU, channels last, as fewer matrix products over channels: tiles of the images to values,
// their products with a prepared weight, and from these the outputs. See forms.h.
//
// A thread takes some tiles through all three, so that their values stay in its cache, and threads meet once. A tile is
// computed for some channels at once, which stay in the first-level cache. Values of bfloat16 are sums in float32,
// rounded once; their products are float32.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "forms.h"
#include "half.h"
#include "products.h"
#include "target_clones.h"

namespace copgen {
namespace {

constexpr int64_t kLanes = 32;        // channels at once
constexpr int64_t kProducts = 1152;   // most rows of the matrices of some tiles: 32 tiles of 36
constexpr int64_t kMany = 1024;       // channels in and out whose weights, read for some tiles at once, fill no cache
constexpr int64_t kNarrow = 64;       // fewest output channels of a thread, where tiles are fewer than threads
constexpr int64_t kGrain = 32768;     // fewest values of a thread
constexpr int64_t kCacheLine = 64;    // bytes

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

// A form's functions for some dtype, of which the loader chooses the processor's version; found by form in `Tile`.
template <typename F>
struct Tile;

#define COPGEN_DTYPE(F, T, S)                                                                                    \
  COPGEN_CLONES_##T void values_of_##F(const Places<const S, F::kReach * F::kReach>& in, S* out, int64_t stride, \
                                       const S* scale, int64_t channels) {                                       \
    body::values_of_channels<F, T, S>(in, out, stride, scale, channels);                                         \
  }                                                                                                              \
  COPGEN_CLONES_##T void outputs_of_##F(const T* in, int64_t stride, S* out, int64_t row, int64_t column,        \
                                        const After<S>& after, int64_t channels) {                               \
    body::outputs_of_channels<F, T, S>(in, stride, out, row, column, after, channels);                           \
  }

#define COPGEN_FORM(F)                                                    \
  COPGEN_DTYPE(F, float, float)                                           \
  COPGEN_DTYPE(F, double, double)                                         \
  COPGEN_DTYPE(F, float, BFloat16)                                        \
  template <>                                                             \
  struct Tile<F> {                                                        \
    template <typename... Arguments>                                      \
    static void values(const Arguments&... arguments) {                   \
      values_of_##F(arguments...);                                        \
    }                                                                     \
    template <typename... Arguments>                                      \
    static void outputs(const Arguments&... arguments) {                  \
      outputs_of_##F(arguments...);                                       \
    }                                                                     \
  };

COPGEN_FORM(Winograd)
COPGEN_FORM(WinogradAdjoint)
COPGEN_FORM(Differences)
COPGEN_FORM(DifferencesAdjoint)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename S>
const S* read(const at::Tensor& x) {
  return static_cast<const S*>(x.const_data_ptr());
}

template <typename S>
S* write(const at::Tensor& x) {
  return static_cast<S*>(x.mutable_data_ptr());
}

// How tiles are shared among threads: `count` tiles at once, and of their outputs `width` channels.
struct Shares {
  int64_t count, blocks, parts, width;

  Shares(int64_t tiles, int64_t most, int64_t outputs) {
    const int64_t threads = at::get_num_threads();
    count = ceil_div(tiles, threads * ceil_div(tiles, threads * most));
    blocks = ceil_div(tiles, count);
    const int64_t wanted = std::clamp<int64_t>(threads / blocks, 1, std::max<int64_t>(1, outputs / kNarrow));
    width = ceil_div(ceil_div(outputs, wanted), kLanes) * kLanes;
    parts = ceil_div(outputs, width);
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

// out = in x columns [from, from + width) of the weight, for the first `rows` of every matrix. Of a transposed weight,
// whose rows are not contiguous, out^T = weight^T x in^T.
template <typename T>
void multiply_all(const Matrices<T>& in, const at::Tensor& weight, int64_t rows, int64_t from, int64_t width,
                  const Matrices<T>& out) {
  const int64_t depth = in.columns;
  const bool transposed = weight.stride(2) != 1;
  std::vector<T> turned(transposed ? rows * (depth + width) : 0);
  for (int64_t k = 0; k < weight.size(0); ++k) {
    const T *values = in.data + k * in.stride, *matrix = read<T>(weight) + k * weight.stride(0) + from * weight.stride(2);
    T *into = out.data + k * out.stride, *result = turned.data() + rows * depth;
    if (!transposed) {
      multiply(rows, width, depth, values, depth, matrix, weight.stride(1), into, out.columns, false);
      continue;
    }
    transpose(rows, depth, values, depth, turned.data(), rows);
    multiply(width, rows, depth, matrix, weight.stride(2), turned.data(), rows, result, rows, false);
    transpose(width, rows, result, rows, into, out.columns);
  }
}

// The same of bfloat16, of which oneDNN's kernel takes the second factor in pairs of rows: a weight
// [products, depth / 2, outputs, 2], or where that is transposed in^T.
void multiply_all(const Matrices<BFloat16>& in, const at::Tensor& weight, int64_t rows, int64_t from, int64_t width,
                  const Matrices<float>& out) {
  using at::native::cpublas::brgemm;
  const int64_t depth = in.columns;
  const bool transposed = weight.dim() == 3;
  std::vector<BFloat16> turned(transposed ? rows * depth : 0);
  std::vector<float> result(transposed ? rows * width : 0);
  const auto number = [](const BFloat16* x) { return reinterpret_cast<const at::BFloat16*>(x); };
  for (int64_t k = 0; k < weight.size(0); ++k) {
    const BFloat16 *values = in.data + k * in.stride, *matrix = read<BFloat16>(weight) + k * weight.stride(0);
    float* into = out.data + k * out.stride;
    if (!transposed) {
      brgemm(rows, width, depth, depth, weight.size(2), out.columns, false, number(values), number(matrix + 2 * from),
             into);
      continue;
    }
    for (int64_t c = 0; c < depth; c += 2)
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(values + r * depth + c, 2, turned.data() + c * rows + 2 * r);
    brgemm(width, rows, depth, weight.stride(2), rows, rows, false, number(matrix + from * weight.stride(2)),
           number(turned.data()), result.data());
    transpose(width, rows, result.data(), rows, into, out.columns);
  }
}

// Copies those outputs of a tile that lie inside the image: `high` rows and `right` columns of it are left from the
// tile's first output on. The two may have different strides.
template <typename F, typename S>
void copy_tile(const S* from, int64_t row, int64_t column, S* to, int64_t to_row, int64_t to_column, int64_t high,
               int64_t right, int64_t channels) {
  for (int64_t y = 0; y < std::min<int64_t>(high, F::kSide); ++y)
    for (int64_t z = 0; z < std::min<int64_t>(right, F::kSide); ++z)
      std::copy_n(from + y * row + z * column, channels, to + y * to_row + z * to_column);
}

template <typename F, typename S>
void convolve(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
              const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& image, bool relu, int64_t first,
              const at::Tensor& out) {
  using T = std::conditional_t<std::is_same_v<S, BFloat16>, float, S>;
  constexpr int64_t kReach = F::kReach, kSide = F::kSide, kCount = F::kValues * F::kValues;
  const int64_t height = x.size(1), width = x.size(2), channels = x.size(3), outputs = out.size(3);
  const int64_t high = ceil_div(out.size(1), kSide), wide = ceil_div(out.size(2), kSide);
  const int64_t total = out.size(0) * high * wide, down = out.stride(1), along = out.stride(2);
  const int64_t most = (channels + outputs < kMany ? 1 : 4) * kProducts / kCount;
  const Shares shares(total, most, outputs);
  const int64_t depth = weight.dim() == 4 ? 2 * weight.size(1) : channels;  // with a row of zeros where that is odd

  const std::vector<S> zeros(std::max(channels, outputs)), ones(channels, narrow<S>(widen(S{}) + 1));
  const S *in = read<S>(x), *scales = scale ? read<S>(*scale) : ones.data();
  const S *biases = bias ? read<S>(*bias) : zeros.data(), *images = image ? read<S>(*image) : nullptr;
  const int64_t scale_stride = scale ? scale->stride(0) : 0;
  S* into = write<S>(out);

  const auto fill = [&](int64_t tile, S* values, int64_t stride) {
    const int64_t number = tile / (high * wide), row = first / kSide + tile / wide % high, column = tile % wide;
    Places<const S, kReach * kReach> from;
    for (int64_t k = 0; k < kReach * kReach; ++k) {
      const int64_t y = row * F::kStep + k / kReach - 1, z = column * F::kStep + k % kReach - 1;
      const bool inside = y >= 0 && y < height && z >= 0 && z < width;
      from[k] = inside ? in + number * x.stride(0) + y * x.stride(1) + z * x.stride(2) : zeros.data();
    }
    Tile<F>::values(from, values, stride, scales + number * scale_stride, channels);
  };
  const auto finish = [&](int64_t tile, const T* products, int64_t stride, int64_t channel, int64_t count) {
    const int64_t y = tile / wide % high * kSide, z = tile % wide * kSide, lower = out.size(1) - y;
    const int64_t right = out.size(2) - z, at = tile / (high * wide) * out.stride(0) + y * down + z * along + channel;
    After<S> after{biases + channel, images ? images + at : nullptr, relu};
    if (lower >= kSide && right >= kSide) return Tile<F>::outputs(products, stride, into + at, down, along, after, count);
    const int64_t below = kSide * count;  // a tile beyond the border
    std::vector<S> whole(kSide * below), whole_image(kSide * below);
    if (after.image) {
      copy_tile<F>(after.image, down, along, whole_image.data(), below, count, lower, right, count);
      after.image = whole_image.data();
    }
    Tile<F>::outputs(products, stride, whole.data(), below, count, after, count);
    copy_tile<F, S>(whole.data(), below, count, into + at, down, along, lower, right, count);
  };

  const int64_t grain = std::max<int64_t>(1, kGrain / (kCount * shares.count * (channels + shares.width)));
  at::parallel_for(0, shares.blocks * shares.parts, grain, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView no_gradients;
    const Matrices<S> values(kCount, shares.count, depth, x.scalar_type());
    const Matrices<T> products(kCount, shares.count, shares.width, at::CppTypeToScalarType<T>::value);
    if (depth > channels) values.memory.zero_();
    for (int64_t job = begin; job < end; ++job) {
      const int64_t tile = job / shares.parts * shares.count, channel = job % shares.parts * shares.width;
      const int64_t tiles = std::min(shares.count, total - tile), count = std::min(shares.width, outputs - channel);
      for (int64_t i = 0; i < tiles; ++i) fill(tile + i, values.data + i * depth, values.stride);
      multiply_all(values, weight, tiles, channel, count, products);
      for (int64_t i = 0; i < tiles; ++i)
        finish(tile + i, products.data + i * shares.width, products.stride, channel, count);
    }
    if (std::is_same_v<S, BFloat16>) at::native::cpublas::brgemm_release();
  });
}

template <typename F, typename... Arguments>
void convolve_by_dtype(const at::Tensor& x, const Arguments&... arguments) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return convolve<F, double>(x, arguments...);
    case at::kBFloat16:
      return convolve<F, BFloat16>(x, arguments...);
    default:
      return convolve<F, float>(x, arguments...);
  }
}

}  // namespace

void convolve_tiles(const at::Tensor& x, const at::Tensor& weight, c10::string_view form,
                    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& bias,
                    const std::optional<at::Tensor>& image, bool relu, int64_t first, at::Tensor out) {
  if (form == "winograd") return convolve_by_dtype<Winograd>(x, weight, scale, bias, image, relu, first, out);
  if (form == "winograd adjoint")
    return convolve_by_dtype<WinogradAdjoint>(x, weight, scale, bias, image, relu, first, out);
  if (form == "differences") return convolve_by_dtype<Differences>(x, weight, scale, bias, image, relu, first, out);
  convolve_by_dtype<DifferencesAdjoint>(x, weight, scale, bias, image, relu, first, out);
}

}  // namespace copgen

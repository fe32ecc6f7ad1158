// 3 x 3 convolutions on the CPU, channels last, as fewer matrix products over channels: tiles of the images to values,
// their products with a prepared weight, and from these the outputs. See forms.h.
//
// A thread takes some tiles through all three, so that their values stay in its cache, and threads meet once.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "forms.h"
#include "half.h"
#include "products.h"
#include "tile.h"

namespace copgen {
namespace {

constexpr int64_t kProducts = 1152;  // most rows of the matrices of some tiles: 32 tiles of 36
constexpr int64_t kMany = 1024;      // channels in and out whose weights, read for some tiles at once, fill no cache
constexpr int64_t kNarrow = 64;      // fewest output channels of a thread, where tiles are fewer than threads
constexpr int64_t kGrain = 32768;    // fewest values of a thread

COPGEN_VALUES(Winograd)
COPGEN_OUTPUTS(Winograd)
COPGEN_VALUES(WinogradAdjoint)
COPGEN_OUTPUTS(WinogradAdjoint)
COPGEN_VALUES(Differences)
COPGEN_OUTPUTS(Differences)
COPGEN_VALUES(DifferencesAdjoint)
COPGEN_OUTPUTS(DifferencesAdjoint)

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
  constexpr int64_t kSide = F::kSide, kCount = F::kValues * F::kValues;
  const int64_t channels = x.size(3), outputs = out.size(3);
  const int64_t high = ceil_div(out.size(1), kSide), wide = ceil_div(out.size(2), kSide);
  const int64_t total = out.size(0) * high * wide, down = out.stride(1), along = out.stride(2);
  const int64_t most = (channels + outputs < kMany ? 1 : 4) * kProducts / kCount;
  const Shares shares(total, most, outputs);
  const int64_t depth = weight.dim() == 4 ? 2 * weight.size(1) : channels;  // with a row of zeros where that is odd

  const Tiled<F, S> tiled(x, high, wide, first / kSide);
  const std::vector<S> no_bias(outputs), ones(channels, narrow<S>(widen(S{}) + 1));
  const S *scales = scale ? read<S>(*scale) : ones.data();
  const S *biases = bias ? read<S>(*bias) : no_bias.data(), *images = image ? read<S>(*image) : nullptr;
  const int64_t scale_stride = scale ? scale->stride(0) : 0;
  S* into = write<S>(out);

  const auto finish = [&](int64_t tile, const T* products, int64_t stride, int64_t channel, int64_t count) {
    const int64_t y = tile / wide % high * kSide, z = tile % wide * kSide, lower = out.size(1) - y;
    const int64_t right = out.size(2) - z, at = tile / (high * wide) * out.stride(0) + y * down + z * along + channel;
    After<S> after{biases + channel, images ? images + at : nullptr, relu};
    if (lower >= kSide && right >= kSide) return Outputs<F>::compute(products, stride, into + at, down, along, after, count);
    const int64_t below = kSide * count;  // a tile beyond the border
    std::vector<S> whole(kSide * below), whole_image(kSide * below);
    if (after.image) {
      copy_tile<F>(after.image, down, along, whole_image.data(), below, count, lower, right, count);
      after.image = whole_image.data();
    }
    Outputs<F>::compute(products, stride, whole.data(), below, count, after, count);
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
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t number = (tile + i) / (high * wide);
        tiled.values(tile + i, scales + number * scale_stride, values.data + i * depth, values.stride);
      }
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

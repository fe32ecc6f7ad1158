// Prepared weights of 3 x 3 convolutions on the CPU, and the gradients of weights by tiles. See forms.h.
//
// A weight's gradient is, for each product of the tiles, a matrix product of the images' values and of the gradients of
// what the products became, over all tiles. For some tiles at once all values are computed, then one thread adds to
// each sum; so the result does not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "forms.h"
#include "products.h"
#include "tile.h"

namespace copgen {
namespace {

constexpr int64_t kAtOnce = 1 << 19;  // values of some tiles, which stay in a shared cache
constexpr int64_t kFewest = 64;       // tiles at once, for which each sum is read and written
constexpr int64_t kRows = 64;         // input channels of a product
constexpr int64_t kChannels = 16;     // input channels of a weight at once: a cache line
constexpr int64_t kCount = Winograd::kValues * Winograd::kValues;

COPGEN_VALUES(Winograd)
COPGEN_VALUES(WinogradOutputsAdjoint)
COPGEN_VALUES(WinogradTaps)
COPGEN_OUTPUTS(WinogradTaps)

// sum (+)= in^T x gradient, of `rows` tiles.
template <typename T>
void add_product(const T* in, int64_t channels, const T* gradient, int64_t outputs, int64_t rows, T* sum, bool add) {
  std::vector<T> turned(kRows * rows);
  for (int64_t first = 0; first < channels; first += kRows) {
    const int64_t count = std::min(kRows, channels - first);
    transpose(rows, count, in + first, channels, turned.data(), rows);
    multiply(count, outputs, rows, turned.data(), rows, gradient, outputs, sum + first * outputs, outputs, add);
  }
}

// The gradient of a prepared weight: 36 matrices [C, O], one after another.
template <typename T>
Matrices<T> prepared_gradient(const at::Tensor& x, const at::Tensor& gradient) {
  const int64_t channels = x.size(3), outputs = gradient.size(3), high = ceil_div(x.size(1), Winograd::kSide);
  const int64_t wide = ceil_div(x.size(2), Winograd::kSide), total = x.size(0) * high * wide;
  const int64_t most = std::max(kFewest, kAtOnce / (kCount * (channels + outputs)));
  const int64_t blocks = ceil_div(total, most), size = ceil_div(total, blocks);
  const Tiled<Winograd, T> images(x, high, wide);
  const Tiled<WinogradOutputsAdjoint, T> gradients(gradient, high, wide);
  const Matrices<T> of_images(kCount, size, channels, x.scalar_type());
  const Matrices<T> of_gradients(kCount, size, outputs, x.scalar_type());
  const std::vector<T> ones(std::max(channels, outputs), 1);
  const Matrices<T> sums(kCount, channels, outputs, x.scalar_type());
  for (int64_t tile = 0; tile < total; tile += size) {
    const int64_t tiles = std::min(size, total - tile);
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        images.values(tile + i, ones.data(), of_images.data + i * channels, of_images.stride);
        gradients.values(tile + i, ones.data(), of_gradients.data + i * outputs, of_gradients.stride);
      }
    });
    at::parallel_for(0, kCount, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        add_product(of_images.data + k * of_images.stride, channels, of_gradients.data + k * of_gradients.stride,
                    outputs, tiles, sums.data + k * sums.stride, tile > 0);
    });
  }
  return sums;
}

// Calls work(first, count, taps) for some of the input channels at once; taps, [count, 9, O], are for it to overwrite.
template <typename T, typename Work>
void for_channels(int64_t channels, int64_t outputs, at::ScalarType dtype, const Work& work) {
  at::parallel_for(0, ceil_div(channels, kChannels), 1, [&](int64_t begin, int64_t end) {
    const Matrices<T> taps(kChannels * 9, 1, outputs, dtype);
    for (int64_t i = begin; i < end; ++i) work(i * kChannels, std::min(kChannels, channels - i * kChannels), taps);
  });
}

// Calls copy(tap of the weight [O, C, 3, 3], its place in `taps`) for some input channels. Either these or
// the outputs are adjacent in most weights: the inner loop is along those.
template <typename T, typename Copy>
void for_taps(const at::Tensor& weight, int64_t first, int64_t count, const Matrices<T>& taps, const Copy& copy) {
  const int64_t outputs = weight.size(0), of_output = weight.stride(0), of_channel = weight.stride(1);
  const bool by_output = of_output == 1;
  for (int64_t outer = 0; outer < (by_output ? count : outputs); ++outer)
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t at = first * of_channel + tap / 3 * weight.stride(2) + tap % 3 * weight.stride(3);
      if (by_output)
        for (int64_t o = 0; o < outputs; ++o) copy(at + outer * of_channel + o, (outer * 9 + tap) * taps.stride + o);
      else
        for (int64_t c = 0; c < count; ++c)
          copy(at + outer * of_output + c * of_channel, (c * 9 + tap) * taps.stride + outer);
    }
}

template <typename T>
void prepare(const at::Tensor& weight, const at::Tensor& out) {
  const int64_t outputs = weight.size(0);
  const std::vector<T> ones(outputs, 1);
  const T* in = read<T>(weight);
  for_channels<T>(weight.size(1), outputs, weight.scalar_type(),
                  [&](int64_t first, int64_t count, const Matrices<T>& taps) {
    for_taps<T>(weight, first, count, taps, [&](int64_t from, int64_t to) { taps.data[to] = in[from]; });
    for (int64_t c = 0; c < count; ++c) {
      Places<const T, 9> from;
      for (int64_t tap = 0; tap < 9; ++tap) from[tap] = taps.data + (c * 9 + tap) * taps.stride;
      T* into = write<T>(out) + (first + c) * out.stride(1);
      Values<WinogradTaps>::compute(from, into, out.stride(0), ones.data(), outputs);
    }
  });
}

template <typename T>
void weight_gradient(const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& out) {
  const int64_t outputs = gradient.size(3);
  const Matrices<T> sums = prepared_gradient<T>(x, gradient);
  const std::vector<T> zeros(outputs);
  T* into = write<T>(out);
  for_channels<T>(x.size(3), outputs, x.scalar_type(), [&](int64_t first, int64_t count, const Matrices<T>& taps) {
    for (int64_t c = 0; c < count; ++c)
      Outputs<WinogradTaps>::compute(sums.data + (first + c) * outputs, sums.stride, taps.data + c * 9 * taps.stride,
                                     3 * taps.stride, taps.stride, After<T>{zeros.data(), nullptr, false}, outputs);
    for_taps<T>(out, first, count, taps, [&](int64_t to, int64_t from) { into[to] = taps.data[from]; });
  });
}

}  // namespace

void prepare_tiles(const at::Tensor& weight, at::Tensor out) {
  weight.scalar_type() == at::kDouble ? prepare<double>(weight, out) : prepare<float>(weight, out);
}

void tiles_weight_gradient(const at::Tensor& x, const at::Tensor& gradient, at::Tensor out) {
  x.scalar_type() == at::kDouble ? weight_gradient<double>(x, gradient, out) : weight_gradient<float>(x, gradient, out);
}

}  // namespace copgen

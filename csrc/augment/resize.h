// Antialiased bilinear resize along one axis, and its transpose, as a table of taps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

namespace copgen {

// out[i] = sum over k < width of weight[i * width + k] * in[start[i] + k]; short rows are padded with weights of 0.
template <typename T>
struct Taps {
  int64_t count, width;
  std::vector<int64_t> start;
  std::vector<T> weight;
};

// The triangle filter from `length` pixels to `out`; with s = length / out, output i is centred on (i + 1/2) s, and
// pixel j weighs 1 - |j + 1/2 - centre| / max(s, 1), divided by the row's sum. `mirrored` reverses the outputs.
template <typename T>
Taps<T> resize_taps(int64_t length, int64_t out, bool mirrored) {
  const int64_t support = 2 * std::max(length, out);  // of a distance times 2 out, which is a whole number
  const int64_t width = std::min(length, (support + out - 1) / out);  // an open interval of that many pixels
  Taps<T> taps{out, width, std::vector<int64_t>(out), std::vector<T>(out * width)};
  for (int64_t x = 0; x < out; ++x) {
    const int64_t centre = (2 * (mirrored ? out - 1 - x : x) + 1) * length;
    // The first pixel j with (2 j + 1) out > centre - support, moved so that all taps lie inside.
    const int64_t below = centre - support - out;
    int64_t first = below < 0 ? 0 : below / (2 * out) + 1;
    first = std::min(first, length - width);
    taps.start[x] = first;
    T* weight = &taps.weight[x * width];
    T sum = 0;
    for (int64_t k = 0; k < width; ++k) {
      const int64_t distance = std::abs(centre - (2 * (first + k) + 1) * out);
      weight[k] = std::max(T(0), 1 - T(distance) / T(support));
      sum += weight[k];
    }
    for (int64_t k = 0; k < width; ++k) weight[k] /= sum;
  }
  return taps;
}

// The transpose: for each of `length` inputs the outputs that it contributes to. These are neighbours, so every sum is
// a gather.
template <typename T>
Taps<T> transposed(const Taps<T>& taps, int64_t length) {
  std::vector<int64_t> first(length, taps.count), last(length, -1);
  for (int64_t x = 0; x < taps.count; ++x)
    for (int64_t k = 0; k < taps.width; ++k)
      if (taps.weight[x * taps.width + k] != 0) {
        const int64_t j = taps.start[x] + k;
        first[j] = std::min(first[j], x);
        last[j] = std::max(last[j], x);
      }
  int64_t width = 1;
  for (int64_t j = 0; j < length; ++j) width = std::max(width, last[j] - first[j] + 1);
  Taps<T> result{length, width, std::vector<int64_t>(length), std::vector<T>(length * width)};
  for (int64_t j = 0; j < length; ++j) result.start[j] = std::min(first[j], taps.count - width);
  for (int64_t x = 0; x < taps.count; ++x)
    for (int64_t k = 0; k < taps.width; ++k) {
      const int64_t j = taps.start[x] + k;
      const T weight = taps.weight[x * taps.width + k];
      if (weight != 0) result.weight[j * width + x - result.start[j]] = weight;
    }
  return result;
}

}  // namespace copgen

// RandAugment on the CPU: Pillow's 8-bit operations, image by image; the definition is
// copgen_fast/ops/rand_augment/reference.py.
//
// An image of h x w pixels is red, green and blue planes one after the other, `3 p` values, p = h w. Arithmetic that
// Pillow does in single precision is written as double products rounded once, so that no compiler fuses it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "target_clones.h"
#include "warp.h"

namespace copgen {
namespace {

// As in copgen_fast/ops/rand_augment/params.py.
enum Operation : int64_t {
  kAutoContrast,
  kEqualize,
  kInvert,
  kRotate,
  kPosterize,
  kSolarize,
  kSolarizeAdd,
  kColor,
  kContrast,
  kBrightness,
  kSharpness,
};

using Table = uint8_t[256];

COPGEN_INLINE uint8_t blend(int degenerate, int level, float factor) {
  const float part = static_cast<float>(static_cast<double>(factor) * (level - degenerate));
  const float sum = static_cast<float>(static_cast<double>(degenerate) + part);
  return static_cast<uint8_t>(std::min(std::max(sum, 0.0f), 255.0f));
}

COPGEN_CLONES_float void to_luminance(const uint8_t* planes, int64_t p, uint8_t* gray) {
  for (int64_t i = 0; i < p; ++i)
    gray[i] = (19595 * planes[i] + 38470 * planes[p + i] + 7471 * planes[2 * p + i] + 0x8000) >> 16;
}

COPGEN_CLONES_float void blend_all(const uint8_t* degenerate, int64_t n, float factor, uint8_t* levels) {
  for (int64_t i = 0; i < n; ++i) levels[i] = blend(degenerate[i], levels[i], factor);
}

COPGEN_CLONES_float int64_t sum(const uint8_t* values, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

// Sums of three neighbours in each of three rows, the middle pixel five times, over 13 and rounded.
COPGEN_CLONES_float void smooth_row(const uint8_t* row, int64_t w, uint8_t* out) {
  const uint8_t *above = row - w, *below = row + w;
  for (int64_t x = 1; x + 1 < w; ++x) {
    const uint16_t total = above[x - 1] + above[x] + above[x + 1] + row[x - 1] + 5 * row[x] + row[x + 1] +
                           below[x - 1] + below[x] + below[x + 1];
    out[x] = static_cast<uint16_t>(total + 6) / 13;
  }
}

void smooth(const uint8_t* planes, int64_t h, int64_t w, uint8_t* out) {
  std::copy(planes, planes + 3 * h * w, out);
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t y = 1; y + 1 < h; ++y) smooth_row(planes + (c * h + y) * w, w, out + (c * h + y) * w);
}

// Operations of one level at a time, which vectorise; returns whether `operation` is one of them.
COPGEN_CLONES_float bool map_levels(int64_t operation, int argument, int64_t n, uint8_t* levels) {
  const uint8_t kept = 0xff << (8 - argument % 9);
  if (operation == kInvert)
    for (int64_t i = 0; i < n; ++i) levels[i] = 255 - levels[i];
  else if (operation == kPosterize)
    for (int64_t i = 0; i < n; ++i) levels[i] &= kept;
  else if (operation == kSolarize)
    for (int64_t i = 0; i < n; ++i) levels[i] = levels[i] < argument ? levels[i] : 255 - levels[i];
  else if (operation == kSolarizeAdd)
    for (int64_t i = 0; i < n; ++i) levels[i] = levels[i] < 128 ? std::min(levels[i] + argument, 255) : levels[i];
  else
    return false;
  return true;
}

// The level that replaces each, for one channel whose levels occur `counts` times among p.
void fill_table(Operation operation, float argument, int mean, const int64_t* counts, int64_t p, Table table) {
  int lowest = 0, highest = 255;
  while (lowest < 255 && counts[lowest] == 0) ++lowest;
  while (highest > 0 && counts[highest] == 0) --highest;
  const double scale = 255.0 / std::max(highest - lowest, 1);
  const int64_t step = (p - counts[highest]) / 255;
  int64_t before = step / 2;
  for (int level = 0; level < 256; ++level) {
    int64_t value = level;
    if (operation == kAutoContrast && highest > lowest)
      value = static_cast<int64_t>(level * scale - lowest * scale);
    else if (operation == kEqualize && step > 0)
      value = before / step;
    else if (operation == kContrast || operation == kBrightness)
      value = blend(mean, level, argument);
    table[level] = std::clamp<int64_t>(value, 0, 255);
    before += counts[level];
  }
}

void look_up(Operation operation, float argument, uint8_t* planes, int64_t p, uint8_t* spare) {
  int mean = 0;
  if (operation == kContrast) {
    to_luminance(planes, p, spare);
    mean = static_cast<int>(static_cast<double>(sum(spare, p)) / p + 0.5);
  }
  const bool counted = operation == kAutoContrast || operation == kEqualize;
  for (uint8_t *plane = planes; plane < planes + 3 * p; plane += p) {
    int64_t counts[256] = {};
    if (counted)
      for (int64_t i = 0; i < p; ++i) ++counts[plane[i]];
    Table table;
    fill_table(operation, argument, mean, counts, p, table);
    for (int64_t i = 0; i < p; ++i) plane[i] = table[plane[i]];
  }
}

#define COPGEN_DEFINE_SAMPLE(T)                                                                                       \
  COPGEN_CLONES_##T void sample(const T* quads, const Places<T>& places, Axes axes, bool cubic, int32_t h, int32_t w, \
                                uint8_t* out, int64_t p) {                                                            \
    cubic ? sample_row<T, 4>(axes, quads, places, h, w, out, p) : sample_row<T, 2>(axes, quads, places, h, w, out, p); \
  }                                                                                                                   \
  COPGEN_CLONES_##T void sample_plane(const T* plane, const Places<T>& places, Axes axes, bool cubic, int32_t h,       \
                                      int32_t w, int fill, uint8_t* out) {                                            \
    if (axes == kRows && cubic) return sample_line<T, 4, kRows>(plane, places, h, w, fill, out);                      \
    if (axes == kRows) return sample_line<T, 2, kRows>(plane, places, h, w, fill, out);                               \
    if (cubic) return sample_line<T, 4, kColumns>(plane, places, h, w, fill, out);                                    \
    sample_line<T, 2, kColumns>(plane, places, h, w, fill, out);                                                      \
  }                                                                                                                   \
  COPGEN_CLONES_##T void to_floating(const uint8_t* levels, int64_t n, T* values) {                                   \
    for (int64_t i = 0; i < n; ++i) values[i] = levels[i];                                                            \
  }                                                                                                                   \
  COPGEN_CLONES_##T void place(const Row& row, Axes axes, Places<T>& places) {                                        \
    if (axes == kRows) return fill_places<T, kRows>(row, places);                                                     \
    if (axes == kColumns) return fill_places<T, kColumns>(row, places);                                               \
    fill_places<T, kBoth>(row, places);                                                                               \
  }                                                                                                                   \
  COPGEN_CLONES_##T void to_quads(const uint8_t* planes, int64_t p, T* quads) {                                       \
    for (int64_t i = 0; i < p; ++i) {                                                                                 \
      const typename Quad<T>::Whole pixel = {planes[i], planes[p + i], planes[2 * p + i], 0};                         \
      const auto quad = __builtin_convertvector(pixel, typename Quad<T>::Vector);                                     \
      std::memcpy(quads + 4 * i, &quad, sizeof quad);                                                                 \
    }                                                                                                                 \
  }                                                                                                                   \
  /* Whole levels of n values in [0, 1]; returns whether none is NaN. Adding `shift` leaves them in the last bits. */ \
  COPGEN_CLONES_##T bool to_levels(const T* image, int64_t n, uint8_t* levels) {                                      \
    constexpr T shift = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);                                                   \
    int unfit = 0;                                                                                                    \
    for (int64_t i = 0; i < n; ++i) {                                                                                 \
      const T scaled = image[i] * 255, bounded = scaled > 0 ? (scaled < 255 ? scaled : T(255)) : T(0);                \
      unfit |= scaled != scaled;                                                                                      \
      levels[i] = static_cast<int32_t>((bounded + shift) - shift);                                                    \
    }                                                                                                                 \
    return !unfit;                                                                                                    \
  }                                                                                                                   \
  COPGEN_CLONES_##T void from_levels(const uint8_t* levels, int64_t n, T* image) {                                    \
    for (int64_t i = 0; i < n; ++i) image[i] = static_cast<T>(levels[i]) / 255;                                       \
  }

COPGEN_DEFINE_SAMPLE(float)
COPGEN_DEFINE_SAMPLE(double)

template <typename T>
struct Scratch {
  std::vector<uint8_t> planes, spare;
  std::vector<T> quads;
  Places<T> places;

  Scratch(int64_t h, int64_t w) : planes(3 * h * w), spare(3 * h * w), quads(4 * h * w), places(w) {}
};

// One operation on scratch.planes.
template <typename T>
void apply(Scratch<T>& scratch, int64_t operation, float argument, bool cubic, const double* matrix, int64_t h,
           int64_t w) {
  const int64_t p = h * w;
  uint8_t *planes = scratch.planes.data(), *spare = scratch.spare.data();
  if (operation == kColor) {
    to_luminance(planes, p, spare);
    for (int64_t c = 0; c < 3; ++c) blend_all(spare, p, argument, planes + c * p);
  } else if (operation == kSharpness) {
    smooth(planes, h, w, spare);
    blend_all(spare, 3 * p, argument, planes);
  } else if (operation == kRotate || operation > kSharpness) {
    const bool same_row = matrix[3] == 0 && matrix[4] == 1 && matrix[5] == 0;
    const bool same_column = matrix[0] == 1 && matrix[1] == 0 && matrix[2] == 0;
    const Axes axes = same_row ? kRows : same_column ? kColumns : kBoth;
    // A shear along columns takes every pixel from other rows than its neighbours: pixels are as good as planes for it.
    const bool by_plane = same_row || (same_column && matrix[3] == 0);
    T* source = scratch.quads.data();
    by_plane ? to_floating(planes, 3 * p, source) : to_quads(planes, p, source);
    for (int64_t x = 0; x < w; ++x) {
      scratch.places.ax[x] = matrix[0] * (x + 0.5);
      scratch.places.dxs[x] = matrix[3] * (x + 0.5);
    }
    for (int64_t y = 0; y < h; ++y) {
      const int32_t number = y, height = h, width = w;
      place({matrix[1] * (y + 0.5), matrix[2], matrix[4] * (y + 0.5), matrix[5], number, height, width}, axes,
            scratch.places);
      if (by_plane)
        for (int c = 0; c < 3; ++c)
          sample_plane(source + c * p, scratch.places, axes, cubic, h, w, kFill[c], planes + c * p + y * w);
      else
        sample(source, scratch.places, axes, cubic, h, w, planes + y * w, p);
    }
  } else if (!map_levels(operation, static_cast<int>(argument), 3 * p, planes)) {
    look_up(static_cast<Operation>(operation), argument, planes, p, spare);
  }
}

template <typename T>
void run(const at::Tensor& images, const at::Tensor& operation, const at::Tensor& argument, const at::Tensor& cubic,
         const at::Tensor& affine, const at::Tensor& views) {
  const int64_t h = images.size(2), w = images.size(3), size = 3 * h * w, steps = operation.size(1);
  const T* in = images.const_data_ptr<T>();
  T* out = views.mutable_data_ptr<T>();
  const int64_t* number = operation.const_data_ptr<int64_t>();
  const float* value = argument.const_data_ptr<float>();
  const bool* kernel = cubic.const_data_ptr<bool>();
  const double* matrix = affine.const_data_ptr<double>();
  at::parallel_for(0, images.size(0), 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(h, w);
    for (int64_t n = begin; n < end; ++n) {
      const T* image = in + n * size;
      T* view = out + n * size;
      const int64_t first = n * steps, last = first + steps;
      if (std::all_of(number + first, number + last, [](int64_t k) { return k < 0; })) {
        std::copy(image, image + size, view);
      } else if (!to_levels(image, size, scratch.planes.data())) {
        std::fill(view, view + size, std::numeric_limits<T>::quiet_NaN());
      } else {
        for (int64_t k = first; k < last; ++k)
          if (number[k] >= 0) apply(scratch, number[k], value[k], kernel[k], matrix + 6 * k, h, w);
        from_levels(scratch.planes.data(), size, view);
      }
    }
  });
}

}  // namespace

void rand_augment(const at::Tensor& images, const at::Tensor& operation, const at::Tensor& argument,
                  const at::Tensor& cubic, const at::Tensor& affine, at::Tensor views) {
  if (images.scalar_type() == at::kDouble)
    run<double>(images, operation, argument, cubic, affine, views);
  else
    run<float>(images, operation, argument, cubic, affine, views);
}

}  // namespace copgen

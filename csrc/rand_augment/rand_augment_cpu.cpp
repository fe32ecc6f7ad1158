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
constexpr uint8_t kFill[3] = {124, 116, 104};

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

// Red, green, blue and nothing of a pixel.
template <typename T>
struct Quad {
  typedef T Vector __attribute__((vector_size(4 * sizeof(T))));
  typedef int32_t Whole __attribute__((vector_size(16)));
};

// Where the pixels of a row come from: the integer part of each place and its fraction, for pixels first .. last - 1,
// whose places are in the image. The products are made once an image, which leaves nothing to fuse.
template <typename T>
struct Places {
  std::vector<double> ax, dxs;
  std::vector<int32_t> left, top;
  std::vector<T> dx, dy;
  int32_t first = 0, last = 0;

  explicit Places(int64_t w) : ax(w), dxs(w), left(w), top(w), dx(w), dy(w) {}
};

struct Row {
  double by, c, ey, f;
  int32_t h, w;
};

template <typename T>
COPGEN_INLINE void fill_places(const Row& row, Places<T>& places) {
  const double *ax = places.ax.data(), *dx = places.dxs.data();
  const auto inside = [&](int32_t x) {
    const double sx = ax[x] + row.by + row.c, sy = dx[x] + row.ey + row.f;
    return sx >= 0 && sx < row.w && sy >= 0 && sy < row.h;
  };
  places.first = 0, places.last = row.w;
  while (places.first < row.w && !inside(places.first)) ++places.first;
  while (places.last > places.first && !inside(places.last - 1)) --places.last;
  int32_t *left = places.left.data(), *top = places.top.data();
  T *fx = places.dx.data(), *fy = places.dy.data();
  for (int32_t x = places.first; x < places.last; ++x) {
    const double px = ax[x] + row.by + row.c - 0.5, py = dx[x] + row.ey + row.f - 0.5;
    // From 0 on, conversion rounds down.
    left[x] = static_cast<int32_t>(px + 1) - 1;
    top[x] = static_cast<int32_t>(py + 1) - 1;
    fx[x] = static_cast<T>(px - left[x]);
    fy[x] = static_cast<T>(py - top[x]);
  }
}

// Cubic interpolation (a = -1) at d between `here` and `after`, exact where all four are the same: in double precision
// by Pillow's formula, in single by a shorter form of it.
template <typename V, typename T>
COPGEN_INLINE V cubic(V before, V here, V after, V beyond, T d) {
  if constexpr (sizeof(T) == 8) {
    const V second = 2 * (before - here) + after - beyond, third = here - before - after + beyond;
    return here + d * (after - before + d * (second + d * third));
  } else {
    const T e = d * (1 - d);
    return here + (before - here) * (e * (d - 1)) + (after - here) * (d + d * e) - (beyond - here) * (d * e);
  }
}

template <typename T, int taps>
COPGEN_INLINE void sample_row(const T* quads, const Places<T>& places, int32_t h, int32_t w, uint8_t* out, int64_t p) {
  typedef typename Quad<T>::Vector V;
  constexpr int32_t before = taps / 2 - 1;
  for (int c = 0; c < 3; ++c) {
    std::memset(out + c * p, kFill[c], places.first);
    std::memset(out + c * p + places.last, kFill[c], w - places.last);
  }
  for (int32_t x = places.first; x < places.last; ++x) {
    const int32_t left = places.left[x] - before, top = places.top[x] - before;
    const bool clear = left >= 0 && top >= 0 && left + taps <= w && top + taps <= h;
    V rows[taps];
    for (int j = 0; j < taps; ++j) {
      const T* row = quads + 4 * static_cast<int64_t>(clear ? top + j : std::clamp(top + j, 0, h - 1)) * w;
      V near[taps];
      for (int i = 0; i < taps; ++i)
        std::memcpy(&near[i], row + 4 * (clear ? left + i : std::clamp(left + i, 0, w - 1)), sizeof(V));
      if constexpr (taps == 2)
        rows[j] = near[0] + (near[1] - near[0]) * places.dx[x];
      else
        rows[j] = cubic(near[0], near[1], near[2], near[3], places.dx[x]);
    }
    V value;
    if constexpr (taps == 2) {
      value = rows[0] + (rows[1] - rows[0]) * places.dy[x];
    } else {
      value = cubic(rows[0], rows[1], rows[2], rows[3], places.dy[x]);
      const V zero = {}, most = zero + 255;
      value = value < zero ? zero : value;
      value = value > most ? most : value;
    }
    const auto levels = __builtin_convertvector(value, typename Quad<T>::Whole);
    for (int c = 0; c < 3; ++c) out[c * p + x] = levels[c];
  }
}

#define COPGEN_DEFINE_SAMPLE(T)                                                                                       \
  COPGEN_CLONES_##T void sample(const T* quads, const Places<T>& places, bool cubic, int32_t h, int32_t w,            \
                                uint8_t* out, int64_t p) {                                                            \
    cubic ? sample_row<T, 4>(quads, places, h, w, out, p) : sample_row<T, 2>(quads, places, h, w, out, p);            \
  }                                                                                                                   \
  COPGEN_CLONES_##T void place(const Row& row, Places<T>& places) { fill_places(row, places); }                       \
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
    to_quads(planes, p, scratch.quads.data());
    for (int64_t x = 0; x < w; ++x) {
      scratch.places.ax[x] = matrix[0] * (x + 0.5);
      scratch.places.dxs[x] = matrix[3] * (x + 0.5);
    }
    for (int64_t y = 0; y < h; ++y) {
      const int32_t height = h, width = w;
      place({matrix[1] * (y + 0.5), matrix[2], matrix[4] * (y + 0.5), matrix[5], height, width}, scratch.places);
      sample(scratch.quads.data(), scratch.places, cubic, h, w, planes + y * w, p);
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

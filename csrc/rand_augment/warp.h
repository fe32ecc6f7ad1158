// Affine operations on 8-bit images, a row at a time: where its pixels come from, and interpolation between them.
//
// Inline in every target's clone of the functions that call it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "target_clones.h"

namespace copgen {
namespace {

// What lies beyond an image's border, as in copgen_fast/ops/rand_augment/params.py.
constexpr uint8_t kFill[3] = {124, 116, 104};

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
  int32_t y, h, w;
};

// Along which axes places fall between pixels: shears and shifts move pixels along one alone.
enum Axes { kRows, kColumns, kBoth };

template <typename T, Axes axes>
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
    // From 0 on, conversion rounds down.
    if constexpr (axes != kColumns) {
      const double px = ax[x] + row.by + row.c - 0.5;
      left[x] = static_cast<int32_t>(px + 1) - 1;
      fx[x] = static_cast<T>(px - left[x]);
    } else {
      left[x] = x;
    }
    if constexpr (axes != kRows) {
      const double py = dx[x] + row.ey + row.f - 0.5;
      top[x] = static_cast<int32_t>(py + 1) - 1;
      fy[x] = static_cast<T>(py - top[x]);
    } else {
      top[x] = row.y;
    }
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

template <typename V, typename T, int taps>
COPGEN_INLINE V interpolate(const V* near, T d) {
  if constexpr (taps == 2)
    return near[0] + (near[1] - near[0]) * d;
  else
    return cubic(near[0], near[1], near[2], near[3], d);
}

template <typename T, int taps, Axes axes>
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
      if constexpr (axes == kColumns) {  // interpolation on a pixel's own column gives the pixel exactly
        std::memcpy(&rows[j], row + 4 * (left + before), sizeof(V));
      } else {
        V near[taps];
        for (int i = 0; i < taps; ++i)
          std::memcpy(&near[i], row + 4 * (clear ? left + i : std::clamp(left + i, 0, w - 1)), sizeof(V));
        rows[j] = interpolate<V, T, taps>(near, places.dx[x]);
      }
    }
    V value = interpolate<V, T, taps>(rows, places.dy[x]);
    if constexpr (taps == 4) {
      const V zero = {}, most = zero + 255;
      value = value < zero ? zero : value;
      value = value > most ? most : value;
    }
    const auto levels = __builtin_convertvector(value, typename Quad<T>::Whole);
    for (int c = 0; c < 3; ++c) out[c * p + x] = levels[c];
  }
}

template <typename T, int taps>
COPGEN_INLINE void sample_row(Axes axes, const T* quads, const Places<T>& places, int32_t h, int32_t w, uint8_t* out,
                              int64_t p) {
  if (axes == kColumns) return sample_row<T, taps, kColumns>(quads, places, h, w, out, p);
  sample_row<T, taps, kBoth>(quads, places, h, w, out, p);
}

// A row of one channel of `plane` [h, w] whose places lie on one row of it (kRows) or on its own columns (kColumns).
// Where the neighbours of all its pixels lie side by side, as a shear's do along rows, whole vectors of pixels are made
// at once.
template <typename T, int taps, Axes axes>
COPGEN_INLINE void sample_line(const T* plane, const Places<T>& places, int32_t h, int32_t w, int fill, uint8_t* out) {
  constexpr int32_t before = taps / 2 - 1;
  const int32_t first = places.first, last = places.last;
  std::memset(out, fill, first);
  std::memset(out + last, fill, w - last);
  if (first == last) return;
  const T* fraction = axes == kRows ? places.dx.data() : places.dy.data();
  const auto level = [](const T* near, T d) {
    const T value = interpolate<T, T, taps>(near, d);
    return static_cast<uint8_t>(static_cast<int32_t>(taps == 4 ? std::clamp(value, T(0), T(255)) : value));
  };
  const auto one_by_one = [&](int32_t x, int32_t end) {
    for (; x < end; ++x) {
      T near[taps];
      for (int j = 0; j < taps; ++j)
        near[j] = axes == kRows ? plane[places.top[x] * w + std::clamp(places.left[x] - before + j, 0, w - 1)]
                                : plane[std::clamp(places.top[x] - before + j, 0, h - 1) * w + x];
      out[x] = level(near, fraction[x]);
    }
  };
  const int32_t shift = places.left[first] - first, top = places.top[first];
  int32_t apart = 0;
  for (int32_t x = first; x < last; ++x) apart |= (places.left[x] - x - shift) | (places.top[x] - top);
  if (apart) return one_by_one(first, last);
  const T* from[taps];
  for (int j = 0; j < taps; ++j)
    from[j] = axes == kRows ? plane + top * w + shift - before + j : plane + std::clamp(top - before + j, 0, h - 1) * w;
  const int32_t begin = axes == kRows ? std::clamp(before - shift, first, last) : first;
  const int32_t end = axes == kRows ? std::clamp(w - taps + 1 + before - shift, begin, last) : last;
  one_by_one(first, begin);
  for (int32_t x = begin; x < end; ++x) {
    T near[taps];
    for (int j = 0; j < taps; ++j) near[j] = from[j][x];
    out[x] = level(near, fraction[x]);
  }
  one_by_one(end, last);
}

}  // namespace
}  // namespace copgen

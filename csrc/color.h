// The pixelwise steps of the augmentation on a row of n pixels, red, green and blue one after the other, and their
// gradients. Forward steps change the row x; backward ones take the x from before the step and change the gradient g.
#pragma once

#include "vectorize.h"

namespace copgen {

enum Kind : int64_t { kBrightness = 0, kContrast = 1, kSaturation = 2, kHue = 3 };

template <typename T>
struct Luminance {  // ITU-R 601 with torchvision's digits
  static constexpr T red = T(0.2989), green = T(0.587), blue = T(0.114);
};

template <typename T>
COPGEN_INLINE T luminance(T r, T g, T b) {
  return Luminance<T>::red * r + Luminance<T>::green * g + Luminance<T>::blue * b;
}

// Keeps NaN, as every comparison with it is false.
template <typename T>
COPGEN_INLINE T clamp01(T value) {
  value = value < T(0) ? T(0) : value;
  return value > T(1) ? T(1) : value;
}

// clamp(f x + offset), for brightness (offset 0) and contrast ((1 - f) pivot).
template <typename T>
COPGEN_INLINE void blend_with_constant(T* __restrict x, int64_t n, T f, T offset) {
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = clamp01(f * x[i] + offset);
}

// Returns the gradient's sum where the clamp lets it pass: what the pivot receives, less the factor 1 - f.
template <typename T>
COPGEN_INLINE T blend_with_constant_backward(
    const T* __restrict x, T* __restrict g, int64_t n, T f, T offset, bool straight_through) {
  constexpr int64_t kLanes = 16;  // partial sums, for the vector units
  T sums[kLanes] = {};
  const int64_t size = 3 * n, whole = size - size % kLanes;
  const T low = straight_through ? -INFINITY : T(0), high = straight_through ? INFINITY : T(1);
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const T blended = f * x[i + k] + offset;
      const T passed = (blended >= low) & (blended <= high) ? g[i + k] : T(0);
      sums[k] += passed;
      g[i + k] = f * passed;
    }
  for (int64_t i = whole; i < size; ++i) {
    const T blended = f * x[i] + offset;
    const T passed = (blended >= low) & (blended <= high) ? g[i] : T(0);
    sums[0] += passed;
    g[i] = f * passed;
  }
  T sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += sums[k];
  return sum;
}

template <typename T>
COPGEN_INLINE void saturate(T* __restrict x, int64_t n, T f) {
  T *__restrict r = x, *__restrict g = x + n, *__restrict b = x + 2 * n;
  for (int64_t i = 0; i < n; ++i) {
    const T pivot = (1 - f) * luminance(r[i], g[i], b[i]);
    r[i] = clamp01(f * r[i] + pivot);
    g[i] = clamp01(f * g[i] + pivot);
    b[i] = clamp01(f * b[i] + pivot);
  }
}

template <typename T>
COPGEN_INLINE void saturate_backward(const T* __restrict x, T* __restrict g, int64_t n, T f, bool straight_through) {
  const T *__restrict xr = x, *__restrict xg = x + n, *__restrict xb = x + 2 * n;
  T *__restrict gr = g, *__restrict gg = g + n, *__restrict gb = g + 2 * n;
  const T low = straight_through ? -INFINITY : T(0), high = straight_through ? INFINITY : T(1);
  for (int64_t i = 0; i < n; ++i) {
    const T pivot = (1 - f) * luminance(xr[i], xg[i], xb[i]);
    const T yr = f * xr[i] + pivot, yg = f * xg[i] + pivot, yb = f * xb[i] + pivot;
    const T r = (yr >= low) & (yr <= high) ? gr[i] : T(0);
    const T gn = (yg >= low) & (yg <= high) ? gg[i] : T(0);
    const T b = (yb >= low) & (yb <= high) ? gb[i] : T(0);
    const T shared = (1 - f) * (r + gn + b);
    gr[i] = f * r + Luminance<T>::red * shared;
    gg[i] = f * gn + Luminance<T>::green * shared;
    gb[i] = f * b + Luminance<T>::blue * shared;
  }
}

// A pixel's largest and smallest channel, and its hue in sixths of a turn as offset + sixths / spread. Where
// channels tie, the first counts. Gray has spread 0 and hue 0.
template <typename T>
struct Hue {
  bool red_high, green_high, red_low, green_low;
  T high, spread, ratio, turn;

  COPGEN_INLINE Hue(T r, T g, T b, T shift) {
    red_high = (r >= g) & (r >= b);
    green_high = !red_high & (g >= b);
    red_low = (r <= g) & (r <= b);
    green_low = !red_low & (g <= b);
    high = red_high ? r : green_high ? g : b;
    spread = high - (red_low ? r : green_low ? g : b);
    const T sixths = red_high ? g - b : green_high ? b - r : r - g;
    ratio = sixths / (spread == 0 ? T(1) : spread);
    turn = (ratio + (red_high ? T(0) : green_high ? T(2) : T(4))) / 6 + shift;
  }

  // Channel n = 5, 3, 1 (red, green, blue) is high - spread * clamp(ramp, 0, 1); `side` is minus the ramp's slope.
  COPGEN_INLINE T ramp(T n, T& side) const {
    const T place = turn + n / 6;
    const T centred = place - static_cast<T>(static_cast<int32_t>(place)) - T(1) / 3;
    side = centred < 0 ? T(-1) : T(1);
    return 2 - 6 * (centred < 0 ? -centred : centred);
  }
};

// `shift` in [0, 1) turns.
template <typename T>
COPGEN_INLINE void shift_hue(T* __restrict x, int64_t n, T shift) {
  T *__restrict r = x, *__restrict g = x + n, *__restrict b = x + 2 * n;
  for (int64_t i = 0; i < n; ++i) {
    const Hue<T> hue(r[i], g[i], b[i], shift);
    T side;
    r[i] = hue.high - hue.spread * clamp01(hue.ramp(5, side));
    g[i] = hue.high - hue.spread * clamp01(hue.ramp(3, side));
    b[i] = hue.high - hue.spread * clamp01(hue.ramp(1, side));
  }
}

template <typename T>
COPGEN_INLINE void shift_hue_backward(const T* __restrict x, T* __restrict g, int64_t n, T shift) {
  const T *__restrict xr = x, *__restrict xg = x + n, *__restrict xb = x + 2 * n;
  T *__restrict gr = g, *__restrict gg = g + n, *__restrict gb = g + 2 * n;
  for (int64_t i = 0; i < n; ++i) {
    const Hue<T> hue(xr[i], xg[i], xb[i], shift);
    T sr, sg, sb;
    const T vr = hue.ramp(5, sr), vg = hue.ramp(3, sg), vb = hue.ramp(1, sb);
    const T to_high = gr[i] + gg[i] + gb[i];
    const T to_share = gr[i] * clamp01(vr) + gg[i] * clamp01(vg) + gb[i] * clamp01(vb);
    T to_ramp = ((vr >= 0) & (vr <= 1) ? sr * gr[i] : T(0)) + ((vg >= 0) & (vg <= 1) ? sg * gg[i] : T(0)) +
        ((vb >= 0) & (vb <= 1) ? sb * gb[i] : T(0));
    to_ramp = hue.spread == 0 ? T(0) : to_ramp;
    // To the largest channel, the smallest, and the two whose difference over the spread is the hue.
    const T to_spread = -to_share - to_ramp * hue.ratio;
    const T at_high = to_high + to_spread;
    gr[i] = (hue.red_high ? at_high : T(0)) - (hue.red_low ? to_spread : T(0)) +
        (hue.red_high ? T(0) : hue.green_high ? -to_ramp : to_ramp);
    gg[i] = (hue.green_high ? at_high : T(0)) - (hue.green_low ? to_spread : T(0)) +
        (hue.red_high ? to_ramp : hue.green_high ? T(0) : -to_ramp);
    const bool blue_high = !hue.red_high & !hue.green_high, blue_low = !hue.red_low & !hue.green_low;
    gb[i] = (blue_high ? at_high : T(0)) - (blue_low ? to_spread : T(0)) +
        (hue.red_high ? -to_ramp : hue.green_high ? to_ramp : T(0));
  }
}

template <typename T>
COPGEN_INLINE T sum_of_luminance(const T* x, int64_t n) {
  constexpr int64_t kLanes = 16;
  T sums[kLanes] = {};
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) sums[k] += luminance(x[i + k], x[n + i + k], x[2 * n + i + k]);
  for (int64_t i = whole; i < n; ++i) sums[0] += luminance(x[i], x[n + i], x[2 * n + i]);
  T sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += sums[k];
  return sum;
}

template <typename T>
COPGEN_INLINE void to_gray(T* __restrict x, int64_t n) {
  T *__restrict r = x, *__restrict g = x + n, *__restrict b = x + 2 * n;
  for (int64_t i = 0; i < n; ++i) r[i] = g[i] = b[i] = luminance(r[i], g[i], b[i]);
}

template <typename T>
COPGEN_INLINE void to_gray_backward(T* __restrict g, int64_t n) {
  T *__restrict gr = g, *__restrict gg = g + n, *__restrict gb = g + 2 * n;
  for (int64_t i = 0; i < n; ++i) {
    const T sum = gr[i] + gg[i] + gb[i];
    gr[i] = Luminance<T>::red * sum;
    gg[i] = Luminance<T>::green * sum;
    gb[i] = Luminance<T>::blue * sum;
  }
}

// Sends the pivot's gradient, already divided by the number of pixels, to every pixel's luminance.
template <typename T>
COPGEN_INLINE void add_to_luminance(T* __restrict g, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) {
    g[i] += Luminance<T>::red * value;
    g[n + i] += Luminance<T>::green * value;
    g[2 * n + i] += Luminance<T>::blue * value;
  }
}

template <typename T>
COPGEN_INLINE void solarize(T* __restrict x, int64_t n, T threshold) {
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = x[i] >= threshold ? 1 - x[i] : x[i];
}

template <typename T>
COPGEN_INLINE void solarize_backward(const T* __restrict x, T* __restrict g, int64_t n, T threshold) {
  for (int64_t i = 0; i < 3 * n; ++i) g[i] = x[i] >= threshold ? -g[i] : g[i];
}

}  // namespace copgen

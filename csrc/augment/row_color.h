// Bodies of the colour functions of rows.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "rows.h"

namespace copgen {
namespace body {

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
#pragma omp simd
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = clamp01(f * x[i] + offset);
}

// Returns the sum of the gradient that the clamp passes: the pivot's gradient over 1 - f.
template <typename T>
COPGEN_INLINE T blend_with_constant_backward(const T* __restrict x, T* __restrict g, int64_t n, T f, T offset,
                                             bool straight_through) {
  constexpr int64_t kLanes = 16;  // partial sums, for the vector units
  T sums[kLanes] = {};
  const int64_t size = 3 * n, whole = size - size % kLanes;
  const T low = straight_through ? -INFINITY : T(0), high = straight_through ? INFINITY : T(1);
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const T blended = f * x[i + k] + offset;
      const T passed = (blended > low) & (blended < high) ? g[i + k] : T(0);
      sums[k] += passed;
      g[i + k] = f * passed;
    }
  for (int64_t i = whole; i < size; ++i) {
    const T blended = f * x[i] + offset;
    const T passed = (blended > low) & (blended < high) ? g[i] : T(0);
    sums[0] += passed;
    g[i] = f * passed;
  }
  T sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += sums[k];
  return sum;
}

template <typename T>
COPGEN_INLINE void saturate(T* __restrict x, int64_t n, T f) {
  T* __restrict r = x, * __restrict g = x + n, * __restrict b = x + 2 * n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T pivot = (1 - f) * luminance(r[i], g[i], b[i]);
    r[i] = clamp01(f * r[i] + pivot);
    g[i] = clamp01(f * g[i] + pivot);
    b[i] = clamp01(f * b[i] + pivot);
  }
}

template <typename T>
COPGEN_INLINE void saturate_backward(const T* __restrict x, T* __restrict g, int64_t n, T f, bool straight_through) {
  const T* __restrict xr = x, * __restrict xg = x + n, * __restrict xb = x + 2 * n;
  T* __restrict gr = g, * __restrict gg = g + n, * __restrict gb = g + 2 * n;
  const T low = straight_through ? -INFINITY : T(0), high = straight_through ? INFINITY : T(1);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T pivot = (1 - f) * luminance(xr[i], xg[i], xb[i]);
    const T yr = f * xr[i] + pivot, yg = f * xg[i] + pivot, yb = f * xb[i] + pivot;
    const T r = (yr > low) & (yr < high) ? gr[i] : T(0);
    const T gn = (yg > low) & (yg < high) ? gg[i] : T(0);
    const T b = (yb > low) & (yb < high) ? gb[i] : T(0);
    const T shared = (1 - f) * (r + gn + b);
    gr[i] = f * r + Luminance<T>::red * shared;
    gg[i] = f * gn + Luminance<T>::green * shared;
    gb[i] = f * b + Luminance<T>::blue * shared;
  }
}

// The hue is written for V, a vector of pixels or one pixel, as the compiler does not vectorise its conditions. On
// vectors these are masks, and `condition ? a : b` selects lane by lane.
template <typename T>
struct Lanes {
  static constexpr int64_t count = 32 / sizeof(T);
  typedef T type __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  typedef int32_t whole __attribute__((vector_size(4 * count)));

  static COPGEN_INLINE type truncate(type x) {
    return __builtin_convertvector(__builtin_convertvector(x, whole), type);
  }
};

template <typename T>
struct One {
  static constexpr int64_t count = 1;
  typedef T type;

  static COPGEN_INLINE T truncate(T x) { return static_cast<T>(static_cast<int32_t>(x)); }
};

// A pixel's largest and smallest channel, and its hue in sixths of a turn: a difference of channels over the spread,
// the `ratio`, and a whole number. Where channels tie, the first counts. Gray has spread 0 and hue 0.
template <typename L>
struct Hue {
  using V = typename L::type;
  V high, low, spread, ratio, sixths;

  COPGEN_INLINE Hue(V r, V g, V b, V shift) {
    const V zero{};
    high = g > b ? g : b;
    high = r > high ? r : high;
    low = g < b ? g : b;
    low = r < low ? r : low;
    spread = high - low;
    const V difference = r == high ? g - b : (g == high ? b - r : r - g);
    ratio = spread == zero ? zero : difference / spread;
    sixths = ratio + shift + (r == high ? zero : (g == high ? zero + 2 : zero + 4));
  }

  // Channel n = 5, 3, 1 (red, green, blue) is high - spread * clamp(min(p, 4 - p), 0, 1), p = n + sixths modulo 6.
  template <int n>
  COPGEN_INLINE V place() const {
    const V unwrapped = sixths + n;
    return unwrapped - L::truncate(unwrapped / 6) * 6;
  }
};

template <typename V>
COPGEN_INLINE V share(V place) {
  const V zero{}, one = zero + 1, falling = 4 - place;
  V share = place < falling ? place : falling;
  share = share < zero ? zero : share;
  return share > one ? one : share;
}

// Gradient of a channel's place from its gradient g: the share rises below 1 and falls from 3 to 4.
template <typename V>
COPGEN_INLINE V to_place(V place, V g) {
  const V zero{};
  const V rising = place < zero + 1 ? g : zero;
  return place > zero + 3 ? (place < zero + 4 ? -g : zero) : rising;
}

template <typename L>
COPGEN_INLINE void shift_hue_of(typename L::type* r, typename L::type* g, typename L::type* b, typename L::type shift) {
  const Hue<L> hue(*r, *g, *b, shift);
  *r = hue.high - hue.spread * share(hue.template place<5>());
  *g = hue.high - hue.spread * share(hue.template place<3>());
  *b = hue.high - hue.spread * share(hue.template place<1>());
}

template <typename L>
COPGEN_INLINE void shift_hue_of_backward(typename L::type r, typename L::type g, typename L::type b,
                                         typename L::type* grad_r, typename L::type* grad_g, typename L::type* grad_b,
                                         typename L::type shift) {
  using V = typename L::type;
  const V zero{}, dr = *grad_r, dg = *grad_g, db = *grad_b;
  const Hue<L> hue(r, g, b, shift);
  const V pr = hue.template place<5>(), pg = hue.template place<3>(), pb = hue.template place<1>();
  const V to_share = dr * share(pr) + dg * share(pg) + db * share(pb);
  // The hue's gradient times the spread; a gray pixel has none.
  const V to_places = to_place(pr, dr) + to_place(pg, dg) + to_place(pb, db);
  const V to_sixths = hue.spread == zero ? zero : -to_places;
  const V to_spread = -to_share - to_sixths * hue.ratio;
  const V to_high = dr + dg + db + to_spread;
  // To the smallest channel, the largest, and the two whose difference over the spread is the hue.
  const V low_r = r == hue.low ? to_spread : zero;
  const V low_g = r == hue.low ? zero : (g == hue.low ? to_spread : zero);
  *grad_r = (r == hue.high ? to_high : (g == hue.high ? -to_sixths : to_sixths)) - low_r;
  *grad_g = (r == hue.high ? to_sixths : (g == hue.high ? to_high : -to_sixths)) - low_g;
  *grad_b = (r == hue.high ? -to_sixths : (g == hue.high ? to_sixths : to_high)) - (to_spread - low_r - low_g);
}

template <typename L, typename T>
COPGEN_INLINE typename L::type* lanes(T* x) {
  return reinterpret_cast<typename L::type*>(x);
}
template <typename L, typename T>
COPGEN_INLINE const typename L::type* lanes(const T* x) {
  return reinterpret_cast<const typename L::type*>(x);
}

template <typename T>
COPGEN_INLINE void shift_hue(T* x, int64_t n, T shift) {
  using Many = Lanes<T>;
  T *r = x, *g = x + n, *b = x + 2 * n;
  const T sixths = 6 * shift;
  int64_t i = 0;
  for (; i + Many::count <= n; i += Many::count)
    shift_hue_of<Many>(lanes<Many>(r + i), lanes<Many>(g + i), lanes<Many>(b + i), typename Many::type{} + sixths);
  for (; i < n; ++i) shift_hue_of<One<T>>(r + i, g + i, b + i, sixths);
}

template <typename T>
COPGEN_INLINE void shift_hue_backward(const T* x, T* grad, int64_t n, T shift) {
  using Many = Lanes<T>;
  const T *r = x, *g = x + n, *b = x + 2 * n;
  T *grad_r = grad, *grad_g = grad + n, *grad_b = grad + 2 * n;
  const T sixths = 6 * shift;
  int64_t i = 0;
  for (; i + Many::count <= n; i += Many::count)
    shift_hue_of_backward<Many>(*lanes<Many>(r + i), *lanes<Many>(g + i), *lanes<Many>(b + i), lanes<Many>(grad_r + i),
                                lanes<Many>(grad_g + i), lanes<Many>(grad_b + i), typename Many::type{} + sixths);
  for (; i < n; ++i) shift_hue_of_backward<One<T>>(r[i], g[i], b[i], grad_r + i, grad_g + i, grad_b + i, sixths);
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
  T* __restrict r = x, * __restrict g = x + n, * __restrict b = x + 2 * n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) r[i] = g[i] = b[i] = luminance(r[i], g[i], b[i]);
}

template <typename T>
COPGEN_INLINE void to_gray_backward(T* __restrict g, int64_t n) {
  T* __restrict gr = g, * __restrict gg = g + n, * __restrict gb = g + 2 * n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T sum = gr[i] + gg[i] + gb[i];
    gr[i] = Luminance<T>::red * sum;
    gg[i] = Luminance<T>::green * sum;
    gb[i] = Luminance<T>::blue * sum;
  }
}

// Adds the pivot's gradient, already divided by the number of pixels, to that of every pixel's luminance.
template <typename T>
COPGEN_INLINE void add_to_luminance(T* __restrict g, int64_t n, T value) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    g[i] += Luminance<T>::red * value;
    g[n + i] += Luminance<T>::green * value;
    g[2 * n + i] += Luminance<T>::blue * value;
  }
}

template <typename T>
COPGEN_INLINE void solarize(T* __restrict x, int64_t n, T threshold) {
#pragma omp simd
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = x[i] >= threshold ? 1 - x[i] : x[i];
}

template <typename T>
COPGEN_INLINE void solarize_backward(const T* __restrict x, T* __restrict g, int64_t n, T threshold) {
#pragma omp simd
  for (int64_t i = 0; i < 3 * n; ++i) g[i] = x[i] >= threshold ? -g[i] : g[i];
}

template <typename T>
COPGEN_INLINE void normalize(T* __restrict x, int64_t n, const T* mean, const T* scale) {
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t i = 0; i < n; ++i) x[c * n + i] = (x[c * n + i] - mean[c]) * scale[c];
}

}  // namespace body
}  // namespace copgen

// Bodies of the colour functions of rows.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"

namespace copgen {
namespace body {

// Differences from a threshold that are rounding, as copgen_fast/ops/augment/reference.py defines them.
template <typename T>
constexpr T kTie = 8 * std::numeric_limits<T>::epsilon();
template <typename T>
constexpr T kTieOfSixths = 64 * std::numeric_limits<T>::epsilon();

// Bounds between which a clamp passes the gradient.
template <typename T>
struct Passing {
  T low, high;
  COPGEN_INLINE explicit Passing(bool straight_through)
      : low(straight_through ? -INFINITY : kTie<T>), high(straight_through ? INFINITY : 1 - kTie<T>) {}
  COPGEN_INLINE bool operator()(T blended) const { return (blended > low) & (blended < high); }
};

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
  const Passing<T> passes(straight_through);
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const T blended = f * x[i + k] + offset;
      const T passed = passes(blended) ? g[i + k] : T(0);
      sums[k] += passed;
      g[i + k] = f * passed;
    }
  for (int64_t i = whole; i < size; ++i) {
    const T blended = f * x[i] + offset;
    const T passed = passes(blended) ? g[i] : T(0);
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
  const Passing<T> passes(straight_through);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T pivot = (1 - f) * luminance(xr[i], xg[i], xb[i]);
    const T yr = f * xr[i] + pivot, yg = f * xg[i] + pivot, yb = f * xb[i] + pivot;
    const T r = passes(yr) ? gr[i] : T(0);
    const T gn = passes(yg) ? gg[i] : T(0);
    const T b = passes(yb) ? gb[i] : T(0);
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
  typedef T number;
  typedef T type __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  typedef int32_t whole __attribute__((vector_size(4 * count)));

  static COPGEN_INLINE type truncate(type x) {
    return __builtin_convertvector(__builtin_convertvector(x, whole), type);
  }
};

template <typename T>
struct One {
  static constexpr int64_t count = 1;
  typedef T number;
  typedef T type;

  static COPGEN_INLINE T truncate(T x) { return static_cast<T>(static_cast<int32_t>(x)); }
};

// A pixel's largest and smallest channel, and its hue in sixths of a turn: a difference of channels over the spread,
// the `ratio`, and a whole number. Where channels tie, the first counts. Gray has hue 0.
template <typename L>
struct Hue {
  using V = typename L::type;
  using Mask = decltype(V{} < V{});
  V high, low, spread, ratio, sixths;
  Mask high_r, high_g, low_r, low_g, gray;

  COPGEN_INLINE Hue(V r, V g, V b, V shift) {
    const V zero{}, tie = zero + kTie<typename L::number>;
    high = g > b ? g : b;
    high = r > high ? r : high;
    low = g < b ? g : b;
    low = r < low ? r : low;
    high_r = r >= high - tie, high_g = g >= high - tie;
    low_r = r <= low + tie, low_g = g <= low + tie;
    high = high_r ? r : (high_g ? g : b);
    low = low_r ? r : (low_g ? g : b);
    spread = high - low;
    gray = spread <= tie;
    const V difference = high_r ? g - b : (high_g ? b - r : r - g);
    ratio = gray ? zero * difference : difference / spread;  // keeps NaN
    sixths = ratio + shift + (high_r ? zero : (high_g ? zero + 2 : zero + 4));
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

// Gradient of a channel's place from its gradient g: the share rises from 0 to 1 and falls from 3 to 4.
template <typename V>
COPGEN_INLINE V to_place(V place, V g, V tie) {
  const V zero{};
  const V rising = place < 1 - tie ? (place > tie ? g : zero) : zero;
  return place > 3 + tie ? (place < 4 - tie ? -g : zero) : rising;
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
  using T = typename L::number;
  const V tie = kTieOfSixths<T> + kTie<T> / hue.spread;
  const V to_places = to_place(pr, dr, tie) + to_place(pg, dg, tie) + to_place(pb, db, tie);
  const V to_sixths = hue.gray ? zero : -to_places;
  const V to_spread = -to_share - to_sixths * hue.ratio;
  const V to_high = dr + dg + db + to_spread;
  // To the smallest channel, the largest, and the two whose difference over the spread is the hue.
  const V low_r = hue.low_r ? to_spread : zero;
  const V low_g = hue.low_r ? zero : (hue.low_g ? to_spread : zero);
  *grad_r = (hue.high_r ? to_high : (hue.high_g ? -to_sixths : to_sixths)) - low_r;
  *grad_g = (hue.high_r ? to_sixths : (hue.high_g ? to_high : -to_sixths)) - low_g;
  *grad_b = (hue.high_r ? -to_sixths : (hue.high_g ? to_sixths : to_high)) - (to_spread - low_r - low_g);
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
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = x[i] >= threshold - kTie<T> ? 1 - x[i] : x[i];
}

template <typename T>
COPGEN_INLINE void solarize_backward(const T* __restrict x, T* __restrict g, int64_t n, T threshold) {
#pragma omp simd
  for (int64_t i = 0; i < 3 * n; ++i) g[i] = x[i] >= threshold - kTie<T> ? -g[i] : g[i];
}

template <typename T>
COPGEN_INLINE void normalize(T* __restrict x, int64_t n, const T* mean, const T* scale) {
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t i = 0; i < n; ++i) x[c * n + i] = (x[c * n + i] - mean[c]) * scale[c];
}

}  // namespace body
}  // namespace copgen

// Instantiates every function of rows.h; see there.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>

#include "rows.h"

// The compiler vectorises these functions once per instruction set, and the loader picks: AVX-512, AVX2 with FMA, or
// any x86-64. Only float is worth it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define COPGEN_CLONES_float __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COPGEN_CLONES_float
#endif
#define COPGEN_CLONES_double

// Templates must melt into the cloned function that calls them: on their own they would be compiled for any x86-64.
#define COPGEN_INLINE inline __attribute__((always_inline))

namespace copgen {
namespace rows {

// Four values in a vector register; they may lie at any address.
template <typename T>
struct Quad {
  typedef T type __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// uint8 images hold 255ths.
template <typename T, typename S>
COPGEN_INLINE T to_unit(S value) {
  return static_cast<T>(value);
}
template <>
COPGEN_INLINE float to_unit<float, uint8_t>(uint8_t value) {
  return static_cast<float>(value) / 255.0f;
}
template <>
COPGEN_INLINE double to_unit<double, uint8_t>(uint8_t value) {
  return static_cast<double>(value) / 255.0;
}

template <typename T, typename S>
COPGEN_INLINE void load_as(const S* in, int64_t column, int64_t channel, int64_t count, T* row) {
  if (column == 1) {
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < count; ++x) row[c * count + x] = to_unit<T, S>(in[c * channel + x]);
    return;
  }
  for (int64_t x = 0; x < count; ++x)
    for (int64_t c = 0; c < 3; ++c) row[c * count + x] = to_unit<T, S>(in[x * column + c * channel]);
}

template <typename T, typename S>
COPGEN_INLINE void store_as(S* out, int64_t column, int64_t channel, int64_t count, const T* row) {
  if (column == 1) {
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t x = 0; x < count; ++x) out[c * channel + x] = static_cast<S>(row[c * count + x]);
    return;
  }
  for (int64_t x = 0; x < count; ++x)
    for (int64_t c = 0; c < 3; ++c) out[x * column + c * channel] = static_cast<S>(row[c * count + x]);
}

// Calls function<T, S>(pointer to the pixel at `offset`, column stride, channel stride, ...) for the images' dtype S.
#define COPGEN_BY_DTYPE(function, images, offset, ...)                                                            \
  switch (images.dtype) {                                                                                         \
    case at::kByte:                                                                                               \
      function<T>(static_cast<uint8_t*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);       \
      break;                                                                                                      \
    case at::kHalf:                                                                                               \
      function<T>(static_cast<c10::Half*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);     \
      break;                                                                                                      \
    case at::kBFloat16:                                                                                           \
      function<T>(static_cast<c10::BFloat16*>(images.data) + offset, images.column, images.channel, __VA_ARGS__); \
      break;                                                                                                      \
    case at::kFloat:                                                                                              \
      function<T>(static_cast<float*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);         \
      break;                                                                                                      \
    default:                                                                                                      \
      function<T>(static_cast<double*>(images.data) + offset, images.column, images.channel, __VA_ARGS__);        \
  }

template <typename T>
COPGEN_INLINE void load_row(const Images& images, int64_t n, int64_t y, int64_t x, int64_t count, T* row) {
  const int64_t offset = n * images.batch + y * images.row + x * images.column;
  COPGEN_BY_DTYPE(load_as, images, offset, count, row)
}

template <typename T>
COPGEN_INLINE void store_row(const Images& images, int64_t n, int64_t y, int64_t count, const T* row) {
  const int64_t offset = n * images.batch + y * images.row;
  COPGEN_BY_DTYPE(store_as, images, offset, count, row)
}

// Columns of four vectors become their rows.
template <typename V>
COPGEN_INLINE void transpose(V& a, V& b, V& c, V& d) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  const V ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const V cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
#else
  const V e = a, f = b, g = c, h = d;
  a = V{e[0], f[0], g[0], h[0]};
  b = V{e[1], f[1], g[1], h[1]};
  c = V{e[2], f[2], g[2], h[2]};
  d = V{e[3], f[3], g[3], h[3]};
#endif
}

template <typename T>
COPGEN_INLINE void to_quads(const T* __restrict row, int64_t n, T* __restrict quads) {
  using Quad4 = typename Quad<T>::type;
  Quad4* out = reinterpret_cast<Quad4*>(quads);
  int64_t x = 0;
  for (; x + 4 <= n; x += 4) {
    Quad4 a = *reinterpret_cast<const Quad4*>(row + x), b = *reinterpret_cast<const Quad4*>(row + n + x);
    Quad4 c = *reinterpret_cast<const Quad4*>(row + 2 * n + x), d = c;
    transpose(a, b, c, d);
    out[x] = a;
    out[x + 1] = b;
    out[x + 2] = c;
    out[x + 3] = d;
  }
  for (; x < n; ++x) out[x] = Quad4{row[x], row[n + x], row[2 * n + x], T(0)};
}

template <typename T>
COPGEN_INLINE typename Quad<T>::type resized_pixel(const Taps<T>& taps, const T* quads, int64_t x) {
  using Quad4 = typename Quad<T>::type;
  const Quad4* pixel = reinterpret_cast<const Quad4*>(quads) + taps.start[x];
  const T* w = taps.weight.data() + x * taps.width;
  Quad4 sum = pixel[0] * w[0];
  for (int64_t k = 1; k < taps.width; ++k) sum += pixel[k] * w[k];
  return sum;
}

template <typename T>
COPGEN_INLINE void resize_row(const Taps<T>& taps, const T* quads, int64_t channel, T* row) {
  using Quad4 = typename Quad<T>::type;
  int64_t x = 0;
  for (; x + 4 <= taps.count; x += 4) {
    Quad4 a = resized_pixel(taps, quads, x), b = resized_pixel(taps, quads, x + 1);
    Quad4 c = resized_pixel(taps, quads, x + 2), d = resized_pixel(taps, quads, x + 3);
    transpose(a, b, c, d);
    *reinterpret_cast<Quad4*>(row + x) += a;
    *reinterpret_cast<Quad4*>(row + channel + x) += b;
    *reinterpret_cast<Quad4*>(row + 2 * channel + x) += c;
  }
  for (; x < taps.count; ++x) {
    const Quad4 sum = resized_pixel(taps, quads, x);
    for (int64_t c = 0; c < 3; ++c) row[c * channel + x] += sum[c];
  }
}

// Along y: output row i of rows that are `size` values long, one after the other.
template <typename T>
COPGEN_INLINE void combine_rows(const Taps<T>& taps, int64_t i, const T* rows, int64_t size, T* __restrict out) {
  const T* w = taps.weight.data() + i * taps.width;
  const T* first = rows + taps.start[i] * size;
  if (taps.width == 2) {  // every upscale
    const T *second = first + size, a = w[0], b = w[1];
    for (int64_t x = 0; x < size; ++x) out[x] = a * first[x] + b * second[x];
    return;
  }
  for (int64_t x = 0; x < size; ++x) out[x] = w[0] * first[x];
  for (int64_t k = 1; k < taps.width; ++k) {
    const T *row = first + k * size, a = w[k];
    for (int64_t x = 0; x < size; ++x) out[x] += a * row[x];
  }
}

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

// Returns the gradient's sum where the clamp lets it pass: what the pivot receives, less the factor 1 - f.
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

// The hue is written for V, a vector of pixels or one pixel: its conditions are too many for the compiler to see
// through. Conditions on vectors are masks, and `condition ? a : b` chooses lane by lane.
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

// What a channel's gradient g gives to its place: its share rises with it below 1 and falls above 3, up to 4.
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

// Sends the pivot's gradient, already divided by the number of pixels, to every pixel's luminance.
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

template <typename T>
COPGEN_INLINE void filter_row(const T* __restrict padded, const T* weight, int64_t taps, int64_t n, T* __restrict out) {
  for (int64_t x = 0; x < n; ++x) out[x] = weight[0] * padded[x];
  for (int64_t k = 1; k < taps; ++k)
    for (int64_t x = 0; x < n; ++x) out[x] += weight[k] * padded[x + k];
}

template <typename T>
COPGEN_INLINE void add_row(const T* __restrict in, T weight, int64_t n, T* __restrict out) {
  for (int64_t x = 0; x < n; ++x) out[x] += weight * in[x];
}

}  // namespace rows

#define COPGEN_DEFINE_ROWS(T)                                                                                     \
  COPGEN_CLONES_##T void load_row(const Images& images, int64_t n, int64_t y, int64_t x, int64_t count, T* row) { \
    rows::load_row(images, n, y, x, count, row);                                                                  \
  }                                                                                                               \
  COPGEN_CLONES_##T void store_row(const Images& images, int64_t n, int64_t y, int64_t count, const T* row) {     \
    rows::store_row(images, n, y, count, row);                                                                    \
  }                                                                                                               \
  COPGEN_CLONES_##T void to_quads(const T* row, int64_t n, T* quads) { rows::to_quads(row, n, quads); }           \
  COPGEN_CLONES_##T void resize_row(const Taps<T>& taps, const T* quads, int64_t channel, T* row) {               \
    rows::resize_row(taps, quads, channel, row);                                                                  \
  }                                                                                                               \
  COPGEN_CLONES_##T void combine_rows(const Taps<T>& taps, int64_t i, const T* rows, int64_t size, T* out) {      \
    rows::combine_rows(taps, i, rows, size, out);                                                                 \
  }                                                                                                               \
  COPGEN_CLONES_##T void blend_with_constant(T* x, int64_t n, T f, T offset) {                                    \
    rows::blend_with_constant(x, n, f, offset);                                                                   \
  }                                                                                                               \
  COPGEN_CLONES_##T T blend_with_constant_backward(const T* x, T* g, int64_t n, T f, T offset,                    \
                                                   bool straight_through) {                                       \
    return rows::blend_with_constant_backward(x, g, n, f, offset, straight_through);                              \
  }                                                                                                               \
  COPGEN_CLONES_##T void saturate(T* x, int64_t n, T f) { rows::saturate(x, n, f); }                              \
  COPGEN_CLONES_##T void saturate_backward(const T* x, T* g, int64_t n, T f, bool straight_through) {             \
    rows::saturate_backward(x, g, n, f, straight_through);                                                        \
  }                                                                                                               \
  COPGEN_CLONES_##T void shift_hue(T* x, int64_t n, T shift) { rows::shift_hue(x, n, shift); }                    \
  COPGEN_CLONES_##T void shift_hue_backward(const T* x, T* g, int64_t n, T shift) {                               \
    rows::shift_hue_backward(x, g, n, shift);                                                                     \
  }                                                                                                               \
  COPGEN_CLONES_##T T sum_of_luminance(const T* x, int64_t n) { return rows::sum_of_luminance(x, n); }            \
  COPGEN_CLONES_##T void add_to_luminance(T* g, int64_t n, T value) { rows::add_to_luminance(g, n, value); }      \
  COPGEN_CLONES_##T void to_gray(T* x, int64_t n) { rows::to_gray(x, n); }                                        \
  COPGEN_CLONES_##T void to_gray_backward(T* g, int64_t n) { rows::to_gray_backward(g, n); }                      \
  COPGEN_CLONES_##T void solarize(T* x, int64_t n, T threshold) { rows::solarize(x, n, threshold); }              \
  COPGEN_CLONES_##T void solarize_backward(const T* x, T* g, int64_t n, T threshold) {                            \
    rows::solarize_backward(x, g, n, threshold);                                                                  \
  }                                                                                                               \
  COPGEN_CLONES_##T void normalize(T* x, int64_t n, const T* mean, const T* scale) {                              \
    rows::normalize(x, n, mean, scale);                                                                           \
  }                                                                                                               \
  COPGEN_CLONES_##T void filter_row(const T* padded, const T* weight, int64_t taps, int64_t n, T* out) {          \
    rows::filter_row(padded, weight, taps, n, out);                                                               \
  }                                                                                                               \
  COPGEN_CLONES_##T void add_row(const T* in, T weight, int64_t n, T* out) { rows::add_row(in, weight, n, out); }

COPGEN_DEFINE_ROWS(float)
COPGEN_DEFINE_ROWS(double)

}  // namespace copgen

// relu(scale x + shift) with a scale and a shift per sample and channel, and its gradient, on the CPU: one pass over
// the values, NCHW or NHWC, upsampled or not.
//
// NHWC is processed in runs of pixels, NCHW in planes. T is the dtype of the arithmetic, S of memory. Gradients of
// scales and shifts are summed over short runs in T, and over the runs in double; runs depend on the shape alone, so
// that results do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "half.h"
#include "target_clones.h"

namespace copgen {
namespace {

constexpr int64_t kPixels = 64;    // pixels of a run in NHWC
constexpr int64_t kValues = 1024;  // values of a run in NCHW
constexpr int64_t kGrain = 32768;  // fewest values of a thread

// Size of a sample of x.
struct Size {
  int64_t channels, height, width;
  bool upsample;

  int64_t pixels() const { return height * width; }
  int64_t values() const { return channels * pixels(); }
  int64_t out_values() const { return upsample ? 4 * values() : values(); }
  // Index of the first of a pixel's four copies in the upsampled image.
  int64_t first_of_four(int64_t pixel) const { return pixel / width * 4 * width + pixel % width * 2; }
};

// Scales and shifts of a sample, from some channel on.
template <typename T>
struct Affine {
  const T *scale, *shift;
};

namespace body {

// Keeps NaN.
template <typename T>
COPGEN_INLINE T relu(T y) {
  return y <= T(0) ? T(0) : y;
}

template <typename T, typename S>
COPGEN_INLINE void pixels(const Size& size, Affine<T> affine, const S* x, int64_t first, int64_t last, S* y) {
  const int64_t channels = size.channels, below = 2 * size.width * channels;
  const T *scale = affine.scale, *shift = affine.shift;
  for (int64_t p = first; p < last; ++p) {
    const S* in = x + p * channels;
    S* out = y + (size.upsample ? size.first_of_four(p) : p) * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) out[c] = narrow<S>(relu(widen(in[c]) * scale[c] + shift[c]));
    if (size.upsample) {
      std::memcpy(out + channels, out, channels * sizeof(S));
      std::memcpy(out + below, out, 2 * channels * sizeof(S));
    }
  }
}

template <typename T, typename S>
COPGEN_INLINE void plane(const Size& size, Affine<T> affine, const S* x, S* y) {
  const T scale = affine.scale[0], shift = affine.shift[0];
  if (!size.upsample) {
    const int64_t n = size.pixels();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = narrow<S>(relu(widen(x[i]) * scale + shift));
    return;
  }
  const int64_t width = size.width, below = 2 * width;
  for (int64_t row = 0; row < size.height; ++row, x += width, y += 2 * below) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const S value = narrow<S>(relu(widen(x[i]) * scale + shift));
      y[2 * i] = value;
      y[2 * i + 1] = value;
      y[2 * i + below] = value;
      y[2 * i + below + 1] = value;
    }
  }
}

// Sum of the gradients of a pixel's four copies.
template <typename T, typename S>
COPGEN_INLINE void sum_of_four(const Size& size, int64_t channels, const S* grad, int64_t first, int64_t last, T* sum) {
  const int64_t right = channels, below = 2 * size.width * channels;
  for (int64_t p = first; p < last; ++p, sum += channels) {
    const S* g = grad + size.first_of_four(p) * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      sum[c] = (widen(g[c]) + widen(g[c + right])) + (widen(g[c + below]) + widen(g[c + below + right]));
  }
}

// K pixels; adds to sums [2, C] of the gradients of scales and shifts.
template <int K, typename T, typename G, typename S>
COPGEN_INLINE void few_pixels_backward(int64_t channels, Affine<T> affine, const G* grad, const S* x, S* grad_x,
                                       T* sums) {
  const T *scale = affine.scale, *shift = affine.shift;
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    T of_scale = 0, of_shift = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t i = k * channels + c;
      const T value = widen(x[i]), passed = value * scale[c] + shift[c] <= T(0) ? T(0) : widen(grad[i]);
      grad_x[i] = narrow<S>(passed * scale[c]);
      of_scale += passed * value;
      of_shift += passed;
    }
    sums[c] += of_scale;
    sums[channels + c] += of_shift;
  }
}

// `sums` may be null. G is S, or T after sum_of_four.
template <typename T, typename G, typename S>
COPGEN_INLINE void pixels_backward(int64_t channels, Affine<T> affine, const G* grad, const S* x, int64_t count,
                                   S* grad_x, T* sums) {
  constexpr int kTogether = 4;  // four at a time: fewer additions one after the other, and less traffic
  const T *scale = affine.scale, *shift = affine.shift;
  int64_t p = 0;
  for (; sums != nullptr && p + kTogether <= count; p += kTogether)
    few_pixels_backward<kTogether>(channels, affine, grad + p * channels, x + p * channels, grad_x + p * channels,
                                   sums);
  for (; sums != nullptr && p < count; ++p)
    few_pixels_backward<1>(channels, affine, grad + p * channels, x + p * channels, grad_x + p * channels, sums);
  for (; p < count; ++p) {
    const int64_t start = p * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      grad_x[start + c] =
          narrow<S>(widen(x[start + c]) * scale[c] + shift[c] <= T(0) ? T(0) : widen(grad[start + c]) * scale[c]);
  }
}

// `count` values of a plane; sums are two numbers.
template <typename T, typename G, typename S>
COPGEN_INLINE void plane_backward(Affine<T> affine, const G* grad, const S* x, int64_t count, S* grad_x, T* sums) {
  const T scale = affine.scale[0], shift = affine.shift[0];
  T of_scale = 0, of_shift = 0;
#pragma omp simd reduction(+ : of_scale, of_shift)
  for (int64_t i = 0; i < count; ++i) {
    const T value = widen(x[i]), passed = value * scale + shift <= T(0) ? T(0) : widen(grad[i]);
    grad_x[i] = narrow<S>(passed * scale);
    of_scale += passed * value;
    of_shift += passed;
  }
  sums[0] = of_scale;
  sums[1] = of_shift;
}

}  // namespace body

#define COPGEN_DEFINE_BACKWARD(T, G, S)                                                                                \
  COPGEN_CLONES_##T void pixels_backward(int64_t channels, Affine<T> affine, const G* grad, const S* x, int64_t count, \
                                         S* grad_x, T* sums) {                                                         \
    body::pixels_backward(channels, affine, grad, x, count, grad_x, sums);                                             \
  }                                                                                                                    \
  COPGEN_CLONES_##T void plane_backward(Affine<T> affine, const G* grad, const S* x, int64_t count, S* grad_x,         \
                                        T* sums) {                                                                     \
    body::plane_backward(affine, grad, x, count, grad_x, sums);                                                        \
  }
#define COPGEN_DEFINE_COND_NORM(T, S)                                                                                \
  COPGEN_CLONES_##T void pixels(const Size& size, Affine<T> affine, const S* x, int64_t first, int64_t last, S* y) { \
    body::pixels(size, affine, x, first, last, y);                                                                   \
  }                                                                                                                  \
  COPGEN_CLONES_##T void plane(const Size& size, Affine<T> affine, const S* x, S* y) {                               \
    body::plane(size, affine, x, y);                                                                                 \
  }                                                                                                                  \
  COPGEN_CLONES_##T void sum_of_four(const Size& size, int64_t channels, const S* grad, int64_t first, int64_t last, \
                                     T* sum) {                                                                       \
    body::sum_of_four(size, channels, grad, first, last, sum);                                                       \
  }                                                                                                                  \
  COPGEN_DEFINE_BACKWARD(T, S, S)

COPGEN_DEFINE_COND_NORM(float, float)
COPGEN_DEFINE_COND_NORM(double, double)
COPGEN_DEFINE_COND_NORM(float, Float16)
COPGEN_DEFINE_COND_NORM(float, BFloat16)
COPGEN_DEFINE_BACKWARD(float, float, Float16)
COPGEN_DEFINE_BACKWARD(float, float, BFloat16)

struct Layout {
  Size size;
  int64_t samples;
  bool channels_last;

  // `y` is as large as x or upsampled.
  Layout(const at::Tensor& x, const at::Tensor& y, bool upsample)
      : size{x.size(1), x.size(2), x.size(3), upsample}, samples(x.size(0)), channels_last(!y.is_contiguous()) {}

  int64_t runs() const { return channels_last ? (size.pixels() + kPixels - 1) / kPixels : size.channels; }
  int64_t grain() const { return std::max<int64_t>(1, kGrain * runs() / std::max<int64_t>(1, size.out_values())); }
};

template <typename T>
Affine<T> affine_of(const at::Tensor& scale, const at::Tensor& shift, int64_t n, int64_t channel) {
  return {scale.const_data_ptr<T>() + n * scale.stride(0) + channel,
          shift.const_data_ptr<T>() + n * shift.stride(0) + channel};
}

template <typename T, typename S>
void forward(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, bool upsample, at::Tensor& y) {
  const Layout layout(x, y, upsample);
  const Size& size = layout.size;
  const int64_t runs = layout.runs();
  const S* in = static_cast<const S*>(x.const_data_ptr());
  S* out = static_cast<S*>(y.mutable_data_ptr());
  at::parallel_for(0, layout.samples * runs, layout.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / runs, run = i % runs;
      if (layout.channels_last) {
        const int64_t first = run * kPixels, last = std::min(first + kPixels, size.pixels());
        pixels(size, affine_of<T>(scale, shift, n, 0), in + n * size.values(), first, last,
               out + n * size.out_values());
      } else {
        plane(size, affine_of<T>(scale, shift, n, run), in + i * size.pixels(), out + i * (size.out_values() / runs));
      }
    }
  });
}

// Temporary memory of a thread.
template <typename T>
T* scratch(int64_t size) {
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

// A run of pixels; stores its sums [2, C].
template <typename T, typename S>
void run_backward(const Layout& layout, Affine<T> affine, const S* grad, const S* x, int64_t run, S* grad_x, T* sums) {
  const Size& size = layout.size;
  const int64_t channels = size.channels, first = run * kPixels, last = std::min(first + kPixels, size.pixels());
  const int64_t start = first * channels, count = last - first;
  if (sums != nullptr) std::fill(sums, sums + 2 * channels, T(0));
  if (!size.upsample) return pixels_backward(channels, affine, grad + start, x + start, count, grad_x + start, sums);
  T* given = scratch<T>(count * channels);
  sum_of_four(size, channels, grad, first, last, given);
  pixels_backward(channels, affine, given, x + start, count, grad_x + start, sums);
}

// A plane; stores its two sums.
template <typename T, typename S>
void plane_backward(const Layout& layout, Affine<T> affine, const S* grad, const S* x, S* grad_x, T* sums) {
  const Size& size = layout.size;
  double of_scale = 0, of_shift = 0;
  T* given = size.upsample ? scratch<T>(size.pixels()) : nullptr;
  if (size.upsample) sum_of_four(size, 1, grad, 0, size.pixels(), given);
  for (int64_t first = 0; first < size.pixels(); first += kValues) {
    const int64_t count = std::min(kValues, size.pixels() - first);
    T of_run[2];
    if (size.upsample) {
      plane_backward(affine, given + first, x + first, count, grad_x + first, of_run);
    } else {
      plane_backward(affine, grad + first, x + first, count, grad_x + first, of_run);
    }
    of_scale += of_run[0];
    of_shift += of_run[1];
  }
  if (sums == nullptr) return;
  sums[0] = static_cast<T>(of_scale);
  sums[1] = static_cast<T>(of_shift);
}

// [N, runs, 2, C] (NHWC) or [N, C, 2] (NCHW) to the gradients [N, C].
template <typename T>
void finish(const Layout& layout, const std::vector<T>& sums, at::Tensor& grad_scale, at::Tensor& grad_shift) {
  const int64_t channels = layout.size.channels, runs = layout.channels_last ? layout.runs() : 1;
  const int64_t step = layout.channels_last ? 1 : 2, apart = layout.channels_last ? channels : 1;
  T* const of_scale = grad_scale.mutable_data_ptr<T>();
  T* const of_shift = grad_shift.mutable_data_ptr<T>();
  for (int64_t n = 0; n < layout.samples; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      double totals[2] = {0, 0};
      for (int64_t run = 0; run < runs; ++run)
        for (int64_t k = 0; k < 2; ++k) totals[k] += sums[2 * (n * runs + run) * channels + c * step + k * apart];
      of_scale[n * channels + c] = static_cast<T>(totals[0]);
      of_shift[n * channels + c] = static_cast<T>(totals[1]);
    }
}

template <typename T, typename S>
void backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
              bool upsample, at::Tensor& grad_x, std::optional<at::Tensor>& grad_scale,
              std::optional<at::Tensor>& grad_shift) {
  const Layout layout(x, grad, upsample);
  const Size& size = layout.size;
  const int64_t runs = layout.runs(), apart = layout.channels_last ? 2 * size.channels : 2;
  const S *given = static_cast<const S*>(grad.const_data_ptr()), *in = static_cast<const S*>(x.const_data_ptr());
  S* out = static_cast<S*>(grad_x.mutable_data_ptr());
  std::vector<T> sums(grad_scale ? layout.samples * runs * apart : 0);
  at::parallel_for(0, layout.samples * runs, layout.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / runs, run = i % runs;
      T* const of_run = grad_scale ? sums.data() + i * apart : nullptr;
      if (layout.channels_last) {
        const int64_t from = n * size.values();
        run_backward(layout, affine_of<T>(scale, shift, n, 0), given + n * size.out_values(), in + from, run,
                     out + from, of_run);
      } else {
        const int64_t from = i * size.pixels();
        plane_backward(layout, affine_of<T>(scale, shift, n, run), given + i * (size.out_values() / runs), in + from,
                       out + from, of_run);
      }
    }
  });
  if (grad_scale) finish(layout, sums, *grad_scale, *grad_shift);
}

}  // namespace

// Calls function<T, S>(...) for the tensor's dtype S.
#define COPGEN_BY_DTYPE(function, tensor, ...)       \
  switch (tensor.scalar_type()) {                    \
    case at::kHalf:                                  \
      return function<float, Float16>(__VA_ARGS__);  \
    case at::kBFloat16:                              \
      return function<float, BFloat16>(__VA_ARGS__); \
    case at::kFloat:                                 \
      return function<float, float>(__VA_ARGS__);    \
    default:                                         \
      return function<double, double>(__VA_ARGS__);  \
  }

// y may be x itself where nothing is upsampled.
void cond_norm(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, bool upsample, at::Tensor y) {
  COPGEN_BY_DTYPE(forward, x, x, scale, shift, upsample, y)
}

void cond_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                        bool upsample, at::Tensor grad_x, std::optional<at::Tensor> grad_scale,
                        std::optional<at::Tensor> grad_shift) {
  COPGEN_BY_DTYPE(backward, x, grad, x, scale, shift, upsample, grad_x, grad_scale, grad_shift)
}

}  // namespace copgen

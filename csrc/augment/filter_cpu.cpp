// A separable filter on the CPU with weights per sample and reflected borders, and its adjoint.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "rows.h"

namespace copgen {
namespace {

// Index i in [-radius, n + radius) reflected into [0, n).
inline int64_t reflect(int64_t i, int64_t n) {
  i = i < 0 ? -i : i;
  return i < n ? i : 2 * (n - 1) - i;
}

// One plane of h rows and w columns. `plane` holds h x w values, `padded` w + 4 radius and `spread` w + 2 radius.
template <typename T>
struct Plane {
  const T* in;
  T *out, *plane, *padded, *spread;
  const T *weight, *reversed;
  int64_t h, w, radius;
};

template <typename T>
void filter_plane(const Plane<T>& job) {
  const int64_t taps = 2 * job.radius + 1;
  for (int64_t y = 0; y < job.h; ++y) {
    const T* row = job.in + y * job.w;
    std::copy(row, row + job.w, job.padded + job.radius);
    for (int64_t k = 1; k <= job.radius; ++k) {
      job.padded[job.radius - k] = row[reflect(-k, job.w)];
      job.padded[job.radius + job.w - 1 + k] = row[reflect(job.w - 1 + k, job.w)];
    }
    filter_row(job.padded, job.weight, taps, job.w, job.plane + y * job.w);
  }
  std::fill(job.out, job.out + job.h * job.w, T(0));
  for (int64_t y = 0; y < job.h; ++y)
    for (int64_t k = 0; k < taps; ++k)
      add_row(job.plane + reflect(y + k - job.radius, job.h) * job.w, job.weight[k], job.w, job.out + y * job.w);
}

template <typename T>
void filter_plane_transposed(const Plane<T>& job) {
  const int64_t taps = 2 * job.radius + 1;
  std::fill(job.plane, job.plane + job.h * job.w, T(0));
  for (int64_t y = 0; y < job.h; ++y)
    for (int64_t k = 0; k < taps; ++k)
      add_row(job.in + y * job.w, job.weight[k], job.w, job.plane + reflect(y + k - job.radius, job.h) * job.w);
  // Values spread over what lies within `radius` of the row, which is then folded into it. Each is a sum over zeros
  // around the row: adding the row to them, moved by one value a time, would wait for the store before.
  const int64_t width = job.w + 2 * job.radius;
  std::fill(job.padded, job.padded + width + 2 * job.radius, T(0));
  for (int64_t y = 0; y < job.h; ++y) {
    std::copy(job.plane + y * job.w, job.plane + (y + 1) * job.w, job.padded + 2 * job.radius);
    filter_row(job.padded, job.reversed, taps, width, job.spread);
    T* result = job.out + y * job.w;
    std::copy(job.spread + job.radius, job.spread + job.radius + job.w, result);
    for (int64_t k = 1; k <= job.radius; ++k) {
      result[reflect(-k, job.w)] += job.spread[job.radius - k];
      result[reflect(job.w - 1 + k, job.w)] += job.spread[job.radius + job.w - 1 + k];
    }
  }
}

template <typename T>
void run(const at::Tensor& images, const at::Tensor& weights, bool transposed, const at::Tensor& filtered) {
  const int64_t h = images.size(2), w = images.size(3), taps = weights.size(1), radius = taps / 2;
  const T* in = images.const_data_ptr<T>();
  T* out = filtered.mutable_data_ptr<T>();
  const float* weight = weights.const_data_ptr<float>();
  at::parallel_for(0, images.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> plane(h * w), padded(w + 4 * radius), spread(w + 2 * radius), own(taps), reversed(taps);
    for (int64_t n = begin; n < end; ++n) {
      std::copy(weight + n * taps, weight + (n + 1) * taps, own.begin());
      std::reverse_copy(own.begin(), own.end(), reversed.begin());
      const bool identity = own[radius] == 1 && std::count(own.begin(), own.end(), T(0)) == taps - 1;
      for (int64_t i = 3 * n; i < 3 * n + 3; ++i) {
        if (identity)
          std::copy(in + i * h * w, in + (i + 1) * h * w, out + i * h * w);
        else
          (transposed ? filter_plane_transposed<T> : filter_plane<T>)(
              {in + i * h * w, out + i * h * w, plane.data(), padded.data(), spread.data(), own.data(), reversed.data(),
               h, w, radius});
      }
    }
  });
}

}  // namespace

void separable_filter(const at::Tensor& images, const at::Tensor& weights, bool transposed, at::Tensor filtered) {
  const at::Tensor own = weights.contiguous();
  if (images.scalar_type() == at::kDouble)
    run<double>(images, own, transposed, filtered);
  else
    run<float>(images, own, transposed, filtered);
}

}  // namespace copgen

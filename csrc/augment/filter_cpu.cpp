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

// One plane of h rows and w columns. `wide` holds max(h, w) + 2 radius rows or values, `plane` h x w.
template <typename T>
struct Plane {
  const T* in;
  T *out, *plane;
  const T* weight;
  std::vector<T>& wide;
  int64_t h, w, radius;
};

template <typename T>
void filter_plane(const Plane<T>& job) {
  const int64_t taps = 2 * job.radius + 1;
  T* padded = job.wide.data();
  for (int64_t y = 0; y < job.h; ++y) {
    const T* row = job.in + y * job.w;
    std::copy(row, row + job.w, padded + job.radius);
    for (int64_t k = 1; k <= job.radius; ++k) {
      padded[job.radius - k] = row[reflect(-k, job.w)];
      padded[job.radius + job.w - 1 + k] = row[reflect(job.w - 1 + k, job.w)];
    }
    filter_row(padded, job.weight, taps, job.w, job.plane + y * job.w);
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
  T* padded = job.wide.data();
  for (int64_t y = 0; y < job.h; ++y) {
    const T* row = job.plane + y * job.w;
    T* result = job.out + y * job.w;
    std::fill(padded, padded + job.w + 2 * job.radius, T(0));
    for (int64_t k = 0; k < taps; ++k) add_row(row, job.weight[k], job.w, padded + k);
    std::copy(padded + job.radius, padded + job.radius + job.w, result);
    for (int64_t k = 1; k <= job.radius; ++k) {
      result[reflect(-k, job.w)] += padded[job.radius - k];
      result[reflect(job.w - 1 + k, job.w)] += padded[job.radius + job.w - 1 + k];
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
    std::vector<T> plane(h * w), wide(w + 2 * radius), own(taps);
    for (int64_t n = begin; n < end; ++n) {
      std::copy(weight + n * taps, weight + (n + 1) * taps, own.begin());
      const bool identity = own[radius] == 1 && std::count(own.begin(), own.end(), T(0)) == taps - 1;
      for (int64_t i = 3 * n; i < 3 * n + 3; ++i) {
        if (identity)
          std::copy(in + i * h * w, in + (i + 1) * h * w, out + i * h * w);
        else
          (transposed ? filter_plane_transposed<T> : filter_plane<T>)({in + i * h * w, out + i * h * w, plane.data(),
                                                                       own.data(), wide, h, w, radius});
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

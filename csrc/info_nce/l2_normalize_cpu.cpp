// L2 normalisation on the CPU: each row is read once from memory. See copgen_fast/ops/info_nce/l2_normalize.py.
#include "l2_normalize.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "target_clones.h"

namespace copgen {
namespace {

// Rows no longer than this stay almost zero and take no gradient.
constexpr double kEpsilon = 1e-12;
constexpr int64_t kGrain = 32768;  // fewest values of a thread

namespace body {

template <typename T>
COPGEN_INLINE T dot(const T* x, const T* y, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

// x may be u. Keeps NaN, as all below.
template <typename T>
COPGEN_INLINE void normalize(const T* x, int64_t n, T* u, T* norm) {
  *norm = std::sqrt(dot(x, x, n));
  const T length = *norm <= T(kEpsilon) ? T(kEpsilon) : *norm;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) u[j] = x[j] / length;
}

// Only the part at a right angle to a row changes its unit row u. x may be g.
template <typename T>
COPGEN_INLINE void normalize_backward(const T* g, const T* u, int64_t n, T norm, T* x) {
  const T along = dot(g, u, n), inverse = norm <= T(kEpsilon) ? T(0) : 1 / norm;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] = (g[j] - along * u[j]) * inverse;
}

}  // namespace body

#define COPGEN_DEFINE_NORMALIZE(T)                                                                              \
  COPGEN_CLONES_##T void normalize(const T* x, int64_t n, T* u, T* norm) { body::normalize(x, n, u, norm); }    \
  COPGEN_CLONES_##T void normalize_backward(const T* g, const T* u, int64_t n, T norm, T* x) {                  \
    body::normalize_backward(g, u, n, norm, x);                                                                 \
  }

COPGEN_DEFINE_NORMALIZE(float)
COPGEN_DEFINE_NORMALIZE(double)
#undef COPGEN_DEFINE_NORMALIZE

// work(row) for each of n rows of d values, in parallel.
template <typename Work>
void for_each_row(int64_t n, int64_t d, const Work& work) {
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

template <typename T>
void run(const at::Tensor& anchors, const at::Tensor& positives, const at::Tensor& units, const at::Tensor& norms) {
  const int64_t n = anchors.size(0), d = units.size(1);
  const T *anchor = anchors.const_data_ptr<T>(), *positive = positives.const_data_ptr<T>();
  T *u = units.data_ptr<T>(), *norm = norms.data_ptr<T>();
  for_each_row(2 * n, d, [&](int64_t i) {
    normalize(i < n ? anchor + i * d : positive + (i - n) * d, d, u + i * d, norm + i);
  });
}

template <typename T>
void run_backward(const at::Tensor& grad, const at::Tensor& units, const at::Tensor& norms, const at::Tensor& grads) {
  const int64_t n = units.size(0), d = units.size(1);
  const T *g = grad.const_data_ptr<T>(), *u = units.const_data_ptr<T>(), *norm = norms.const_data_ptr<T>();
  T* x = grads.data_ptr<T>();
  for_each_row(n, d, [&](int64_t i) { normalize_backward(g + i * d, u + i * d, d, norm[i], x + i * d); });
}

}  // namespace

void l2_normalize(const at::Tensor& anchors, const at::Tensor& positives, at::Tensor units, at::Tensor norms) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  const auto rows = [&](const at::Tensor& x) { return x.to(units.scalar_type()).contiguous(); };
  units.scalar_type() == at::kDouble ? run<double>(rows(anchors), rows(positives), units, norms)
                                     : run<float>(rows(anchors), rows(positives), units, norms);
}

void l2_normalize_backward(const at::Tensor& grad, const at::Tensor& units, const at::Tensor& norms, at::Tensor grads) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  const bool same = grads.scalar_type() == units.scalar_type();
  at::Tensor exact = same ? grads : at::empty(units.sizes(), units.options());
  units.scalar_type() == at::kDouble ? run_backward<double>(grad, units, norms, exact)
                                     : run_backward<float>(grad, units, norms, exact);
  if (!same) grads.copy_(exact);
}

}  // namespace copgen

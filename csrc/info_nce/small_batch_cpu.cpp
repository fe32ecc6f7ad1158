// NT-Xent of a small batch on the CPU, whose similarity matrix is kept for the backward: that saves one product of two.
// See copgen_fast/ops/info_nce/small_batch.py.
//
// Only the upper triangle is computed, in strips of rows, each from its first row's column on. A thread multiplies a
// strip and reduces it while it is in the cache, so that threads meet once for the whole matrix. They take strips as
// they come: at such sizes a thread that wakes up late would else double the time.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "exp_rows.h"
#include "l2_normalize.h"
#include "log_sum.h"
#include "products.h"

namespace copgen {
namespace {

constexpr int64_t kStrip = 64;  // rows
constexpr int64_t kBlock = 16;  // columns of a strip that are mirrored at once
constexpr int64_t kGap = 16;    // after a row of a square matrix: a power of two apart, rows share places of a cache

// The unit rows of N anchors and N positives, and the strips of their matrix, one after the other: exponentials
// exp(scale (s - 1)) where these are bounded, else products s.
struct Batch {
  const at::Tensor& units;
  const at::Tensor& matrix;
  const double scale;

  int64_t views() const { return units.size(0); }
  int64_t strips() const { return (views() + kStrip - 1) / kStrip; }
  int64_t partner(int64_t i) const { return (i + views() / 2) % views(); }
  bool bounded() const { return scale <= kSafe; }
};

// Rows [first, first + height) and columns [first, first + width), row by row from `at` in the matrix.
struct Strip {
  int64_t number, first, height, width, at;

  Strip(const Batch& x, int64_t s)
      : number(s),
        first(s * kStrip),
        height(std::min(kStrip, x.views() - first)),
        width(x.views() - first),
        at(kStrip * (s * x.views() - kStrip * (s * (s - 1) / 2))) {}
};

// Calls work(strip) for each strip, in threads, the longest first.
template <typename Work>
void for_each_strip(const Batch& x, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), x.strips()), 1, [&](int64_t, int64_t) {
    for (int64_t s = next++; s < x.strips(); s = next++) work(Strip(x, s));
  });
}

template <typename T>
void fill_losses(const Batch& x, T* losses, T* lse) {
  const int64_t views = x.views(), d = x.units.size(1), side = views + kGap;
  const T scale = x.scale, lowest = std::numeric_limits<T>::lowest();
  const T* units = x.units.const_data_ptr<T>();
  T* matrix = x.matrix.data_ptr<T>();
  const at::Tensor transposed = at::empty({d, side}, x.units.options());
  T* columns = transposed.data_ptr<T>();
  at::parallel_for(0, x.strips(), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kStrip, last = std::min(views, end * kStrip);
    transpose(last - first, d, units + first * d, d, columns + first, side);
  });
  // The sums of exp(scale (s - top)) of each row, and of each strip's columns.
  std::vector<T> sums(views), tops(views, T(1)), of_pair(views);
  std::vector<T> column_sums(x.strips() * views, T(0)), column_tops(column_sums.size(), x.bounded() ? T(1) : lowest);
  for_each_strip(x, [&](const Strip& strip) {
    const int64_t first = strip.first, width = strip.width;
    T* products = matrix + strip.at;
    multiply_in_parts(strip.height, width, d, units + first * d, d, columns + first, side, products, width);
    T* of_columns = column_sums.data() + strip.number * views + first;
    T* top = column_tops.data() + strip.number * views + first;
    for (int64_t i = first; i < first + strip.height; ++i) {
      T* row = products + (i - first) * width;
      if (const int64_t j = x.partner(i); j >= first) of_pair[i] = of_pair[j] = row[j - first];
      row[i - first] = -INFINITY;  // excludes itself
      if (x.bounded()) {
        sums[i] = sum_exp(row, width, scale, scale, of_columns);
      } else {
        tops[i] = std::max(raise(row, width, top), lowest);  // one pair has no other columns
        sums[i] = sum_exp_below(row, width, scale, tops[i]);
      }
    }
    if (x.bounded()) return;
    for (int64_t r = 0; r < strip.height; ++r)
      add_exp_below(products + r * width, width, scale, top, of_columns);
  });
  std::vector<LogSum> whole(views);
  for (int64_t i = 0; i < views; ++i) whole[i].add(tops[i], sums[i], x.scale);
  for (int64_t s = 0; s < x.strips(); ++s)  // columns below a strip
    for (int64_t i = (s + 1) * kStrip; i < views; ++i)
      whole[i].add(column_tops[s * views + i], column_sums[s * views + i], x.scale);
  for (int64_t i = 0; i < views; ++i) {
    const double log_sum = std::log(whole[i].sum);
    lse[i] = whole[i].top + log_sum / x.scale;
    losses[i] = x.scale * (whole[i].top - of_pair[i]) + log_sum;
  }
}

// Entries of rows [first, last) and columns [last, views) to the transposed place; rows are `side` apart.
template <typename T>
void mirror(T* matrix, int64_t side, int64_t first, int64_t last, int64_t views) {
  T block[kStrip][kBlock];
  for (int64_t c = last; c < views; c += kBlock) {
    const int64_t n = std::min(kBlock, views - c);
    for (int64_t r = first; r < last; ++r) std::copy_n(matrix + r * side + c, n, block[r - first]);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t r = first; r < last; ++r) matrix[(c + k) * side + r] = block[r - first][k];
  }
}

template <typename T>
void fill_gradients(const Batch& x, const T* lse, const T* grad, at::Tensor of_units) {
  const int64_t views = x.views(), d = x.units.size(1), side = views + kGap;
  const T scale = x.scale;
  std::vector<T> factor(views);  // of a row's bounded exponentials
  for (int64_t i = 0; i < views; ++i) factor[i] = grad[i] * T(std::exp(x.scale * (1 - lse[i])));
  const at::Tensor weights = at::empty({views, side}, x.units.options());
  T* all = weights.data_ptr<T>();
  for_each_strip(x, [&](const Strip& strip) {
    const int64_t first = strip.first, last = first + strip.height, width = strip.width;
    for (int64_t i = first; i < last; ++i) {
      const T* from = x.matrix.const_data_ptr<T>() + strip.at + (i - first) * width;
      T* row = all + i * side + first;
      if (x.bounded())
        weigh_known(from, width, factor[i], factor.data() + first, row);
      else
        weigh_apart(from, width, scale, lse[i], grad[i], lse + first, grad + first, row);
      if (const int64_t j = x.partner(i); j >= first) row[j - first] -= grad[i] + grad[j];
    }
    mirror(all, side, first, last, views);
  });
  for_each_strip(x, [&](const Strip& strip) {
    T* grads = of_units.data_ptr<T>() + strip.first * d;
    multiply_in_parts(strip.height, d, views, all + strip.first * side, side, x.units.const_data_ptr<T>(), d, grads, d);
    for (int64_t c = 0; c < strip.height * d; ++c) grads[c] *= scale;
  });
}

}  // namespace

void pair_losses(const at::Tensor& anchors, const at::Tensor& positives, double temperature, at::Tensor losses,
                 at::Tensor lse, at::Tensor units, at::Tensor norms, at::Tensor matrix) {
  l2_normalize(anchors, positives, units, norms);
  const Batch x{units, matrix, 1 / temperature};
  if (units.scalar_type() == at::kDouble)
    fill_losses(x, losses.data_ptr<double>(), lse.data_ptr<double>());
  else
    fill_losses(x, losses.data_ptr<float>(), lse.data_ptr<float>());
}

void pair_gradients(const at::Tensor& grad, double temperature, const at::Tensor& lse, const at::Tensor& units,
                    const at::Tensor& norms, const at::Tensor& matrix, at::Tensor grads) {
  const at::Tensor of_units = at::empty(units.sizes(), units.options());
  const Batch x{units, matrix, 1 / temperature};
  if (units.scalar_type() == at::kDouble)
    fill_gradients(x, lse.const_data_ptr<double>(), grad.const_data_ptr<double>(), of_units);
  else
    fill_gradients(x, lse.const_data_ptr<float>(), grad.const_data_ptr<float>(), of_units);
  l2_normalize_backward(of_units, units, norms, grads);
}

}  // namespace copgen

// InfoNCE's row losses and gradients on the CPU: a thread multiplies a tile of similarities and reduces it while it is
// in its cache. See copgen_fast/ops/info_nce/operator.py.
//
// A symmetric matrix, whose columns are the rows, is computed on and above its diagonal only: a tile above it serves
// its rows and, transposed, its columns.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "exp_rows.h"
#include "log_sum.h"
#include "products.h"

namespace copgen {
namespace {

constexpr int64_t kTile = 128;           // most rows and columns of a tile
constexpr int64_t kStride = kTile + 16;  // from row to row: a power of two apart, rows share places of a cache
constexpr int64_t kShares = 32;          // most parts of a row of tiles, each a thread's: results depend on it

// The similarity matrix, and its special entries.
struct Matrix {
  const at::Tensor& rows;
  const at::Tensor& columns;
  const bool square, exclude_self;
  const double scale, bound;
  const int64_t offset, shift;

  int64_t m() const { return rows.size(0); }
  int64_t k() const { return columns.size(0); }
  int64_t d() const { return rows.size(1); }
  int64_t target(int64_t i) const { return offset + (i + shift) % m(); }
};

// The transposed matrix in panels [d, kStride] of up to kTile columns.
template <typename T>
struct Panels {
  at::Tensor data;
  T* at(int64_t column) const { return data.data_ptr<T>() + column / kTile * data.stride(0); }
};

template <typename T>
Panels<T> transposed(const at::Tensor& matrix) {
  const int64_t n = matrix.size(0), d = matrix.size(1);
  const Panels<T> panels{at::empty({(n + kTile - 1) / kTile, d, kStride}, matrix.options())};
  at::parallel_for(0, panels.data.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kTile; first < std::min(n, end * kTile); first += kTile)
      transpose(std::min(kTile, n - first), d, matrix.const_data_ptr<T>() + first * d, d, panels.at(first), kStride);
  });
  return panels;
}

// A tile of the matrix: similarities of rows [i, i + height) and columns [j, j + width).
template <typename T>
struct Tile {
  int64_t i, j, height, width, share;
  bool starts_share;
  T* data;
  T* row(int64_t r) const { return data + r * kStride; }
  bool has_column(int64_t column) const { return j <= column && column < j + width; }
};

// Rows of tiles one after the other: use(tile) for each of one, its shares in parallel, then finish(i, height, shares).
template <typename T, typename Use, typename Finish>
void for_each_tile(const Matrix& x, bool triangle, const Panels<T>& columns, const Use& use, const Finish& finish) {
  const T* rows = x.rows.const_data_ptr<T>();
  const int64_t tiles = (x.k() + kTile - 1) / kTile;
  for (int64_t i = 0; i < x.m(); i += kTile) {
    const int64_t height = std::min(kTile, x.m() - i), left_out = triangle ? i / kTile : 0, n = tiles - left_out;
    const int64_t shares = std::min(kShares, n);
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      alignas(64) T data[kTile * kStride];
      for (int64_t share = begin; share < end; ++share)
        for (int64_t t = share * n / shares; t < (share + 1) * n / shares; ++t) {
          const int64_t j = (left_out + t) * kTile, width = std::min(kTile, x.k() - j);
          multiply_in_parts(height, width, x.d(), rows + i * x.d(), x.d(), columns.at(j), kStride, data, kStride);
          use(Tile<T>{i, j, height, width, share, t == share * n / shares, data});
        }
    });
    finish(i, height, shares);
  }
}

template <typename T>
class Forward {
 public:
  Forward(const Matrix& x, at::Tensor& losses, std::optional<at::Tensor>& nearest,
          std::optional<at::Tensor>& nearest_logit)
      : x_(x), sums_(x.m()), of_target_(losses.data_ptr<T>()) {
    std::fill(of_target_, of_target_ + x.m(), T(0));
    if (nearest) {
      nearest_ = nearest->data_ptr<int64_t>();
      nearest_logit_ = nearest_logit->data_ptr<T>();
    }
  }

  void run(T* losses, T* lse) {
    const bool triangle = x_.square && nearest_ == nullptr;
    for_each_tile<T>(
        x_, triangle, transposed<T>(x_.columns),
        [&](const Tile<T>& tile) { add_tile(tile, triangle && tile.i != tile.j); },
        [&](int64_t i, int64_t height, int64_t shares) { add_shares(i, height, shares); });
    for (int64_t i = 0; i < x_.m(); ++i) {
      const double log_sum = std::log(sums_[i].sum);
      lse[i] = sums_[i].top + log_sum / x_.scale;
      losses[i] = x_.scale * (sums_[i].top - of_target_[i]) + log_sum;
    }
  }

 private:
  // Of a row's columns in one share.
  struct Row {
    LogSum sum;
    int64_t nearest;
    T logit = -std::numeric_limits<T>::infinity();
  };

  void add_tile(const Tile<T>& tile, bool transposed_too) {
    Row* rows = rows_.data() + tile.share * kTile;
    if (tile.starts_share) std::fill(rows, rows + tile.height, Row{{}, x_.offset});
    for (int64_t r = 0; r < tile.height; ++r) visit_row(tile, r, transposed_too, rows[r]);
    // Where exponentials can overflow, each row and each column has a running maximum.
    const bool bounded = x_.bound <= kSafe;
    T sums[kTile] = {}, tops[kTile];
    std::fill(tops, tops + tile.width, bounded ? T(x_.bound / x_.scale) : std::numeric_limits<T>::lowest());
    for (int64_t r = 0; r < tile.height; ++r) {
      if (bounded) {
        rows[r].sum.add(x_.bound / x_.scale, sum_exp(tile.row(r), tile.width, scale(), T(x_.bound), sums), x_.scale);
      } else {
        // A row whose only column in this tile is itself has no finite maximum.
        const T top = std::max(raise(tile.row(r), tile.width, tops), std::numeric_limits<T>::lowest());
        rows[r].sum.add(top, sum_exp_below(tile.row(r), tile.width, scale(), top), x_.scale);
      }
    }
    if (!transposed_too) return;
    if (!bounded)
      for (int64_t r = 0; r < tile.height; ++r) add_exp_below(tile.row(r), tile.width, scale(), tops, sums);
    for (int64_t j = 0; j < tile.width; ++j)
      sums_[tile.j + j].add(bounded ? x_.bound / x_.scale : tops[j], sums[j], x_.scale);
  }

  // Finds the product with the row's target and nearest column, and excludes the row itself from its sum.
  void visit_row(const Tile<T>& tile, int64_t r, bool transposed_too, Row& of_share) {
    const int64_t i = tile.i + r;
    T* row = tile.row(r);
    if (x_.shift >= 0 && tile.has_column(x_.target(i))) {
      of_target_[i] = row[x_.target(i) - tile.j];
      if (transposed_too) of_target_[x_.target(i)] = of_target_[i];
    }
    if (x_.exclude_self && tile.has_column(x_.offset + i)) row[x_.offset + i - tile.j] = -INFINITY;
    if (nearest_ == nullptr) return;
    const T* found = std::max_element(row, row + tile.width);
    if (scale() * *found > of_share.logit) {
      of_share.logit = scale() * *found;
      of_share.nearest = tile.j + (found - row);
    }
  }

  void add_shares(int64_t i, int64_t height, int64_t shares) {
    for (int64_t r = 0; r < height; ++r) {
      Row best{{}, x_.offset};
      for (int64_t share = 0; share < shares; ++share) {
        const Row& row = rows_[share * kTile + r];
        sums_[i + r].add(row.sum.top, row.sum.sum, x_.scale);
        if (row.logit > best.logit) best = row;
      }
      if (nearest_ == nullptr) continue;
      nearest_[i + r] = best.nearest;
      nearest_logit_[i + r] = best.logit;
    }
  }

  T scale() const { return x_.scale; }

  const Matrix& x_;
  std::vector<LogSum> sums_;
  std::vector<Row> rows_ = std::vector<Row>(kShares * kTile);  // of a row of tiles, share by share
  T *of_target_, *nearest_logit_ = nullptr;
  int64_t* nearest_ = nullptr;
};

// Log-sum-exps and gradients of losses, and factors of bounded exponentials: grad exp(bound - scale lse).
template <typename T>
struct Statistics {
  std::vector<T> lse, grad, factor;

  Statistics(const std::optional<at::Tensor>& lses, const std::optional<at::Tensor>& grads, int64_t n, const Matrix& x)
      : lse(n, std::numeric_limits<T>::infinity()), grad(n, T(0)), factor(n, T(0)) {
    if (!lses) return;  // zero gradients and exponentials
    const at::Tensor l = lses->contiguous(), g = grads->contiguous();
    std::copy_n(l.data_ptr<T>(), n, lse.begin());
    std::copy_n(g.data_ptr<T>(), n, grad.begin());
    if (x.bound <= kSafe)
      for (int64_t i = 0; i < n; ++i) factor[i] = grad[i] * T(std::exp(x.bound - x.scale * lse[i]));
  }
};

template <typename T>
void backward(const Matrix& x, const Statistics<T>& of_rows, const Statistics<T>& of_columns, at::Tensor& grad_rows) {
  const int64_t d = x.d();
  const T scale = x.scale;
  const Panels<T> columns = transposed<T>(x.columns);
  // Gradients as columns, transposed, and as rows, of each share of a row of tiles.
  const Panels<T> as_columns{x.square ? at::zeros_like(columns.data) : at::Tensor()};
  const at::Tensor as_rows = at::empty({std::min(kShares, columns.data.size(0)), kTile, d}, x.rows.options());
  const auto use = [&](const Tile<T>& tile) {
    for (int64_t r = 0; r < tile.height; ++r) {
      const int64_t i = tile.i + r;
      T* row = tile.row(r);
      if (x.exclude_self && tile.has_column(x.offset + i)) row[x.offset + i - tile.j] = -INFINITY;
      if (x.bound > kSafe)
        weigh_apart(row, tile.width, scale, of_rows.lse[i], of_rows.grad[i], of_columns.lse.data() + tile.j,
                    of_columns.grad.data() + tile.j, row);
      else
        weigh(row, tile.width, scale, T(x.bound), of_rows.factor[i], of_columns.factor.data() + tile.j, row);
      if (x.shift >= 0 && tile.has_column(x.target(i)))
        row[x.target(i) - tile.j] -= of_rows.grad[i] + of_columns.grad[x.target(i)];
    }
    multiply(tile.height, d, tile.width, tile.data, kStride, x.columns.const_data_ptr<T>() + tile.j * d, d,
             as_rows.data_ptr<T>() + tile.share * kTile * d, d, !tile.starts_share);
    if (x.square && tile.i != tile.j)
      multiply(d, tile.width, tile.height, columns.at(tile.i), kStride, tile.data, kStride, as_columns.at(tile.j),
               kStride, true);
  };
  const auto finish = [&](int64_t first, int64_t height, int64_t shares) {
    T* grad = grad_rows.data_ptr<T>() + first * d;
    if (x.square)
      transpose(d, height, as_columns.at(first), kStride, grad, d);
    else
      std::fill(grad, grad + height * d, T(0));
    at::parallel_for(0, height * d, kTile * d / 8, [&](int64_t begin, int64_t end) {
      for (int64_t share = 0; share < shares; ++share) {
        const T* part = as_rows.const_data_ptr<T>() + share * kTile * d;
        for (int64_t c = begin; c < end; ++c) grad[c] += part[c];
      }
      for (int64_t c = begin; c < end; ++c) grad[c] *= scale;
    });
  };
  for_each_tile<T>(x, x.square, columns, use, finish);
}

void fill_losses(const Matrix& x, at::Tensor losses, at::Tensor lse, std::optional<at::Tensor> nearest,
                 std::optional<at::Tensor> nearest_logit) {
  if (x.rows.scalar_type() == at::kDouble)
    Forward<double>(x, losses, nearest, nearest_logit).run(losses.data_ptr<double>(), lse.data_ptr<double>());
  else
    Forward<float>(x, losses, nearest, nearest_logit).run(losses.data_ptr<float>(), lse.data_ptr<float>());
}

void fill_gradients(const Matrix& x, const std::optional<at::Tensor>& row_lse,
                    const std::optional<at::Tensor>& row_grad, const std::optional<at::Tensor>& column_lse,
                    const std::optional<at::Tensor>& column_grad, at::Tensor grad_rows) {
  const auto& lse = x.square ? row_lse : column_lse;
  const auto& grad = x.square ? row_grad : column_grad;
  if (x.rows.scalar_type() == at::kDouble)
    backward<double>(x, {row_lse, row_grad, x.m(), x}, {lse, grad, x.k(), x}, grad_rows);
  else
    backward<float>(x, {row_lse, row_grad, x.m(), x}, {lse, grad, x.k(), x}, grad_rows);
}

}  // namespace

void row_losses(const at::Tensor& rows, const std::optional<at::Tensor>& columns, double temperature, double bound,
                int64_t offset, int64_t shift, bool exclude_self, at::Tensor losses, at::Tensor lse,
                std::optional<at::Tensor> nearest, std::optional<at::Tensor> nearest_logit) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  fill_losses({rows, columns ? *columns : rows, !columns, exclude_self, 1 / temperature, bound, offset, shift}, losses,
              lse, nearest, nearest_logit);
}

void row_gradients(const at::Tensor& rows, const std::optional<at::Tensor>& columns, double temperature, double bound,
                   const std::optional<at::Tensor>& row_lse, const std::optional<at::Tensor>& row_grad,
                   const std::optional<at::Tensor>& column_lse, const std::optional<at::Tensor>& column_grad,
                   int64_t offset, int64_t shift, bool exclude_self, at::Tensor grad_rows) {
  at::AutoDispatchBelowADInplaceOrView no_gradients;
  fill_gradients({rows, columns ? *columns : rows, !columns, exclude_self, 1 / temperature, bound, offset, shift},
                 row_lse, row_grad, column_lse, column_grad, grad_rows);
}

}  // namespace copgen

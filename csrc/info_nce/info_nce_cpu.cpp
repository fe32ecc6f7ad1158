// InfoNCE's row losses and gradients on the CPU: similarities a tile at a time by PyTorch's matrix product, reduced
// while they are in the cache. See copgen_fast/ops/info_nce/operator.py.
//
// A symmetric matrix, whose columns are the rows, is computed on and above its diagonal only: a tile above it serves
// its rows and, transposed, its columns.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "exp_rows.h"
#include "log_sum.h"

namespace copgen {
namespace {

constexpr int64_t kTile = 512;       // most rows and columns of a tile: 1 MB of floats
constexpr int64_t kSmallTile = 224;  // of a small matrix, where larger tiles would leave little of it out
constexpr int64_t kChunk = 32;  // rows of a tile that a thread takes at a time

// The similarity matrix, and its special entries.
struct Matrix {
  const at::Tensor& rows;
  const at::Tensor& columns;
  const bool square, exclude_self;
  const double scale, bound;
  const int64_t offset, shift;

  int64_t m() const { return rows.size(0); }
  int64_t k() const { return columns.size(0); }
  int64_t tile() const { return std::max(m(), k()) <= 2 * kTile ? kSmallTile : kTile; }
  int64_t target(int64_t i) const { return offset + (i + shift) % m(); }
};

// A tile of the matrix: similarities of rows [i, i + height) and columns [j, j + width), row by row.
template <typename T>
struct Tile {
  int64_t i, j, height, width;
  T* data;
  T* row(int64_t r) const { return data + r * width; }
  bool has_column(int64_t column) const { return j <= column && column < j + width; }
};

// Calls use(tile, tensor) for each tile, in the order of its rows and then its columns.
template <typename T, typename Use>
void for_each_tile(const Matrix& x, bool triangle, const Use& use) {
  const int64_t tile = x.tile();
  at::Tensor buffer = at::empty({std::min(tile, x.m()) * std::min(tile, x.k())}, x.rows.options());
  for (int64_t i = 0; i < x.m(); i += tile)
    for (int64_t j = triangle ? i : 0; j < x.k(); j += tile) {
      Tile<T> part{i, j, std::min(tile, x.m() - i), std::min(tile, x.k() - j), buffer.data_ptr<T>()};
      at::Tensor s = buffer.narrow(0, 0, part.height * part.width).view({part.height, part.width});
      at::mm_out(s, x.rows.narrow(0, i, part.height), x.columns.narrow(0, j, part.width).t());
      use(part, s);
    }
}

// Rows of a tile in parallel: work(first, last, chunk) for each chunk of them.
template <typename Work>
void for_each_chunk(int64_t height, const Work& work) {
  at::parallel_for(0, (height + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) work(c * kChunk, std::min(height, (c + 1) * kChunk), c);
  });
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
      std::fill(nearest_, nearest_ + x.m(), x.offset);
      std::fill(nearest_logit_, nearest_logit_ + x.m(), -std::numeric_limits<T>::infinity());
    }
    // Where exponentials can overflow, each row and each column has a running maximum.
    const int64_t chunks = (kTile + kChunk - 1) / kChunk;
    column_sums_.resize(chunks * kTile);
    column_tops_.resize(x.bound <= kSafe ? 0 : chunks * kTile);
  }

  void run(T* losses, T* lse) {
    const bool triangle = x_.square && nearest_ == nullptr;
    for_each_tile<T>(x_, triangle, [&](const Tile<T>& tile, const at::Tensor&) {
      const bool transposed_too = triangle && tile.i != tile.j;
      for_each_chunk(tile.height, [&](int64_t first, int64_t last, int64_t chunk) {
        add_rows(tile, first, last, chunk, transposed_too);
      });
      if (transposed_too) add_columns(tile);
    });
    for (int64_t i = 0; i < x_.m(); ++i) {
      const double log_sum = std::log(sums_[i].sum);
      lse[i] = sums_[i].top + log_sum / x_.scale;
      losses[i] = x_.scale * (sums_[i].top - of_target_[i]) + log_sum;
    }
  }

 private:
  void add_rows(const Tile<T>& tile, int64_t first, int64_t last, int64_t chunk, bool transposed_too) {
    T* sums = column_sums_.data() + chunk * kTile;
    std::fill(sums, sums + tile.width, T(0));
    const bool bounded = x_.bound <= kSafe;
    for (int64_t r = first; r < last; ++r) {
      visit_row(tile, r, transposed_too);
      if (bounded) add(tile.i + r, x_.bound / x_.scale, sum_exp(tile.row(r), tile.width, scale(), T(x_.bound), sums));
    }
    if (!bounded) add_unbounded(tile, first, last, chunk, transposed_too);
  }

  void add_unbounded(const Tile<T>& tile, int64_t first, int64_t last, int64_t chunk, bool transposed_too) {
    T* sums = column_sums_.data() + chunk * kTile;
    T* tops = column_tops_.data() + chunk * kTile;
    std::fill(tops, tops + tile.width, std::numeric_limits<T>::lowest());
    for (int64_t r = first; r < last; ++r) {
      // A row whose only column in this tile is itself has no finite maximum.
      const T top = std::max(raise(tile.row(r), tile.width, tops), std::numeric_limits<T>::lowest());
      add(tile.i + r, top, sum_exp_below(tile.row(r), tile.width, scale(), top));
    }
    if (!transposed_too) return;
    for (int64_t r = first; r < last; ++r) add_exp_below(tile.row(r), tile.width, scale(), tops, sums);
  }

  void add_columns(const Tile<T>& tile) {
    const int64_t chunks = (tile.height + kChunk - 1) / kChunk;
    for_each_chunk(tile.width, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t j = first; j < last; ++j) {
          const int64_t at = chunk * kTile + j;
          add(tile.j + j, column_tops_.empty() ? x_.bound / x_.scale : column_tops_[at], column_sums_[at]);
        }
    });
  }

  // Stores the product with the row's target and nearest column, and excludes the row itself from its sum.
  void visit_row(const Tile<T>& tile, int64_t r, bool transposed_too) {
    const int64_t i = tile.i + r;
    T* row = tile.row(r);
    if (x_.shift >= 0 && tile.has_column(x_.target(i))) {
      of_target_[i] = row[x_.target(i) - tile.j];
      if (transposed_too) of_target_[x_.target(i)] = of_target_[i];
    }
    if (x_.exclude_self && tile.has_column(x_.offset + i)) row[x_.offset + i - tile.j] = -INFINITY;
    if (nearest_ == nullptr) return;
    const T* found = std::max_element(row, row + tile.width);
    if (scale() * *found > nearest_logit_[i]) {
      nearest_logit_[i] = scale() * *found;
      nearest_[i] = tile.j + (found - row);
    }
  }

  void add(int64_t i, double top, double sum) { sums_[i].add(top, sum, x_.scale); }
  T scale() const { return x_.scale; }

  const Matrix& x_;
  std::vector<LogSum> sums_;
  T *of_target_, *nearest_logit_ = nullptr;
  int64_t* nearest_ = nullptr;
  std::vector<T> column_sums_, column_tops_;  // of each chunk of a tile's rows
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
  grad_rows.zero_();
  const T scale = x.scale;
  for_each_tile<T>(x, x.square, [&](const Tile<T>& tile, const at::Tensor& weights) {
    for_each_chunk(tile.height, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t r = first; r < last; ++r) {
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
    });
    at::Tensor into = grad_rows.narrow(0, tile.i, tile.height);
    at::addmm_out(into, into, weights, x.columns.narrow(0, tile.j, tile.width), 1, x.scale);
    if (x.square && tile.i != tile.j) {
      at::Tensor into = grad_rows.narrow(0, tile.j, tile.width);
      at::addmm_out(into, into, weights.t(), x.rows.narrow(0, tile.i, tile.height), 1, x.scale);
    }
  });
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

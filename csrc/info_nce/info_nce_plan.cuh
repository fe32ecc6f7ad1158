// Kernels and grids of the CUDA InfoNCE. `launch(kernel, x, y, threads, arguments...)` starts a grid of
// x times y blocks.
#pragma once

#include "info_nce.cuh"
#include "info_nce_backward.cuh"

namespace copgen {

template <class Launch>
void launch_triangle(const Launch& launch, const Similarity& matrix, int band, float* scratch, float* losses,
                     float* lse) {
  const int blocks = ceil_div(matrix.m, Wide::kRows), threads = 128;
  float* column_sums = scratch + matrix.m;
  for (int first = 0; first < blocks; first += band) {
    const int size = std::min(band, blocks - first);
    launch(triangle_kernel, size, 1, Wide::kThreads, matrix, first, lse, column_sums, losses);
    launch(triangle_sums_kernel, ceil_div(matrix.m, threads), 1, threads, matrix.m, matrix.bound, matrix.scale,
           matrix.shift >= 0, first, size, static_cast<const float*>(column_sums), scratch, losses, lse);
  }
}

template <class Shape, class Launch>
void launch_rows(const Launch& launch, const Similarity& matrix, float* losses, float* lse, int64_t* nearest,
                 float* nearest_logit) {
  const auto kernel = is_bounded(matrix)
                          ? (nearest ? row_losses_kernel<Shape, true, true> : row_losses_kernel<Shape, true, false>)
                          : (nearest ? row_losses_kernel<Shape, false, true> : row_losses_kernel<Shape, false, false>);
  launch(kernel, ceil_div(matrix.m, Shape::kRows), 1, Shape::kThreads, matrix, losses, lse, nearest, nearest_logit);
}

// `band` and `scratch` (of triangle_scratch floats) only matter to a triangle; nearest and nearest_logit may be null.
template <class Launch>
void launch_losses(const Launch& launch, Plan plan, const Similarity& matrix, int band, float* scratch, float* losses,
                   float* lse, int64_t* nearest, float* nearest_logit) {
  if (plan == Plan::kTriangle) return launch_triangle(launch, matrix, band, scratch, losses, lse);
  const auto rows = plan == Plan::kWide ? launch_rows<Wide, Launch> : launch_rows<Thin, Launch>;
  rows(launch, matrix, losses, lse, nearest, nearest_logit);
}

// grad_rows is [m, grad_d]: without the zeros that may fill up d.
template <class Launch>
void launch_gradients(const Launch& launch, Plan plan, const Similarity& matrix, const Statistics& stats,
                      float* grad_rows, int grad_d) {
  const int chunks = ceil_div(matrix.d, kChunk);
  const auto run = [&](auto shape, auto bounded, auto unbounded) {
    const auto kernel = is_bounded(matrix) ? bounded : unbounded;
    launch(kernel, ceil_div(matrix.m, shape.kRows), chunks, shape.kThreads, matrix, stats, grad_rows, grad_d);
  };
  if (plan == Plan::kWide)
    run(Wide(), row_gradients_kernel<Wide, true>, row_gradients_kernel<Wide, false>);
  else
    run(Thin(), row_gradients_kernel<Thin, true>, row_gradients_kernel<Thin, false>);
}

}  // namespace copgen

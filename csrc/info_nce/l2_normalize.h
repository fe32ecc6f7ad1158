// L2 normalisation of both views' embeddings, and its gradient. Defined in l2_normalize_cpu.cpp.
#pragma once

#include <ATen/core/Tensor.h>

namespace copgen {

// Rows x / max(|x|, 1e-12) of anchors and positives, floating [N, D]: units [2N, D], and norms |x| [2N].
void l2_normalize(const at::Tensor& anchors, const at::Tensor& positives, at::Tensor units, at::Tensor norms);

// grads [2N, D], of any floating dtype, of the rows whose units have the gradients `grad`.
void l2_normalize_backward(const at::Tensor& grad, const at::Tensor& units, const at::Tensor& norms, at::Tensor grads);

}  // namespace copgen

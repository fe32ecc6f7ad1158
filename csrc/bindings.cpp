// Registers the C++ operators, torch.ops.copgen_fast_cpp.*, when copgen_fast._cpp is imported.
// They fill the tensors they are given; copgen_fast/ops checks arguments.
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/library.h>

#include <optional>

namespace copgen {

// Returns whether a value of a crop is outside [0, 1], by more than rounding.
bool augment_forward(const at::Tensor& images, const at::Tensor& crop, const at::Tensor& flip, const at::Tensor& order,
                     const at::Tensor& factors, const at::Tensor& jitter, const at::Tensor& gray,
                     const at::Tensor& solarize, at::ArrayRef<double> mean, at::ArrayRef<double> std, at::Tensor views,
                     at::Tensor pivot);

void augment_backward(const at::Tensor& grad, const at::Tensor& images, const at::Tensor& crop, const at::Tensor& flip,
                      const at::Tensor& order, const at::Tensor& factors, const at::Tensor& jitter,
                      const at::Tensor& gray, const at::Tensor& solarize, const at::Tensor& pivot,
                      at::ArrayRef<double> std, bool straight_through, at::Tensor grad_images);

void separable_filter(const at::Tensor& images, const at::Tensor& weights, bool transposed, at::Tensor filtered);

void rand_augment(const at::Tensor& images, const at::Tensor& operation, const at::Tensor& argument,
                  const at::Tensor& cubic, const at::Tensor& affine, at::Tensor views);

void row_losses(const at::Tensor& rows, const std::optional<at::Tensor>& columns, double temperature, double bound,
                int64_t offset, int64_t shift, bool exclude_self, at::Tensor losses, at::Tensor lse,
                std::optional<at::Tensor> nearest, std::optional<at::Tensor> nearest_logit);

void row_gradients(const at::Tensor& rows, const std::optional<at::Tensor>& columns, double temperature, double bound,
                   const std::optional<at::Tensor>& row_lse, const std::optional<at::Tensor>& row_grad,
                   const std::optional<at::Tensor>& column_lse, const std::optional<at::Tensor>& column_grad,
                   int64_t offset, int64_t shift, bool exclude_self, at::Tensor grad_rows);

void pair_losses(const at::Tensor& anchors, const at::Tensor& positives, double temperature, at::Tensor losses,
                 at::Tensor lse, at::Tensor units, at::Tensor norms, at::Tensor kept);

void pair_gradients(const at::Tensor& grad, double temperature, const at::Tensor& lse, const at::Tensor& units,
                    const at::Tensor& norms, const at::Tensor& kept, at::Tensor grads);

void l2_normalize(const at::Tensor& anchors, const at::Tensor& positives, at::Tensor units, at::Tensor norms);

void l2_normalize_backward(const at::Tensor& grad, const at::Tensor& units, const at::Tensor& norms, at::Tensor grads);

void cond_norm(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, bool upsample, at::Tensor y);

void cond_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                        bool upsample, at::Tensor grad_x, std::optional<at::Tensor> grad_scale,
                        std::optional<at::Tensor> grad_shift);

void convolve_tiles(const at::Tensor& x, const at::Tensor& weight, c10::string_view form,
                    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& bias,
                    const std::optional<at::Tensor>& image, bool relu, int64_t first, at::Tensor out);

void prepare_tiles(const at::Tensor& weight, at::Tensor out);

void tiles_weight_gradient(const at::Tensor& x, const at::Tensor& gradient, at::Tensor out);

}  // namespace copgen

TORCH_LIBRARY(copgen_fast_cpp, m) {
  m.def(
      "augment_forward(Tensor images, Tensor crop, Tensor flip, Tensor order, Tensor factors, Tensor jitter, "
      "Tensor gray, Tensor solarize, float[] mean, float[] std, Tensor(a!) views, Tensor(b!) pivot) -> bool");
  m.def(
      "augment_backward(Tensor grad, Tensor images, Tensor crop, Tensor flip, Tensor order, Tensor factors, "
      "Tensor jitter, Tensor gray, Tensor solarize, Tensor pivot, float[] std, bool straight_through, "
      "Tensor(a!) grad_images) -> ()");
  m.def("separable_filter(Tensor images, Tensor weights, bool transposed, Tensor(a!) filtered) -> ()");
  m.def(
      "rand_augment(Tensor images, Tensor operation, Tensor argument, Tensor cubic, Tensor affine, "
      "Tensor(a!) views) -> ()");
  m.def(
      "row_losses(Tensor rows, Tensor? columns, float temperature, float bound, int offset, int shift, "
      "bool exclude_self, Tensor(a!) losses, Tensor(b!) lse, Tensor(c!)? nearest, Tensor(d!)? nearest_logit) -> ()");
  m.def(
      "row_gradients(Tensor rows, Tensor? columns, float temperature, float bound, Tensor? row_lse, Tensor? row_grad, "
      "Tensor? column_lse, Tensor? column_grad, int offset, int shift, bool exclude_self, Tensor(a!) grad_rows) -> ()");
  m.def(
      "pair_losses(Tensor anchors, Tensor positives, float temperature, Tensor(a!) losses, Tensor(b!) lse, "
      "Tensor(c!) units, Tensor(d!) norms, Tensor(e!) kept) -> ()");
  m.def(
      "pair_gradients(Tensor grad, float temperature, Tensor lse, Tensor units, Tensor norms, Tensor kept, "
      "Tensor(a!) grads) -> ()");
  m.def("l2_normalize(Tensor anchors, Tensor positives, Tensor(a!) units, Tensor(b!) norms) -> ()");
  m.def("l2_normalize_backward(Tensor grad, Tensor units, Tensor norms, Tensor(a!) grads) -> ()");
  m.def("cond_norm(Tensor x, Tensor scale, Tensor shift, bool upsample, Tensor(a!) y) -> ()");
  m.def(
      "cond_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor shift, bool upsample, Tensor(a!) grad_x, "
      "Tensor(b!)? grad_scale, Tensor(c!)? grad_shift) -> ()");
  m.def(
      "convolve_tiles(Tensor x, Tensor weight, str form, Tensor? scale, Tensor? bias, Tensor? image, bool relu, "
      "int first, Tensor(a!) out) -> ()");
  m.def("prepare_tiles(Tensor weight, Tensor(a!) out) -> ()");
  m.def("tiles_weight_gradient(Tensor x, Tensor gradient, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(copgen_fast_cpp, CPU, m) {
  m.impl("augment_forward", &copgen::augment_forward);
  m.impl("augment_backward", &copgen::augment_backward);
  m.impl("separable_filter", &copgen::separable_filter);
  m.impl("rand_augment", &copgen::rand_augment);
  m.impl("row_losses", &copgen::row_losses);
  m.impl("row_gradients", &copgen::row_gradients);
  m.impl("pair_losses", &copgen::pair_losses);
  m.impl("pair_gradients", &copgen::pair_gradients);
  m.impl("l2_normalize", &copgen::l2_normalize);
  m.impl("l2_normalize_backward", &copgen::l2_normalize_backward);
  m.impl("cond_norm", &copgen::cond_norm);
  m.impl("cond_norm_backward", &copgen::cond_norm_backward);
  m.impl("convolve_tiles", &copgen::convolve_tiles);
  m.impl("prepare_tiles", &copgen::prepare_tiles);
  m.impl("tiles_weight_gradient", &copgen::tiles_weight_gradient);
}

// Under torch.compile there is nothing to allocate: they fill the last argument.
TORCH_LIBRARY_IMPL(copgen_fast_cpp, Meta, m) {
  m.impl("convolve_tiles",
         [](const at::Tensor&, const at::Tensor&, c10::string_view, const std::optional<at::Tensor>&,
            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, bool, int64_t, at::Tensor) {});
}

PyMODINIT_FUNC PyInit__cpp() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpp", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}

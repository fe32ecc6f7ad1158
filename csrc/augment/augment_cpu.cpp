// The fused augmentation on the CPU, a view and a row at a time, so that intermediate values stay in the cache. Views
// are distributed over PyTorch's threads.
//
//   image rows -> resized along x -> [crop height, 3, w] -> along y -> colour -> views            (forward)
//   grad rows -> colour, reversed -> [h, 3, w] -> along y, transposed -> along x -> grad of image (backward)
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <cmath>

#include "rows.h"

namespace copgen {
namespace {

enum Kind : int64_t { kBrightness = 0, kContrast = 1, kSaturation = 2, kHue = 3 };

template <typename T>
struct Op {
  int64_t kind;
  T factor;  // of the blends; for the hue the shift, in [0, 1) turns
};

// Parameters of one view without its neutral ops; `contrast` is the index of the contrast in ops, or -1.
template <typename T>
struct View {
  int64_t top, left, height, width;
  bool flip, gray;
  T solarize;
  Op<T> ops[4];
  int64_t count = 0, contrast = -1;

  // Whether the gradient depends on the pixels: a crop, a flip and a gray are linear.
  bool nonlinear() const { return count > 0 || solarize < INFINITY; }
};

struct Params {
  const int64_t *crop, *order;
  const float *factors, *solarize;
  const bool *flip, *jitter, *gray;

  template <typename T>
  View<T> view(int64_t m) const {
    const int64_t* box = crop + 4 * m;
    View<T> view{box[0], box[1], box[2], box[3], flip[m], gray[m], T(solarize[m]), {}, 0, -1};
    for (int64_t position = 0; jitter[m] && position < 4; ++position) {
      const int64_t kind = order[4 * m + position];
      const T factor = factors[4 * m + kind];
      if (factor == (kind == kHue ? T(0) : T(1))) continue;
      if (kind == kContrast) view.contrast = view.count;
      view.ops[view.count++] = {kind, kind == kHue ? factor - std::floor(factor) : factor};
    }
    return view;
  }
};

// Temporary memory of a thread.
template <typename T>
struct Scratch {
  std::vector<T> quads, resized, colored, states, grad, sums;

  static T* at_least(std::vector<T>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
    return memory.data();
  }
};

template <typename T>
struct Size {
  int64_t height, width;
};

template <typename T>
void apply(const Op<T>& op, T pivot, T* row, int64_t n) {
  switch (op.kind) {
    case kBrightness:
      return blend_with_constant(row, n, op.factor, T(0));
    case kContrast:
      return blend_with_constant(row, n, op.factor, (1 - op.factor) * pivot);
    case kSaturation:
      return saturate(row, n, op.factor);
    default:
      return shift_hue(row, n, op.factor);
  }
}

// Returns the gradient of the contrast's pivot.
template <typename T>
T apply_backward(const Op<T>& op, T pivot, const T* row, T* grad, int64_t n, bool straight_through) {
  switch (op.kind) {
    case kBrightness:
      blend_with_constant_backward(row, grad, n, op.factor, T(0), straight_through);
      return 0;
    case kContrast:
      return (1 - op.factor) *
             blend_with_constant_backward(row, grad, n, op.factor, (1 - op.factor) * pivot, straight_through);
    case kSaturation:
      saturate_backward(row, grad, n, op.factor, straight_through);
      return 0;
    default:
      shift_hue_backward(row, grad, n, op.factor);
      return 0;
  }
}

constexpr double kSlack = 0.01;  // of values beyond [0, 1]: copgen_fast/ops/checks.py's SLACK

// The crop's rows of image n, each resized along x to `taps.count` pixels: [crop height, 3, w]. Sets `outside`, where it
// is given, if a value is no intensity.
template <typename T>
T* resize_along_x(const Images& images, int64_t n, const View<T>& view, const Taps<T>& taps, Scratch<T>& scratch,
                  bool* outside = nullptr) {
  T* row = Scratch<T>::at_least(scratch.states, 3 * view.width);
  T* quads = Scratch<T>::at_least(scratch.quads, 4 * view.width);
  T* resized = Scratch<T>::at_least(scratch.resized, view.height * 3 * taps.count);
  std::fill(resized, resized + view.height * 3 * taps.count, T(0));
  for (int64_t y = 0; y < view.height; ++y) {
    load_row(images, n, view.top + y, view.left, view.width, row);
    if (outside) *outside |= leaves(row, view.width, T(-kSlack), T(1 + kSlack));
    to_quads(row, view.width, quads);
    resize_row(taps, quads, taps.count, resized + y * 3 * taps.count);
  }
  return resized;
}

// The whole view before its contrast (before any op, where it has none): [h, 3, w].
template <typename T>
T* rows_before_contrast(const View<T>& view, const Taps<T>& rows, const T* resized, Size<T> size, Scratch<T>& scratch,
                        double* luminance) {
  T* colored = Scratch<T>::at_least(scratch.colored, size.height * 3 * size.width);
  for (int64_t y = 0; y < size.height; ++y) {
    T* row = colored + y * 3 * size.width;
    combine_rows(rows, y, resized, 3 * size.width, row);
    for (int64_t i = 0; i < view.contrast; ++i) apply(view.ops[i], T(0), row, size.width);
    if (luminance && view.contrast >= 0) *luminance += sum_of_luminance(row, size.width);
  }
  return colored;
}

template <typename T>
struct Forward {
  Images images, views;
  Params params;
  int64_t batch;
  Size<T> size;
  T mean[3], scale[3];
  T* pivots;
};

// Returns whether a value of the crop is no intensity.
template <typename T>
bool view_forward(const Forward<T>& job, int64_t m, Scratch<T>& scratch) {
  const View<T> view = job.params.template view<T>(m);
  const int64_t w = job.size.width, area = job.size.height * w;
  const Taps<T> columns = resize_taps<T>(view.width, w, view.flip);
  const Taps<T> rows = resize_taps<T>(view.height, job.size.height, false);
  bool outside = false;
  const T* resized = resize_along_x(job.images, m % job.batch, view, columns, scratch,
                                    job.images.dtype == at::kByte ? nullptr : &outside);
  double luminance = 0;
  T* colored = rows_before_contrast(view, rows, resized, job.size, scratch, &luminance);
  const T pivot = static_cast<T>(luminance / static_cast<double>(area));
  job.pivots[m] = pivot;
  for (int64_t y = 0; y < job.size.height; ++y) {
    T* row = colored + y * 3 * w;
    for (int64_t i = std::max<int64_t>(view.contrast, 0); i < view.count; ++i) apply(view.ops[i], pivot, row, w);
    if (view.gray) to_gray(row, w);
    if (view.solarize < INFINITY) solarize(row, w, view.solarize);
    normalize(row, w, job.mean, job.scale);
    store_row(job.views, m, y, w, row);
  }
  return outside;
}

template <typename T>
struct Backward {
  Images images, grad, grad_images;
  Params params;
  int64_t batch, views;
  Size<T> image_size, size;
  T scale[3];
  const T* pivots;
  bool straight_through;
};

// Gradient of a row before the ops from `first` on, from that of the view. Returns the gradient of the pivot.
template <typename T>
T row_backward(const Backward<T>& job, const View<T>& view, int64_t m, int64_t y, const T* row, T* grad, T* states) {
  const int64_t w = job.size.width, first = std::max<int64_t>(view.contrast, 0);
  const T pivot = job.pivots[m];
  load_row(job.grad, m, y, 0, w, grad);
  const T none[3] = {};
  normalize(grad, w, none, job.scale);
  if (!view.nonlinear()) {
    if (view.gray) to_gray_backward(grad, w);
    return 0;
  }
  // states[i]: the row before op first + i.
  std::copy(row, row + 3 * w, states);
  T* state = states;
  for (int64_t i = first; i < view.count; ++i, state += 3 * w) {
    std::copy(state, state + 3 * w, state + 3 * w);
    apply(view.ops[i], pivot, state + 3 * w, w);
  }
  if (view.solarize < INFINITY) {
    if (view.gray) to_gray(state, w);
    solarize_backward(state, grad, w, view.solarize);
  }
  if (view.gray) to_gray_backward(grad, w);
  T to_pivot = 0;
  for (int64_t i = view.count - 1; i >= first; --i) {
    state -= 3 * w;
    to_pivot += apply_backward(view.ops[i], pivot, state, grad, w, job.straight_through);
  }
  return to_pivot;
}

// The gradient with respect to the resized crop, [h, 3, w].
template <typename T>
T* color_backward(const Backward<T>& job, const View<T>& view, int64_t m, const Taps<T>& rows, const T* resized,
                  Scratch<T>& scratch) {
  const int64_t h = job.size.height, w = job.size.width, area = h * w;
  const T* colored = view.nonlinear() ? rows_before_contrast(view, rows, resized, job.size, scratch, nullptr) : nullptr;
  T* grad = Scratch<T>::at_least(scratch.grad, 3 * area);
  T* states = Scratch<T>::at_least(scratch.states, 5 * 3 * w);
  double to_pivot = 0;
  for (int64_t y = 0; y < h; ++y)
    to_pivot += row_backward(job, view, m, y, colored ? colored + y * 3 * w : nullptr, grad + y * 3 * w, states);
  if (view.contrast < 0) return grad;
  const T to_pixel = static_cast<T>(to_pivot / static_cast<double>(area));
  for (int64_t y = 0; y < h; ++y) {
    T* row = grad + y * 3 * w;
    add_to_luminance(row, w, to_pixel);
    if (view.contrast == 0) continue;
    combine_rows(rows, y, resized, 3 * w, states);
    for (int64_t i = 0; i + 1 < view.contrast; ++i) {
      std::copy(states + i * 3 * w, states + (i + 1) * 3 * w, states + (i + 1) * 3 * w);
      apply(view.ops[i], T(0), states + (i + 1) * 3 * w, w);
    }
    for (int64_t i = view.contrast - 1; i >= 0; --i)
      apply_backward(view.ops[i], T(0), states + i * 3 * w, row, w, job.straight_through);
  }
  return grad;
}

// Adds the gradient of view m to rows `sums` [H, 3, W] of its image, or, of a lone view, writes it row by row.
template <typename T>
void crop_backward(const Backward<T>& job, const View<T>& view, const Taps<T>& rows, const Taps<T>& columns,
                   const T* grad, int64_t n, bool lone, T* sums, Scratch<T>& scratch) {
  const int64_t width = job.image_size.width, w = job.size.width;
  T* row = Scratch<T>::at_least(scratch.states, 3 * w);
  T* quads = Scratch<T>::at_least(scratch.quads, 4 * w);
  for (int64_t y = 0; y < job.image_size.height; ++y) {
    T* sum = lone ? sums : sums + y * 3 * width;
    if (lone) std::fill(sum, sum + 3 * width, T(0));
    if (y >= view.top && y < view.top + view.height) {
      combine_rows(rows, y - view.top, grad, 3 * w, row);
      to_quads(row, w, quads);
      resize_row(columns, quads, width, sum + view.left);
    }
    if (lone) store_row(job.grad_images, n, y, width, sum);
  }
}

template <typename T>
void image_backward(const Backward<T>& job, int64_t n, Scratch<T>& scratch) {
  const int64_t height = job.image_size.height, width = job.image_size.width, w = job.size.width;
  const bool lone = job.views == job.batch;
  T* sums = Scratch<T>::at_least(scratch.sums, (lone ? 1 : height) * 3 * width);
  if (!lone) std::fill(sums, sums + height * 3 * width, T(0));
  for (int64_t m = n; m < job.views; m += job.batch) {
    const View<T> view = job.params.template view<T>(m);
    const Taps<T> columns = resize_taps<T>(view.width, w, view.flip);
    const Taps<T> rows = resize_taps<T>(view.height, job.size.height, false);
    const T* resized = view.nonlinear() ? resize_along_x(job.images, n, view, columns, scratch) : nullptr;
    const T* grad = color_backward(job, view, m, rows, resized, scratch);
    crop_backward(job, view, transposed(rows, view.height), transposed(columns, view.width), grad, n, lone, sums,
                  scratch);
  }
  for (int64_t y = 0; !lone && y < height; ++y) store_row(job.grad_images, n, y, width, sums + y * 3 * width);
}

template <typename T>
bool run_forward(const Forward<T>& job, int64_t views) {
  std::atomic<bool> outside{false};
  at::parallel_for(0, views, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t m = begin; m < end; ++m)
      if (view_forward(job, m, scratch)) outside = true;
  });
  return outside;
}

template <typename T>
void run_backward(const Backward<T>& job) {
  at::parallel_for(0, job.batch, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch;
    for (int64_t n = begin; n < end; ++n) image_backward(job, n, scratch);
  });
}

// Contiguous copies of the parameters, kept alive while a job runs.
struct Drawn {
  at::Tensor crop, flip, order, factors, jitter, gray, solarize;

  Drawn(const at::Tensor& crop, const at::Tensor& flip, const at::Tensor& order, const at::Tensor& factors,
        const at::Tensor& jitter, const at::Tensor& gray, const at::Tensor& solarize)
      : crop(crop.contiguous()),
        flip(flip.contiguous()),
        order(order.contiguous()),
        factors(factors.contiguous()),
        jitter(jitter.contiguous()),
        gray(gray.contiguous()),
        solarize(solarize.contiguous()) {}

  Params params() const {
    return {crop.const_data_ptr<int64_t>(),   order.const_data_ptr<int64_t>(), factors.const_data_ptr<float>(),
            solarize.const_data_ptr<float>(), flip.const_data_ptr<bool>(),     jitter.const_data_ptr<bool>(),
            gray.const_data_ptr<bool>()};
  }
};

template <typename T>
Size<T> size_of(const at::Tensor& images) {
  return {images.size(2), images.size(3)};
}

template <typename T>
bool forward(const at::Tensor& images, const Drawn& drawn, at::ArrayRef<double> mean, at::ArrayRef<double> std,
             const at::Tensor& views, const at::Tensor& pivot) {
  Forward<T> job{Images(images),
                 Images(views),
                 drawn.params(),
                 images.size(0),
                 size_of<T>(views),
                 {},
                 {},
                 pivot.mutable_data_ptr<T>()};
  for (int64_t c = 0; c < 3; ++c) {
    job.mean[c] = static_cast<T>(mean[c]);
    job.scale[c] = static_cast<T>(1 / std[c]);
  }
  return run_forward(job, views.size(0));
}

template <typename T>
void backward(const at::Tensor& grad, const at::Tensor& images, const Drawn& drawn, const at::Tensor& pivot,
              at::ArrayRef<double> std, bool straight_through, const at::Tensor& grad_images) {
  const at::Tensor pivots = pivot.contiguous();
  Backward<T> job{Images(images),
                  Images(grad),
                  Images(grad_images),
                  drawn.params(),
                  images.size(0),
                  grad.size(0),
                  size_of<T>(images),
                  size_of<T>(grad),
                  {},
                  pivots.const_data_ptr<T>(),
                  straight_through};
  for (int64_t c = 0; c < 3; ++c) job.scale[c] = static_cast<T>(1 / std[c]);
  run_backward(job);
}

}  // namespace

bool augment_forward(const at::Tensor& images, const at::Tensor& crop, const at::Tensor& flip, const at::Tensor& order,
                     const at::Tensor& factors, const at::Tensor& jitter, const at::Tensor& gray,
                     const at::Tensor& solarize, at::ArrayRef<double> mean, at::ArrayRef<double> std, at::Tensor views,
                     at::Tensor pivot) {
  const Drawn drawn(crop, flip, order, factors, jitter, gray, solarize);
  if (images.scalar_type() == at::kDouble)
    return forward<double>(images, drawn, mean, std, views, pivot);
  return forward<float>(images, drawn, mean, std, views, pivot);
}

void augment_backward(const at::Tensor& grad, const at::Tensor& images, const at::Tensor& crop, const at::Tensor& flip,
                      const at::Tensor& order, const at::Tensor& factors, const at::Tensor& jitter,
                      const at::Tensor& gray, const at::Tensor& solarize, const at::Tensor& pivot,
                      at::ArrayRef<double> std, bool straight_through, at::Tensor grad_images) {
  const Drawn drawn(crop, flip, order, factors, jitter, gray, solarize);
  if (images.scalar_type() == at::kDouble)
    backward<double>(grad, images, drawn, pivot, std, straight_through, grad_images);
  else
    backward<float>(grad, images, drawn, pivot, std, straight_through, grad_images);
}

}  // namespace copgen

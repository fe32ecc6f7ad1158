// How tiles of a 3 x 3 convolution become matrix products over channels, along one axis: `kReach` inputs, the first one
// `kBefore` before `kStep` times the tile's number, become `kValues` values, one for each product; these become `kSide` outputs.
// Along both axes a tile takes the square of `kValues` products. `kOrder` says which of a prepared weight's numbers
// multiplies which value. See copgen_fast/ops/tiles.py, whose weights these are for.
#pragma once

#include "target_clones.h"

namespace copgen {

// F(4 x 4, 3 x 3) at the points 0, a, -a, 1/a, -1/a and infinity, a = sqrt(2).
struct Winograd {
  static constexpr int kReach = 6, kBefore = 1, kStep = 4, kValues = 6, kSide = 4, kOrder[] = {0, 1, 2, 3, 4, 5};
  static constexpr double kA = 1.4142135623730951, kB = 0.70710678118654752;

  template <typename T>
  static COPGEN_INLINE void values(const T (&x)[kReach], T (&out)[kValues]) {
    const T q = x[3] - T(0.5) * x[1], r = x[4] - T(0.5) * x[2], s = x[3] - T(2) * x[1], t = x[4] - T(2) * x[2];
    out[0] = x[0] + x[4] - T(2.5) * x[2];
    out[1] = q + T(kB) * r;
    out[2] = q - T(kB) * r;
    out[3] = s + T(kA) * t;
    out[4] = s - T(kA) * t;
    out[5] = x[1] + x[5] - T(2.5) * x[3];
  }

  template <typename T>
  static COPGEN_INLINE void outputs(const T (&x)[kValues], T (&out)[kSide]) {
    const T sum = x[1] + x[2], sum_inverse = x[3] + x[4], difference = x[1] - x[2], difference_inverse = x[3] - x[4];
    out[0] = x[0] + sum - sum_inverse;
    out[1] = T(kA) * (difference - T(0.5) * difference_inverse);
    out[2] = T(2) * (sum - T(0.25) * sum_inverse);
    out[3] = x[5] + T(2 * kA) * (difference - T(0.125) * difference_inverse);
  }
};

// The same by flipped taps, whose numbers are those at the inverses of the points.
struct WinogradAdjoint : Winograd {
  static constexpr int kOrder[] = {5, 3, 4, 1, 2, 0};
};

// The transpose of Winograd's outputs: gradients of a tile's outputs to those of its products. Together with the values
// they give the gradient of a prepared weight.
struct WinogradOutputsAdjoint {
  static constexpr int kReach = 4, kBefore = 0, kStep = 4, kValues = 6, kOrder[] = {0, 1, 2, 3, 4, 5};

  template <typename T>
  static COPGEN_INLINE void values(const T (&x)[kReach], T (&out)[kValues]) {
    const T even = x[0] + T(2) * x[2], odd = T(Winograd::kA) * (x[1] + T(2) * x[3]);
    const T even_inverse = x[0] + T(0.5) * x[2], odd_inverse = T(Winograd::kB) * (x[1] + T(0.5) * x[3]);
    out[0] = x[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = -even_inverse - odd_inverse;
    out[4] = odd_inverse - even_inverse;
    out[5] = x[3];
  }
};

// A weight's three taps to Winograd's numbers, and the transpose of that.
struct WinogradTaps {
  static constexpr int kReach = 3, kValues = 6, kSide = 3, kOrder[] = {0, 1, 2, 3, 4, 5};
  static constexpr double kThird = 1.0 / 3;

  template <typename T>
  static COPGEN_INLINE void values(const T (&x)[kReach], T (&out)[kValues]) {
    const T even = T(Winograd::kB * kThird) * x[0] + T(Winograd::kA * kThird) * x[2], odd = T(kThird) * x[1];
    const T even_inverse = T(Winograd::kA * kThird) * x[0] + T(Winograd::kB * kThird) * x[2];
    out[0] = x[0];
    out[1] = odd + even;
    out[2] = odd - even;
    out[3] = odd + even_inverse;
    out[4] = odd - even_inverse;
    out[5] = x[2];
  }

  template <typename T>
  static COPGEN_INLINE void outputs(const T (&x)[kValues], T (&out)[kSide]) {
    const T even = T(kThird) * (x[1] - x[2]), even_inverse = T(kThird) * (x[3] - x[4]);
    out[0] = x[0] + T(Winograd::kB) * even + T(Winograd::kA) * even_inverse;
    out[1] = T(kThird) * (x[1] + x[2] + x[3] + x[4]);
    out[2] = x[5] + T(Winograd::kA) * even + T(Winograd::kB) * even_inverse;
  }
};

// Nearest upsampling by 2 and a convolution by the taps (u, v, w) with the sum s, of two pixels x[1] and x[2] between
// their neighbours to four outputs. The weight's numbers are u, s / 2, (w - u - v) / 2, (v + w - u) / 2 and w.
struct Differences {
  static constexpr int kReach = 4, kBefore = 1, kStep = 2, kValues = 5, kSide = 4, kOrder[] = {0, 1, 2, 3, 4};

  template <typename T>
  static COPGEN_INLINE void values(const T (&x)[kReach], T (&out)[kValues]) {
    out[0] = x[0] - x[2];
    out[1] = x[1] + x[2];
    out[2] = out[3] = x[2] - x[1];
    out[4] = x[3] - x[1];
  }

  template <typename T>
  static COPGEN_INLINE void outputs(const T (&x)[kValues], T (&out)[kSide]) {
    out[0] = x[0] + x[1] - x[3];
    out[1] = x[1] + x[2];
    out[2] = x[1] + x[3];
    out[3] = x[4] + x[1] - x[2];
  }
};

// Its gradient with respect to the two pixels, from those of their outputs x[1] to x[4] and of these' neighbours.
struct DifferencesAdjoint {
  static constexpr int kReach = 6, kBefore = 1, kStep = 4, kValues = 5, kSide = 2, kOrder[] = {0, 1, 2, 3, 4};

  template <typename T>
  static COPGEN_INLINE void values(const T (&x)[kReach], T (&out)[kValues]) {
    out[0] = x[5] - x[1];
    out[1] = x[1] + x[2] + x[3] + x[4];
    out[2] = x[2] - x[4];
    out[3] = x[3] - x[1];
    out[4] = x[0] - x[4];
  }

  template <typename T>
  static COPGEN_INLINE void outputs(const T (&x)[kValues], T (&out)[kSide]) {
    out[0] = x[1] - x[2] - x[3] + x[4];
    out[1] = x[0] + x[1] + x[2] + x[3];
  }
};

}  // namespace copgen

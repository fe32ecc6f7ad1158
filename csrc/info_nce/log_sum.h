// Sums of exponentials on the CPU whose logarithm is wanted.
#pragma once

#include <cmath>
#include <limits>

namespace copgen {

constexpr double kSafe = 40;  // exp(-2 * 40) is a normal float

// Running log-sum-exp of products s: the sum of exp(scale (s - top)); top never decreases. Only differences of products
// are scaled: a scaled product would be rounded, by more than 1 where it is large.
struct LogSum {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;

  void add(double other_top, double other_sum, double scale) {
    if (other_top > top) {
      sum *= std::exp(scale * (top - other_top));
      top = other_top;
    }
    sum += other_sum * (other_top == top ? 1 : std::exp(scale * (other_top - top)));
  }
};

}  // namespace copgen

// float16 and bfloat16 storage types, with conversions that the compiler vectorises on any x86-64.
#pragma once

#include <cstdint>
#include <cstring>

#include "target_clones.h"

namespace copgen {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

COPGEN_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

COPGEN_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

COPGEN_INLINE float widen(float value) { return value; }
COPGEN_INLINE double widen(double value) { return value; }
COPGEN_INLINE float widen(BFloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

// The exponent's bias is 112 larger in float; the product is right for subnormal numbers too.
COPGEN_INLINE float widen(Float16 value) {
  const uint32_t bits = value.bits, magnitude = (bits & 0x7fffu) << 13;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t infinite = magnitude | 0x7f800000u;  // or NaN
  return as_float((magnitude >= 0x0f800000u ? infinite : finite) | (bits & 0x8000u) << 16);
}

// Rounds to nearest, ties to even; every NaN becomes the same one.
template <typename S>
S narrow(float value);
template <typename S>
S narrow(double value);

template <>
COPGEN_INLINE float narrow<float>(float value) {
  return value;
}
template <>
COPGEN_INLINE double narrow<double>(double value) {
  return value;
}

template <>
COPGEN_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = as_bits(value), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

template <>
COPGEN_INLINE Float16 narrow<Float16>(float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  // The steps of numbers from a half on are those of float16's subnormal ones: the sum is rounded to them.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;              // from 65520 on, which rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
}

}  // namespace copgen

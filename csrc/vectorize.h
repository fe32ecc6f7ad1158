// How loops reach the vector units: the compiler vectorises, once per instruction set, and the loader picks.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
// One copy for AVX-512, one for AVX2 with FMA, one for any x86-64; resolved when the library is loaded.
#define COPGEN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COPGEN_CLONES
#endif

// Helpers must melt into the cloned function that calls them: on their own they would be compiled for any x86-64.
#define COPGEN_INLINE inline __attribute__((always_inline))

namespace copgen {

// The three channels of a pixel and a spare, in one vector register; it may lie at any address.
template <typename T>
struct Quad {
  typedef T type __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
};

}  // namespace copgen

// Functions that the compiler vectorises once per instruction set, and among which the loader picks: AVX-512, AVX2
// with FMA, or any x86-64. Only float is worth it.
#pragma once

// The bodies must melt into the cloned functions that call them: on their own they would be compiled for any x86-64.
#define COPGEN_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define COPGEN_CLONES_float __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COPGEN_CLONES_float
#endif
#define COPGEN_CLONES_double

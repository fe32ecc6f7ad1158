// Function multiversioning: a version for AVX-512, AVX2 with FMA and any x86-64 each, chosen by the loader. Only float
// gains from it. Not under AddressSanitizer: the loader chooses before that is ready.
#pragma once

// Bodies must be inlined into the cloned functions that call them, or they would be compiled for any x86-64.
#define COPGEN_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__)
#define COPGEN_CLONES_float __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define COPGEN_CLONES_float
#endif
#define COPGEN_CLONES_double

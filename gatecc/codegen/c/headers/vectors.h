// Vectors of floats as wide as the target has them, in the extensions that GCC and clang share.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))  // once in the binary: the compiler is to be quick, too
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vf load(const float *p) { return *(const vf_anywhere *)p; }
INLINE void store(float *p, vf x) { *(vf_anywhere *)p = x; }
INLINE vf splat(float x) { return x - (vf){0}; }
// A store past the caches: it does not read the line first, nor push others out. p is aligned to a vector.
INLINE void stream(float *p, vf x) {
#if defined(__AVX__)
    __asm__ volatile("vmovntps %1, %0" : "=m"(*(vf_anywhere *)p) : "v"(x));
#else
    store(p, x);
#endif
}
// What this thread has streamed is written before what it stores from now on.
INLINE void end_streams(void) {
#if defined(__AVX__)
    __builtin_ia32_sfence();
#endif
}
// One value for all lanes, kept in a register: left alone, GCC reads it from memory again at each use.
INLINE vf broadcast(float x) {
    vf y = splat(x);
#if defined(__AVX512F__)
    __asm__("" : "+v"(y));
#endif
    return y;
}
INLINE vf either(vi mask, vf x, vf y) { return (vf)(((vi)x & mask) | ((vi)y & ~mask)); }
// x between two bounds; NaN stays.
INLINE vf between(vf low, vf x, vf high) {
#if defined(__AVX__) && LANES == 8
    return __builtin_ia32_minps256(high, __builtin_ia32_maxps256(low, x));
#else
    x = either(x < low, low, x);
    return either(x > high, high, x);
#endif
}

#if defined(__AVX512DQ__)
// 2^x to 2e-7: the power of two below x, by the instruction that scales, and a polynomial in the rest, of least
// relative error. Exactly 1 at 0, 0 far below 0 and at -inf, inf above 128, NaN for NaN.
INLINE vf power2(vf x) {
    vf rest, result;
    __asm__("vreduceps $1, %1, %0" : "=v"(rest) : "v"(x));
    vf p = rest * 1.8671304956e-3f + 9.0170294152e-3f;
    p = p * rest + 5.5799913759e-2f;
    p = p * rest + 2.4016444997e-1f;
    p = p * rest + 6.9315131182e-1f;
    p = p * rest + 1.0f;
    __asm__("vscalefps %2, %1, %0" : "=v"(result) : "v"(p), "v"(x));
    return result;
}
#else
// 2^x to 2e-7: a power of two and a polynomial in what is left of x, at most a half. Exactly 1 at 0, 0 from -127 on,
// inf above 128, NaN for NaN.
INLINE vf power2(vf x) {
    x = between(splat(-127.0f), x, splat(128.0f));  // there the exponent alone gives 0 and inf
    const vf shifted = x + 12582912.0f;             // the nearest integer, in the low bits
    const vf rest = x - (shifted - 12582912.0f);
    vf p = rest * 1.32647e-3f + 9.67151e-3f;
    p = p * rest + 5.550734e-2f;
    p = p * rest + 2.4022242e-1f;
    p = p * rest + 6.9314698e-1f;
    p = p * rest + 1.0f;
    return p * (vf)(((vi)shifted - 0x4b400000 + 127) << 23);
}
#endif
// e^x to 2e-7 (and 1e-7 |x|), exactly 1 at 0, 0 far below 0 and at -inf, inf above 88, NaN for NaN.
INLINE vf exponential(vf x) { return power2(x * 1.44269504088896341f); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (vi){__VA_ARGS__})
#endif

// Lane i of the result is the sum of x[i]: halves are folded onto each other, two vectors at a time.
INLINE vf sums(vf x[LANES]) {
#if LANES == 16
    UNROLL for (int i = 0; i < 8; i++)
        x[i] = SHUFFLE(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    UNROLL for (int i = 0; i < 4; i++)
        x[i] = SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    UNROLL for (int i = 0; i < 2; i++)
        x[i] = SHUFFLE(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif LANES == 8
    UNROLL for (int i = 0; i < 4; i++)
        x[i] = SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    UNROLL for (int i = 0; i < 2; i++)
        x[i] = SHUFFLE(x[i], x[i + 2], 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(x[i], x[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(x[0], x[1], 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(x[0], x[1], 1, 9, 3, 11, 5, 13, 7, 15);
#else
    UNROLL for (int i = 0; i < 2; i++)
        x[i] = SHUFFLE(x[i], x[i + 2], 0, 1, 4, 5) + SHUFFLE(x[i], x[i + 2], 2, 3, 6, 7);
    return SHUFFLE(x[0], x[1], 0, 4, 2, 6) + SHUFFLE(x[0], x[1], 1, 5, 3, 7);
#endif
}

// Denormals cost a hundred cycles each and decayed states are full of them: they are zero inside a kernel.
#if defined(__SSE2__)
INLINE uint64_t flush_denormals(void) {
    const unsigned old = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(old | 0x8040);
    return old;
}
INLINE void restore_denormals(uint64_t old) { __builtin_ia32_ldmxcsr((unsigned)old); }
#elif defined(__aarch64__)
INLINE uint64_t flush_denormals(void) {
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"(old | (1ull << 24)));
    return old;
}
INLINE void restore_denormals(uint64_t old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#else
INLINE uint64_t flush_denormals(void) { return 0; }
INLINE void restore_denormals(uint64_t old) { (void)old; }
#endif

// Numbers as tensors hold them (el), as products read them (num), and vectors of lanes of 32 bits, PAIR numbers a lane.
#pragma once
#include "vectors.h"

#ifndef BF16
#define BF16 0  // whether tensors are bfloat16, not float: kernels.py says it
#endif

#if BF16
typedef uint16_t el;
INLINE float widen(el x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE el narrow(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (el)(bits >> 16 | 0x40);
    return (el)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float el;
INLINE float widen(el x) { return x; }
INLINE el narrow(float x) { return x; }
#endif

#if BF16 && defined(__AVX512BF16__) && LANES == 16 && !defined(SINGLE)
// The CPU multiplies pairs of bfloat16 (unless numbers are to be SINGLE ones) and adds both products to a float.
#include <immintrin.h>
#define PAIR 2
typedef uint16_t num;
INLINE vf plus_product(vf sum, vf x, vf y) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
INLINE num as_num(float x) { return narrow(x); }
#else
#define PAIR 1
typedef float num;
// One rounding, in tiles of every size: GCC, tuned for AMD, takes the sum of a single row apart into two operations.
INLINE vf plus_product(vf sum, vf x, vf y) {
#if defined(__clang__) || !defined(__FMA__)
    return sum + x * y;
#elif LANES == 16
    return __builtin_ia32_vfmaddps512_mask(x, y, sum, -1, 4);
#else
    return __builtin_ia32_vfmaddps256(x, y, sum);
#endif
}
INLINE num as_num(float x) { return x; }
#endif
#define DIRECT (PAIR == 2 || !BF16)  // whether products read numbers as tensors hold them

// Lanes in memory to lanes in a register, and one lane everywhere. Bits, not values.
INLINE vf same(const num *p) {
    int32_t bits;
    memcpy(&bits, p, 4);
    return (vf)(bits - (vi){0});
}
#if DIRECT
INLINE vf lanes(const el *p) { return load((const float *)(const void *)p); }
#else
INLINE vf lanes(const el *p) {
    typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    typedef uint32_t whole __attribute__((vector_size(4 * LANES)));
    return (vf)(__builtin_convertvector(*(const halves *)p, whole) << 16);
}
#endif
// The first n numbers (n < LANES * PAIR), zeros after them.
INLINE vf lanes_of(const el *p, int64_t n) {
#if DIRECT
    vf x = splat(0.0f);
    memcpy(&x, p, (size_t)n * sizeof(el));
#else
    vf x = splat(0.0f);
    for (int64_t i = 0; i < n; i++) ((float *)&x)[i] = widen(p[i]);
#endif
    return x;
}

INLINE vf floats_of(const float *p, int64_t n) {
    vf x = splat(0.0f);
    memcpy(&x, p, (size_t)n * 4);
    return x;
}

// LANES values to memory, or the first n.
INLINE void store_floats(float *p, vf x, int64_t n) {
    if (n >= LANES) store(p, x);
    else memcpy(p, &x, (size_t)n * 4);
}
#if PAIR == 2
INLINE void store_els(el *p, vf x, int64_t n) {
    const __mmask16 mask = n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
INLINE vf load_els(const el *p, int64_t n) {
    const __mmask16 mask = n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
}
#elif BF16
INLINE void store_els(el *p, vf x, int64_t n) {
    if (n >= LANES)
        for (int i = 0; i < LANES; i++) p[i] = narrow(((float *)&x)[i]);
    else
        for (int64_t i = 0; i < n; i++) p[i] = narrow(((float *)&x)[i]);
}
INLINE vf load_els(const el *p, int64_t n) { return n >= LANES ? lanes(p) : lanes_of(p, n); }
#else
INLINE void store_els(el *p, vf x, int64_t n) { store_floats(p, x, n); }
INLINE vf load_els(const el *p, int64_t n) { return n >= LANES ? load(p) : lanes_of(p, n); }
#endif
#if DIRECT
INLINE void store_nums(num *p, vf x, int64_t n) { store_els((el *)p, x, n); }
#else
INLINE void store_nums(num *p, vf x, int64_t n) { store_floats(p, x, n); }
#endif

// Rows of LANES lanes become columns.
INLINE void transpose(vf x[LANES]) {
#define LIST(...) __VA_ARGS__
#define SWAP(at, d, low, high) { \
    const int at0 = at; \
    const vf a = x[at0], b = x[at0 + d]; \
    x[at0] = SHUFFLE(a, b, LIST low); \
    x[at0 + d] = SHUFFLE(a, b, LIST high); \
}
#if LANES == 16
    UNROLL for (int i = 0; i < 8; i++)
        SWAP(i, 8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    UNROLL for (int j = 0; j < 8; j++)
        SWAP((j & 3) + 2 * (j & 4), 4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    UNROLL for (int j = 0; j < 8; j++)
        SWAP((j & 1) + 2 * (j & 6), 2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    UNROLL for (int j = 0; j < 8; j++)
        SWAP(2 * j, 1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#elif LANES == 8
    UNROLL for (int i = 0; i < 4; i++)
        SWAP(i, 4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
    UNROLL for (int j = 0; j < 4; j++)
        SWAP((j & 1) + 2 * (j & 2), 2, (0, 1, 8, 9, 4, 5, 12, 13),
        (2, 3, 10, 11, 6, 7, 14, 15))
    UNROLL for (int j = 0; j < 4; j++)
        SWAP(2 * j, 1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
#else
    UNROLL for (int i = 0; i < 2; i++) SWAP(i, 2, (0, 1, 4, 5), (2, 3, 6, 7))
    UNROLL for (int j = 0; j < 2; j++) SWAP(2 * j, 1, (0, 4, 2, 6), (1, 5, 3, 7))
#endif
#undef SWAP
#undef LIST
}

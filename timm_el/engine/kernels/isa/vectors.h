/* Vectors of LANES floats in the compiler's own arithmetic, and the few operations that need more than an operator.
 *
 * An instruction-set file of isa/ starts with EL_TARGET(...), defines LANES and includes this, then real.h, signs.h,
 * depthwise.h or depthwise_real.h for what is written once for all. Contraction is off (flags.txt): a * b + c is two roundings everywhere.
 */
#include "../isa.h"

#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

#define INLINE static inline __attribute__((always_inline))

/* Switch on the pixels of a tile, so that the compiler knows their number as P; at most `most` of 8. */
#define WITH_PIXELS(pixels, most, call)                          \
    switch (pixels) {                                            \
        case 1: if (most >= 1) { enum { P = 1 }; call; } break;  \
        case 2: if (most >= 2) { enum { P = 2 }; call; } break;  \
        case 3: if (most >= 3) { enum { P = 3 }; call; } break;  \
        case 4: if (most >= 4) { enum { P = 4 }; call; } break;  \
        case 5: if (most >= 5) { enum { P = 5 }; call; } break;  \
        case 6: if (most >= 6) { enum { P = 6 }; call; } break;  \
        case 7: if (most >= 7) { enum { P = 7 }; call; } break;  \
        default: if (most >= 8) { enum { P = 8 }; call; } break; \
    }

/* ------------------------------------------------------------------------------------------------------------------ */

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES))); /* wraps where channels are undefined */
typedef float vf_loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi_loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE uint64_t word_at(const void *p) {
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

INLINE vf load_floats(const void *p) { return (vf) * (const vf_loose *)p; }
INLINE vi load_ints(const void *p) { return (vi) * (const vi_loose *)p; }
INLINE void store_floats(void *p, vf v) { *(vf_loose *)p = (vf_loose)v; }
INLINE void store_ints(void *p, vi v) { *(vi_loose *)p = (vi_loose)v; }
INLINE vf spread(float s) { return (vf){0} + s; }
INLINE vf select_floats(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* Return v, with lo where v < lo; a NaN stays. Of the two zeros the one in v stays. */
INLINE vf at_least(vf v, vf lo) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)lo, (__m512)v); /* the second operand where one is NaN or they are equal */
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)lo, (__m256)v);
#else
    return select_floats(v < lo, lo, v);
#endif
}

/* Return v, with hi where v > hi; a NaN stays. */
INLINE vf at_most(vf v, vf hi) {
#if LANES == 16
    return (vf)_mm512_min_ps((__m512)hi, (__m512)v);
#elif LANES == 8
    return (vf)_mm256_min_ps((__m256)hi, (__m256)v);
#else
    return select_floats(v > hi, hi, v);
#endif
}

/* Return v where v >= 0, else v * slope. */
INLINE vf prelu(vf v, vf slope) {
#if LANES == 16
    const __mmask16 below = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NGE_UQ);
    return (vf)_mm512_mask_mul_ps((__m512)v, below, (__m512)v, (__m512)slope);
#elif LANES == 8
    const __m256 keep = _mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GE_OQ);
    return (vf)_mm256_blendv_ps((__m256)(v * slope), (__m256)v, keep);
#else
    return select_floats(v >= spread(0.f), v, v * slope);
#endif
}

/* Return the first n floats at p, 1 to LANES, and zeros behind them. Nothing beyond them is read. */
INLINE vf load_some(const float *p, int n) {
#if LANES == 16
    return (vf)_mm512_maskz_loadu_ps((__mmask16)(0xffffu >> (16 - n)), p);
#elif LANES == 8
    return (vf)_mm256_maskload_ps(p, (__m256i)((vi){0, 1, 2, 3, 4, 5, 6, 7} < n));
#else
    vf v = {0};
    for (int i = 0; i < LANES; i++)
        if (i < n) v[i] = p[i];
    return v;
#endif
}

/* Store the first n floats of v, 1 to LANES. */
INLINE void store_some(float *p, vf v, int n) {
#if LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16)(0xffffu >> (16 - n)), (__m512)v);
#else
    for (int i = 0; i < LANES; i++)
        if (i < n) p[i] = v[i];
#endif
}

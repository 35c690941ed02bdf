/* largest() and quantize() of an int8 half, in vectors of LANES floats, see int8.h. INPUT is what an input is stored as,
 * int8_t or int16_t, and ZERO what 0 is stored as. */
#include "../int8.h"

typedef INPUT narrow __attribute__((vector_size(LANES * sizeof(INPUT))));
typedef INPUT narrow_loose __attribute__((vector_size(LANES * sizeof(INPUT)), aligned(1), may_alias));

INLINE vi larger(vi a, vi b) {
#if LANES == 16
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif LANES == 8
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    const vi mask = a > b;
    return (mask & a) | (~mask & b);
#endif
}

/* Return LANES of n floats from i on: the last vector ends with them, over some of those before it, or is filled up with
 * zeros where there are fewer than a vector. */
INLINE vf some_floats(const float *x, size_t i, size_t n) {
    return n < LANES ? load_some(x, (int)n) : load_floats(x + (i + LANES <= n ? i : n - LANES));
}

/* As integers, the bits of floats are in the order of magnitudes, NaN last. */
static float largest(const float *x, size_t n, float so_far) {
    const vi magnitude = (vi){0} + 0x7fffffff;
    vi most[2] = {(vi)spread(so_far), {0}};
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) most[j] = larger(most[j], load_ints(x + i + j * LANES) & magnitude);
    for (; i < n; i += LANES) most[1] = larger(most[1], (vi)some_floats(x, i, n) & magnitude);
    most[0] = larger(most[0], most[1]);
#if LANES == 16
    const int32_t bits = _mm512_reduce_max_epi32((__m512i)most[0]);
#else
    int32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits = most[0][lane] > bits ? most[0][lane] : bits;
#endif
    float m;
    memcpy(&m, &bits, 4);
    return m;
}

/* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, which then is in the low bits. */
static void quantize(const float *x, size_t n, float inverse, void *q) {
    for (size_t i = 0; i < n; i += LANES) {
        const size_t at = n < LANES || i + LANES <= n ? i : n - LANES;
        const vf shifted = some_floats(x, i, n) * spread(inverse) + spread(0x1.8p23f);
        *(narrow_loose *)(void *)((INPUT *)q + at) = __builtin_convertvector((vi)shifted + (ZERO - 0x4b400000), narrow);
    }
}

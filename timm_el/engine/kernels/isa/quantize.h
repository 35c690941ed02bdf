/* quantize() of an int8 half, in vectors of LANES floats, see int8.h. */
#include "../int8.h"

#include <math.h>

typedef int8_t quarter __attribute__((vector_size(LANES)));
typedef int8_t quarter_loose __attribute__((vector_size(LANES), aligned(1), may_alias));

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

/* Return LANES floats from i on of a run of n: the last vector ends with the run, over some of those before it, or is
 * filled up with zeros where a run is shorter than a vector. */
INLINE vf some_of_run(const float *x, int i, int n) {
    return n < LANES ? load_some(x, n) : load_floats(x + (i + LANES <= n ? i : n - LANES));
}

/* Return the largest magnitude of a string. As integers, the bits of floats are in the order of magnitudes, NaN last.
 */
INLINE float largest_magnitude(const el_strings *in, int pixel) {
    const vi magnitude = (vi){0} + 0x7fffffff;
    const int n = in->length / 4;
    vi most[2] = {{0}};
    for (int s = 0; s < in->segments; s++) {
        const float *x = (const float *)(const void *)(in->base[pixel] + in->offsets[s]);
        int i = 0;
        for (; i + 2 * LANES <= n; i += 2 * LANES)
            for (int j = 0; j < 2; j++) most[j] = larger(most[j], load_ints(x + i + j * LANES) & magnitude);
        for (; i < n; i += LANES) most[i / LANES % 2] = larger(most[i / LANES % 2], (vi)some_of_run(x, i, n) & magnitude);
    }
    most[0] = larger(most[0], most[1]);
#if LANES == 16
    const int32_t bits = _mm512_reduce_max_epi32((__m512i)most[0]);
#else
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = most[0][i] > bits ? most[0][i] : bits;
#endif
    float m;
    memcpy(&m, &bits, 4);
    return m;
}

/* Store x * inverse, rounded, plus zero, as bytes. Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, which
 * then is in the low bits. */
INLINE quarter quantized(vf x, float inverse, int zero) {
    const vf shifted = x * spread(inverse) + spread(0x1.8p23f);
    return __builtin_convertvector((vi)shifted + (zero - 0x4b400000), quarter);
}

INLINE void quantize_pixel(const el_strings *in, int pixel, uint8_t *q, float *k, int zero) {
    const float m = largest_magnitude(in, pixel);
    const int finite = m <= 3.402823466e38f, n = in->length / 4, inputs = in->segments * n;
    float inverse = 127.f / m;
    *k = m / 127.f;
    if (!finite || !(inverse <= 3.402823466e38f)) {
        *k = finite ? 0.f : NAN;
        memset(q, zero, (size_t)(inputs + 3) / 4 * 4);
        return;
    }
    for (int s = 0; s < in->segments; s++, q += n) {
        const float *x = (const float *)(const void *)(in->base[pixel] + in->offsets[s]);
        for (int i = 0; i < n; i += LANES) {
            const int at = n < LANES || i + LANES <= n ? i : n - LANES;
            *(quarter_loose *)(void *)(q + at) = quantized(some_of_run(x, i, n), inverse, zero);
        }
    }
    memset(q, zero, (size_t)(-inputs & 3));
}

INLINE void quantize_tile(const el_strings *in, int tile, uint8_t *q, size_t step, float *k, int zero) {
    for (int p = 0; p < tile; p++) quantize_pixel(in, p, q + (size_t)p * step, k + p, zero);
}

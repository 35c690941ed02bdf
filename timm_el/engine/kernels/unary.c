/* Functions of one number. Their arithmetic is written out, one rounding for each operation, so that plain float64 tensor
 * arithmetic gives the same bits: nothing of the C library is used but the square root, which is exact.
 */
#include "program.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define ROUND_TO_INTEGER 0x1.8p52 /* added and taken away again, rounds a number below 2^51 to the nearest even */

/* exp(x) = 2^k * exp(r), r at most half of log(2): a polynomial. */
INLINE double exponential(double x) {
    x = x < -700. ? -700. : x;
    x = x > 700. ? 700. : x;
    const double shifted = x * 1.4426950408889634 + ROUND_TO_INTEGER, k = shifted - ROUND_TO_INTEGER;
    double r = x - k * 0.6931471803691238;
    r = r - k * 1.9082149292705877e-10;
    double p = 1. / 39916800.;
    p = p * r + 1. / 3628800.;
    p = p * r + 1. / 362880.;
    p = p * r + 1. / 40320.;
    p = p * r + 1. / 5040.;
    p = p * r + 1. / 720.;
    p = p * r + 1. / 120.;
    p = p * r + 1. / 24.;
    p = p * r + 1. / 6.;
    p = p * r + .5;
    p = p * r + 1.;
    p = p * r + 1.;
    uint64_t bits; /* the low bits of `shifted` are k: 2^k is k + 1023 in the exponent's place */
    double scale;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

INLINE double complementary_error(double z) {
    const double t = 1. / (1. + .5 * fabs(z));
    double p = .17087277;
    p = -.82215223 + t * p;
    p = 1.48851587 + t * p;
    p = -1.13520398 + t * p;
    p = .27886807 + t * p;
    p = -.18628806 + t * p;
    p = .09678418 + t * p;
    p = .37409196 + t * p;
    p = 1.00002368 + t * p;
    p = -1.26551223 + t * p;
    const double v = t * exponential(-(z * z) + p);
    return z >= 0. ? v : 2. - v;
}

INLINE double unit_clip(double x) {
    x = x < 0. ? 0. : x;
    return x > 1. ? 1. : x;
}

INLINE double tangent(double x) { return 1. - 2. / (exponential(2. * x) + 1.); }

INLINE double mish(double x) {
    const double e = exponential(x), n = e * e + 2. * e, y = x * n / (n + 2.);
    return x > 20. ? x : y;
}

INLINE double gelu_tanh(double x) {
    const double cube = x * x * x, inner = .7978845608028654 * (x + .044715 * cube);
    return x * .5 * (1. + tangent(inner));
}

/* Through memory of its own, so that a result in the place of its argument keeps no compiler from vectors. */
#define AT_ONCE 64
#define EACH(expression)                                                      \
    for (size_t at = 0; at < n; at += AT_ONCE) {                              \
        float in[AT_ONCE], out[AT_ONCE];                                      \
        const size_t m = n - at < AT_ONCE ? n - at : AT_ONCE;                 \
        if (m < AT_ONCE) memset(in, 0, sizeof in);                            \
        memcpy(in, xs + at, m * sizeof *xs);                                  \
        for (int i = 0; i < AT_ONCE; i++) {                                   \
            const float f = in[i];                                            \
            const double x = (double)f;                                       \
            (void)x;                                                          \
            out[i] = (float)(expression);                                     \
        }                                                                     \
        memcpy(ys + at, out, m * sizeof *ys);                                 \
    }                                                                         \
    break

void el_unary(int op, float a, float b, const float *xs, size_t n, float *ys) {
    const double alpha = (double)a;
    switch (op) {
        case EL_CLIP: EACH((f < a ? a : f) > b ? b : f < a ? a : f);
        case EL_LEAKY: EACH(f >= 0.f ? f : f * a);
        case EL_ABS: EACH(fabsf(f));
        case EL_SIGMOID: EACH(1. / (1. + exponential(-x)));
        case EL_SILU: EACH(x / (1. + exponential(-x)));
        case EL_HARDSIGMOID: EACH(unit_clip(x / 6. + .5));
        case EL_HARDSWISH: EACH(x * unit_clip(x / 6. + .5));
        case EL_GELU: EACH(x * .5 * complementary_error(-x * .70710678118654752));
        case EL_GELU_TANH: EACH(gelu_tanh(x));
        case EL_TANH: EACH(tangent(x));
        case EL_ELU: EACH(x > 0. ? x : alpha * (exponential(x) - 1.));
        case EL_MISH: EACH(mish(x));
        case EL_EXP: EACH(exponential(x));
        case EL_SQRT: EACH(sqrt(x));
        case EL_SQUARE: EACH(f * f);
    }
}

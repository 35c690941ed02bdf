/* Functions of one number, in vectors of LANES / 2. Their arithmetic is written out, one rounding for each operation, so
 * that plain float64 tensor arithmetic gives the same bits: nothing of the C library is used but the square root, which
 * is exact. */
#include "../table.h"

#include <math.h>

#define DOUBLES (LANES / 2) /* at a time */

typedef double wide __attribute__((vector_size(8 * DOUBLES)));
typedef int64_t wide_int __attribute__((vector_size(8 * DOUBLES)));
typedef uint64_t wide_uint __attribute__((vector_size(8 * DOUBLES)));
typedef float few __attribute__((vector_size(4 * DOUBLES)));
typedef int32_t few_int __attribute__((vector_size(4 * DOUBLES)));

#define SELECT(mask, a, b) ((wide)(((mask) & (wide_int)(a)) | (~(mask) & (wide_int)(b))))
#define SELECTF(mask, a, b) ((few)(((mask) & (few_int)(a)) | (~(mask) & (few_int)(b))))
#define SPREAD(s) ((wide){0} + (s))
#define MAGNITUDE ((wide_int){0} + INT64_MAX)

#define ROUNDING 0x1.8p52 /* added and taken away again, rounds a number below 2^51 to the nearest even one */

/* exp(x) = 2^k * exp(r), r at most half of log(2): a polynomial. */
INLINE wide exponential(wide x) {
    x = SELECT(x < -700., SPREAD(-700.), x);
    x = SELECT(x > 700., SPREAD(700.), x);
    const wide shifted = x * 1.4426950408889634 + ROUNDING, k = shifted - ROUNDING;
    wide r = x - k * 0.6931471803691238;
    r = r - k * 1.9082149292705877e-10;
    wide p = SPREAD(1. / 39916800.);
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
    return p * (wide)(((wide_uint)shifted + 1023)
                    << 52); /* the low bits of `shifted` are k: 2^k has k + 1023 in its exponent's place */
}

INLINE wide complementary_error(wide z) {
    const wide t = 1. / (1. + .5 * (wide)((wide_int)z & MAGNITUDE));
    wide p = SPREAD(.17087277);
    p = -.82215223 + t * p;
    p = 1.48851587 + t * p;
    p = -1.13520398 + t * p;
    p = .27886807 + t * p;
    p = -.18628806 + t * p;
    p = .09678418 + t * p;
    p = .37409196 + t * p;
    p = 1.00002368 + t * p;
    p = -1.26551223 + t * p;
    const wide v = t * exponential(-(z * z) + p);
    return SELECT(z >= 0., v, 2. - v);
}

INLINE wide unit_clip(wide x) {
    x = SELECT(x < 0., SPREAD(0.), x);
    return SELECT(x > 1., SPREAD(1.), x);
}

INLINE wide tangent(wide x) { return 1. - 2. / (exponential(2. * x) + 1.); }

INLINE wide mish(wide x) {
    const wide e = exponential(x), n = e * e + 2. * e, y = x * n / (n + 2.);
    return SELECT(x > 20., x, y);
}

INLINE wide gelu_tanh(wide x) {
    const wide cube = x * x * x, inner = .7978845608028654 * (x + .044715 * cube);
    return x * .5 * (1. + tangent(inner));
}

INLINE wide root(wide x) {
    for (int i = 0; i < DOUBLES; i++) x[i] = sqrt(x[i]);
    return x;
}

INLINE few clip(few f, float low, float high) {
    const few lo = (few){0} + low, hi = (few){0} + high;
    f = SELECTF(f < lo, lo, f);
    return SELECTF(f > hi, hi, f);
}

#define EACH(expression)                                                           \
    for (size_t at = 0; at < n; at += DOUBLES) {                                         \
        const size_t m = n - at < DOUBLES ? n - at : DOUBLES;                                  \
        few f = {0};                                                                \
        if (m == DOUBLES) memcpy(&f, xs + at, sizeof f);                                 \
        else memcpy(&f, xs + at, m * sizeof *xs);                                  \
        const wide x = __builtin_convertvector(f, wide);                               \
        (void)x;                                                                   \
        f = (expression);                                                          \
        if (m == DOUBLES) memcpy(ys + at, &f, sizeof f);                                 \
        else memcpy(ys + at, &f, m * sizeof *ys);                                  \
    }                                                                              \
    break
#define EACH_DOUBLE(expression) EACH(__builtin_convertvector((expression), few))

static void unary(int op, float a, float b, const float *xs, size_t n, float *ys) {
    const double alpha = (double)a;
    switch (op) {
        case EL_CLIP: EACH(clip(f, a, b));
        case EL_LEAKY: EACH(SELECTF(f >= 0.f, f, f * a));
        case EL_ABS: EACH((few)((few_int)f & 0x7fffffff));
        case EL_SIGMOID: EACH_DOUBLE(1. / (1. + exponential(-x)));
        case EL_SILU: EACH_DOUBLE(x / (1. + exponential(-x)));
        case EL_HARDSIGMOID: EACH_DOUBLE(unit_clip(x / 6. + .5));
        case EL_HARDSWISH: EACH_DOUBLE(x * unit_clip(x / 6. + .5));
        case EL_GELU: EACH_DOUBLE(x * .5 * complementary_error(-x * .70710678118654752));
        case EL_GELU_TANH: EACH_DOUBLE(gelu_tanh(x));
        case EL_TANH: EACH_DOUBLE(tangent(x));
        case EL_ELU: EACH_DOUBLE(SELECT(x > 0., x, alpha * (exponential(x) - 1.)));
        case EL_MISH: EACH_DOUBLE(mish(x));
        case EL_EXP: EACH_DOUBLE(exponential(x));
        case EL_SQRT: EACH_DOUBLE(root(x));
        case EL_SQUARE: EACH(f * f);
    }
}

/* Test of the int8 halves against loops written from int8.h, and their rates beside those of float32.
 *
 *     cc $(cat KERNELS/flags.txt) -I KERNELS int8.c SOURCES -lm -ldl -o int8 && ./int8 [cases [rates]] */
#include "int8.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    const char *name;
    uint32_t needs; /* bits of EL_CPU_... */
    const el_int8 *int8;
    const el_real *real;
} subject;

static const subject subjects[] = {
#if defined(EL_X86)
    {"avx512_vnni", EL_CPU_AVX512 | EL_CPU_VNNI, &el_int8_avx512_vnni, &el_real_avx512},
    {"avx2", EL_CPU_AVX2, &el_int8_avx2, &el_real_avx2},
#elif defined(EL_ARM)
    {"neon_dot", EL_CPU_NEON | EL_CPU_DOTPROD, &el_int8_neon_dot, &el_real_neon},
    {"neon", EL_CPU_NEON, &el_int8_neon, &el_real_neon},
#endif
    {"portable", 0, &el_int8_portable, &el_real_portable},
};

static uint64_t state = 88172645463325252u;

static uint64_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static int pick(int low, int high) { return low + (int)(draw() >> 33) % (high - low + 1); }

/* One value of a string; `kind` plants what a string may hold. */
static float value(int kind) {
    const float x = (float)pick(-1000, 1000) / 300.f;
    switch (kind) {
        case 0: return pick(0, 20) ? x : NAN;
        case 1: return pick(0, 20) ? x : -INFINITY;
        case 2: return pick(0, 1) ? 0.f : -0.f;
        case 3: return x * 1e-39f;
        case 4: return x * 1e-36f;
        case 5: return x * 1e37f;
        case 6: return (float)pick(-254, 254) / 2.f; /* ties */
        default: return x;
    }
}

/* Quantize one input by the formula. */
static int quantized(float x, float m) {
    if (!(m <= 3.402823466e38f) || !(127.f / m <= 3.402823466e38f)) return 0;
    return (int)nearbyintf(x * (127.f / m));
}

/* The same by an instruction set, filled up to a multiple of 4. */
static void quantize(const el_int8 *int8, const float *x, int n, uint8_t *q, float *k) {
    const int some = n / 3; /* the largest magnitude of parts is that of the whole */
    const float m = int8->largest(x + some, (size_t)(n - some), some ? int8->largest(x, (size_t)some, 0.f) : 0.f);
    const float inverse = el_int8_inverse(m, k);
    const size_t bytes = (size_t)int8->input_bytes;
    if (inverse > 0.f) int8->quantize(x, (size_t)n, inverse, q);
    else memset(q, int8->zero, (size_t)n * bytes);
    memset(q + (size_t)n * bytes, int8->zero, (size_t)(-n & 3) * bytes);
}

static int one_case(int number) {
    const int inputs = pick(0, 4) ? pick(1, 70) : pick(300, 3000), tile = pick(1, MOST_TILE), channels = pick(1, 140);
    const int stride = (channels + 63) / 64 * 64;
    float *x = malloc((size_t)tile * (size_t)inputs * 4);
    int8_t *stored = malloc((size_t)channels * (size_t)inputs);
    void *weight = el_aligned_alloc(64, el_int8_bytes(inputs, channels));
    int32_t *expected = malloc((size_t)tile * (size_t)channels * 4), *sums = malloc((size_t)tile * (size_t)stride * 4);
    uint8_t *q = malloc((size_t)tile * (size_t)(inputs + 3) * 2 + EL_INT8_SLACK);
    float k[MOST_TILE], found[MOST_TILE];
    int wrong = 0;
    for (int p = 0; p < tile; p++) {
        const int kind = pick(0, 15);
        for (int i = 0; i < inputs; i++) x[p * inputs + i] = value(kind);
    }
    for (int i = 0; i < channels * inputs; i++) stored[i] = pick(0, 3) ? (int8_t)pick(-127, 127) : 127;
    el_int8_lay_out(stored, inputs, channels, weight);
    for (int p = 0; p < tile; p++) {
        float m = 0.f;
        for (int i = 0; i < inputs; i++) {
            const float a = fabsf(x[p * inputs + i]);
            if (a > m || isnan(a)) m = a;
            if (isnan(m)) break;
        }
        k[p] = !(m <= 3.402823466e38f) ? NAN : !(127.f / m <= 3.402823466e38f) ? 0.f : m / 127.f;
        for (int c = 0; c < channels; c++) {
            int32_t sum = 0;
            for (int i = 0; i < inputs; i++)
                sum += quantized(x[p * inputs + i], m) * stored[(size_t)c * (size_t)inputs + (size_t)i];
            expected[p * channels + c] = sum;
        }
    }
    for (size_t i = 0; i < sizeof subjects / sizeof *subjects; i++) {
        const subject *t = subjects + i;
        if ((el_cpu() & t->needs) != t->needs) continue;
        const size_t step = (size_t)(inputs + 3) / 4 * 4 * (size_t)t->int8->input_bytes;
        for (int p = 0; p < tile; p += t->int8->tile_pixels) {
            const int n = tile - p < t->int8->tile_pixels ? tile - p : t->int8->tile_pixels;
            for (int i = 0; i < n; i++) quantize(t->int8, x + (p + i) * inputs, inputs, q + (size_t)i * step, found + p + i);
            t->int8->dot(q, step, n, inputs, weight, channels, sums + p * stride, stride, (el_prefetch){weight, 0});
        }
        int bad = 0;
        for (int p = 0; p < tile; p++) {
            bad |= memcmp(&k[p], &found[p], 4) && !(isnan(k[p]) && isnan(found[p]));
            bad |= memcmp(expected + p * channels, sums + p * stride, (size_t)channels * 4) != 0;
        }
        if (bad) printf("case %d: %s differs\n", number, t->name);
        wrong += bad;
    }
    free(x), free(stored), el_aligned_free(weight), free(expected), free(sums), free(q);
    return wrong;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Print the best of `repeats` passes over `pixels` output pixels, in 10^9 multiply-accumulates per second. */
static void rate(const subject *t, int inputs, int channels, int pixels, int repeats) {
    const int stride = (channels + 63) / 64 * 64;
    const size_t string = (size_t)inputs, step = (size_t)(inputs + 3) / 4 * 4 * (size_t)t->int8->input_bytes;
    float *x = malloc((size_t)pixels * string * 4), *w = el_aligned_alloc(64, (size_t)stride * string * 4 + 4096);
    int8_t *stored = malloc((size_t)channels * string);
    void *weight = el_aligned_alloc(64, el_int8_bytes(inputs, channels));
    int32_t *sums = malloc((size_t)MOST_TILE * (size_t)stride * 4);
    uint8_t *q = malloc((size_t)MOST_TILE * step + EL_INT8_SLACK);
    const size_t none = 0;
    double best[3] = {1e9, 1e9, 1e9};
    for (size_t i = 0; i < (size_t)pixels * string; i++) x[i] = (float)((int64_t)draw() >> 20) * 0x1p-43f;
    for (size_t i = 0; i < (size_t)stride * string; i++) w[i] = (float)((int64_t)draw() >> 20) * 0x1p-43f;
    for (size_t i = 0; i < (size_t)channels * string; i++) stored[i] = (int8_t)pick(-127, 127);
    el_int8_lay_out(stored, inputs, channels, weight);
    for (int r = 0; r < repeats; r++)
        for (int kind = 0; kind < 3; kind++) { /* floats, int8, quantizing alone */
            const int most = kind == 0 ? t->real->tile_pixels : t->int8->tile_pixels;
            const double before = now();
            for (int i = 0, n; i < pixels; i += n) {
                const char *base[MOST_TILE];
                float k[MOST_TILE];
                n = pixels - i < most ? pixels - i : most;
                for (int p = 0; p < n; p++) base[p] = (const char *)(x + (size_t)(i + p) * string);
                const el_strings in = {.base = base, .offsets = &none, .segments = 1, .length = 4 * inputs};
                for (int p = 0; kind && p < n; p++)
                    quantize(t->int8, (const float *)(const void *)base[p], inputs, q + (size_t)p * step, k + p);
                if (kind == 0)
                    t->real->dot(&in, n, w, channels, (float *)sums, stride, (el_prefetch){(const char *)w, 0});
                else if (kind == 1)
                    t->int8->dot(q, step, n, inputs, weight, channels, sums, stride, (el_prefetch){weight, 0});
            }
            const double seconds = now() - before;
            if (seconds < best[kind]) best[kind] = seconds;
        }
    const double macs = (double)pixels * inputs * channels * 1e-9;
    printf("%-12s %4d inputs, %4d channels: float32 %6.1f  int8 %6.1f GMAC/s, quantizing %4.1f %% of it\n",
           t->name, inputs, channels, macs / best[0], macs / best[1], 100. * best[2] / best[1]);
    free(x), el_aligned_free(w), free(stored), el_aligned_free(weight), free(sums), free(q);
}

int main(int argc, char **argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : 200;
    int wrong = 0;
    for (int i = 0; i < cases; i++) wrong += one_case(i);
    printf("%d cases: %d wrong\n", cases, wrong);
    for (size_t i = 0; argc > 2 && i < sizeof subjects / sizeof *subjects; i++) {
        if ((el_cpu() & subjects[i].needs) != subjects[i].needs) continue;
        rate(subjects + i, 147, 64, 600, 20); /* the stem, and downsampling */
        rate(subjects + i, 64, 256, 600, 20);
        rate(subjects + i, 256, 512, 196, 20);
        rate(subjects + i, 512, 1024, 96, 20);
        rate(subjects + i, 1024, 2048, 49, 20);
    }
    return wrong != 0;
}

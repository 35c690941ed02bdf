/* What all bodies share, written once in vectors of 16 floats, which the compiler cuts to what the body's processor has.
 *
 * A body is a .c file that sets its target, includes this file and supplies pack, count, count_depthwise and dot. The
 * others stand here. Contraction is off (see the build flags): a * b + c is two roundings in every body.
 */
#include "engine.h"

#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

#define LANES 16

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi_loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define LOADF(p) ((vf) * (const vf_loose *)(p))
#define LOADI(p) ((vi) * (const vi_loose *)(p))
#define STOREF(p, v) (*(vf_loose *)(p) = (vf_loose)(v))
#define SPREAD(s) ((vf){s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s})
#define SELECT(mask, a, b) ((vf)(((mask) & (vi)(a)) | (~(mask) & (vi)(b))))

/* ------------------------------------------------------------------------------------------------------------------ */

static float abs_sum(const float *x, int c) {
    float lanes[LANES] = {0};
    int i = 0;
    vf sum = SPREAD(0.f);
    const vi magnitude = (vi)SPREAD(0.f) + 0x7fffffff;
    for (; i + LANES <= c; i += LANES) sum = sum + (vf)((vi)LOADF(x + i) & magnitude);
    STOREF(lanes, sum);
    for (int j = 0; i + j < c; j++) lanes[j] = lanes[j] + (x[i + j] < 0.f ? -x[i + j] : x[i + j]);
    for (int half = LANES / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] = lanes[j] + lanes[j + half];
    return lanes[0];
}

static void pool(const float *const *pixels, int n, int mode, int c, float *out) {
    int i = 0;
    const float count = (float)n;
    for (; i + LANES <= c; i += LANES) {
        vf v = LOADF(pixels[0] + i);
        for (int j = 1; j < n; j++) {
            vf x = LOADF(pixels[j] + i);
            if (mode == EL_POOL_MAX) v = SELECT((vi)(x > v) | (vi)(x != x), x, v);
            else v = v + x;
        }
        STOREF(out + i, mode == EL_POOL_MAX ? v : v / SPREAD(count));
    }
    for (; i < c; i++) {
        float v = pixels[0][i];
        for (int j = 1; j < n; j++) {
            float x = pixels[j][i];
            if (mode == EL_POOL_MAX) v = x > v || x != x ? x : v;
            else v = v + x;
        }
        out[i] = mode == EL_POOL_MAX ? v : v / count;
    }
}

/* The link's value for LANES channels from c, those from c_out on being scratch. */
INLINE vf link_value(const el_plan *p, const float *x, int c) {
    const int ci = p->link_c, co = p->c_out;
    float lanes[LANES] = {0};
    int n = co - c < LANES ? co - c : LANES;
    if (p->link == EL_LINK_SQUEEZE) {
        if (n == LANES && ci % co == 0) {
            vf v = LOADF(x + c);
            for (int j = co; j < ci; j += co) v = v + LOADF(x + j + c);
            return v;
        }
        int groups = (ci + co - 1) / co;
        for (int i = 0; i < n; i++) {
            lanes[i] = x[c + i];
            for (int j = 1; j < groups; j++) lanes[i] = lanes[i] + (j * co + c + i < ci ? x[j * co + c + i] : 0.f);
        }
    } else {
        int start = p->link == EL_LINK_EXPAND ? c % ci : c;
        if (n == LANES && start + LANES <= ci) return LOADF(x + start);
        for (int i = 0; i < n; i++) lanes[i] = x[(c + i) % ci];
    }
    return LOADF(lanes);
}

INLINE void finish_as(const el_plan *p, const void *acc, const int32_t *correction, int base, float k,
                      const float *link, int c0, int c1, float *y, int real, int has_k, int act, int has_affine,
                      int how, int has_post) {
    const float *table = p->table;
    const int stride = p->table_stride;
#define ROW(row, c) LOADF(table + (size_t)(row) * (size_t)stride + (c))
    for (int c = c0; c < c1; c += LANES) {
        vf v;
        if (real) {
            v = LOADF((const float *)acc + (c - c0));
        } else {
            vi n = LOADI((const int32_t *)acc + (c - c0));
            vi dot = base - (n + n);
            if (correction) dot = dot + LOADI(correction + (c - c0));
            v = __builtin_convertvector(dot, vf) * ROW(EL_SCALE, c);
        }
        if (has_k) v = v * SPREAD(k);
        v = v + ROW(EL_SHIFT, c);
        if (act == EL_ACT_CLIP) {
            v = SELECT(v < SPREAD(p->lo), SPREAD(p->lo), v);
            v = SELECT(v > SPREAD(p->hi), SPREAD(p->hi), v);
        } else if (act == EL_ACT_PRELU) {
            v = SELECT(v >= SPREAD(0.f), v, v * ROW(EL_SLOPE, c));
        }
        if (has_affine) {
            v = v * ROW(EL_SCALE2, c);
            v = v + ROW(EL_SHIFT2, c);
        }
        if (how) {
            vf l = link_value(p, link, c) * SPREAD(p->inverse_gamma);
            v = v + l;
        }
        if (has_post) {
            v = v + ROW(EL_POST_IN, c);
            v = SELECT(v >= SPREAD(0.f), v, v * ROW(EL_POST_SLOPE, c));
            v = v + ROW(EL_POST_OUT, c);
        }
        if (c + LANES <= c1) {
            STOREF(y + c, v);
        } else {
            float lanes[LANES];
            STOREF(lanes, v);
            memcpy(y + c, lanes, sizeof(float) * (size_t)(c1 - c));
        }
    }
#undef ROW
}

static void finish(const el_plan *p, const void *acc, const int32_t *correction, int base, float k,
                   const float *link, int c0, int c1, float *y) {
    /* The commonest ones with everything that does not apply compiled away. */
    if (!p->real && !p->act && !p->has_affine && !p->has_post && p->link && !p->has_k)
        finish_as(p, acc, correction, base, k, link, c0, c1, y, 0, 0, EL_ACT_NONE, 0, 1, 0);
    else if (!p->real && !p->act && !p->has_affine && !p->has_post && !p->link)
        finish_as(p, acc, correction, base, k, link, c0, c1, y, 0, p->has_k, EL_ACT_NONE, 0, 0, 0);
    else
        finish_as(p, acc, correction, base, k, link, c0, c1, y, p->real, p->has_k, p->act, p->has_affine, p->link,
                  p->has_post);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* The layout of the 64-bit bodies: blocks of 8 channels, in a block word by word, 8 channels side by side. */

#ifndef OWN_LAYOUT
static size_t weight_size(int words, int channels) {
    size_t blocks = (size_t)(channels + EL_CHANNEL_BLOCK - 1) / EL_CHANNEL_BLOCK;
    return blocks * EL_CHANNEL_BLOCK * (size_t)words * sizeof(uint64_t);
}

static void prepack(const uint64_t *rows, int words, int channels, void *weight) {
    uint64_t *out = weight;
    memset(out, 0, weight_size(words, channels));
    for (int c = 0; c < channels; c++) {
        uint64_t *block = out + (size_t)(c / EL_CHANNEL_BLOCK) * EL_CHANNEL_BLOCK * (size_t)words;
        for (int k = 0; k < words; k++)
            block[(size_t)k * EL_CHANNEL_BLOCK + (size_t)(c % EL_CHANNEL_BLOCK)] = rows[(size_t)c * (size_t)words + (size_t)k];
    }
}
#endif

/* ------------------------------------------------------------------------------------------------------------------ */
/* Bit c of each word differs or not: a byte each, then counts. What a compiler makes of it is good enough where a
 * processor has no masks. */

#ifndef OWN_DEPTHWISE
static void count_depthwise(const uint64_t *const *taps, int n_taps, const uint64_t *weight, int words,
                            int32_t *counts) {
    for (int w = 0; w < words; w++) {
        /* Bit-sliced: plane j holds bit j of the 64 counts. */
        uint64_t planes[16] = {0};
        int used = 0;
        for (int t = 0; t < n_taps; t++) {
            uint64_t carry = taps[t][w] ^ weight[(size_t)t * (size_t)words + (size_t)w];
            for (int j = 0; carry; j++) {
                uint64_t both = planes[j] & carry;
                planes[j] ^= carry;
                carry = both;
                if (j + 1 > used) used = j + 1;
            }
        }
        int32_t *out = counts + 64 * w;
        for (int i = 0; i < 64; i++) out[i] = (int32_t)(planes[0] >> i & 1);
        for (int j = 1; j < used; j++)
            for (int i = 0; i < 64; i++) out[i] |= (int32_t)(planes[j] >> i & 1) << j;
    }
}
#endif

#ifndef OWN_PACK
static void pack(const float *x, const float *threshold, const uint32_t *flip, int c, uint64_t *bits) {
    for (int start = 0; start < c; start += 64) {
        uint64_t word = 0;
        int n = c - start < 64 ? c - start : 64;
        for (int i = 0; i < n; i++) {
            uint32_t value;
            memcpy(&value, x + start + i, 4);
            if (flip) value ^= flip[start + i];
            float v;
            memcpy(&v, &value, 4);
            word |= (uint64_t)(v >= (threshold ? threshold[start + i] : 0.f)) << i;
        }
        bits[start / 64] = word;
    }
}
#endif

/* What all bodies share, written once in vectors of as many floats as the body's registers hold.
 *
 * A body is a .c file that sets its target, includes this file and supplies pack, count, count_depthwise and dot. The
 * others stand here. Contraction is off (see the build flags): a * b + c is two roundings in every body.
 */
#include "engine.h"

#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */

#ifndef LANES
#define LANES 4 /* floats of a vector: what the body's processor has in a register */
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES))); /* wraps where channels are scratch */
typedef float vf_loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi_loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define LOADF(p) ((vf) * (const vf_loose *)(p))
#define LOADI(p) ((vi) * (const vi_loose *)(p))
#define STOREF(p, v) (*(vf_loose *)(p) = (vf_loose)(v))
#define SPREAD(s) ((vf){0} + (s))
#define SELECT(mask, a, b) ((vf)(((mask) & (vi)(a)) | (~(mask) & (vi)(b))))

/* ------------------------------------------------------------------------------------------------------------------ */

typedef float half8 __attribute__((vector_size(32)));
typedef float half4 __attribute__((vector_size(16)));

/* `pixels` of them side by side: each one's sums wait for one another, those of several do not. */
INLINE void abs_means(const float *x, const int pixels, int c, float *means) {
    const vi magnitude = (vi){0} + 0x7fffffff;
    vf sums[4][16 / LANES] = {{{0}}};
    int i = 0;
    for (; i + 16 <= c; i += 16)
        for (int p = 0; p < pixels; p++)
            for (int j = 0; j < 16 / LANES; j++)
                sums[p][j] = sums[p][j] + (vf)((vi)LOADF(x + (size_t)p * (size_t)c + i + LANES * j) & magnitude);
    for (int p = 0; p < pixels; p++, x += c) {
        float lanes[16];
        for (int j = 0; j < 16 / LANES; j++) STOREF(lanes + LANES * j, sums[p][j]);
        for (int j = 0; i + j < c; j++) lanes[j] = lanes[j] + (x[i + j] < 0.f ? -x[i + j] : x[i + j]);
        half8 eight[2];
        half4 four[2];
        memcpy(eight, lanes, sizeof eight);
        eight[0] = eight[0] + eight[1];
        memcpy(four, eight, sizeof four);
        four[0] = four[0] + four[1];
        means[p] = ((four[0][0] + four[0][2]) + (four[0][1] + four[0][3])) / (float)c;
    }
}

static void abs_mean(const float *x, int n, int c, float *means) {
    for (; n >= 4; n -= 4, x += 4 * (size_t)c, means += 4) abs_means(x, 4, c, means);
    if (n == 3) abs_means(x, 3, c, means);
    else if (n == 2) abs_means(x, 2, c, means);
    else if (n == 1) abs_means(x, 1, c, means);
}

static void pool(const float *const *pixels, int n, int mode, int c, float *out) {
    int i = 0;
    const float count = (float)n, inverse = 1.f / count;
    const int exact = (n & (n - 1)) == 0; /* then a product with the inverse is the quotient, and much faster */
    for (; i + LANES <= c; i += LANES) {
        vf v = LOADF(pixels[0] + i);
        for (int j = 1; j < n; j++) {
            vf x = LOADF(pixels[j] + i);
            if (mode == EL_POOL_MAX) v = SELECT((vi)(x > v) | (vi)(x != x), x, v);
            else v = v + x;
        }
        STOREF(out + i, mode == EL_POOL_MAX ? v : exact ? v * SPREAD(inverse) : v / SPREAD(count));
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

/* How a vector of the link is read: not at all, as it lies, as a sum of runs of c_out, or value by value. */
enum { LINK_OFF, LINK_AS_IT_IS, LINK_SUM, LINK_SLOW };

static int link_kind(const el_plan *p, int c0) {
    if (!p->link) return LINK_OFF;
    if (c0 % LANES || p->c_out % LANES || p->link_c % LANES) return LINK_SLOW;
    if (p->link != EL_LINK_SQUEEZE) return LINK_AS_IT_IS;
    return p->link_c % p->c_out ? LINK_SLOW : LINK_SUM;
}

static void link_slowly(const float *x, int squeeze, int c, int ci, int co, float *lanes) {
    for (int i = 0; i < LANES; i++, c++) {
        lanes[i] = 0.f;
        if (c >= co) continue;
        lanes[i] = squeeze ? x[c] : x[c % ci];
        for (int j = co; squeeze && j < ci; j += co) lanes[i] = lanes[i] + (j + c < ci ? x[j + c] : 0.f);
    }
}

/* The epilogue with everything that is constant compiled away. What the stores could alias is copied first. */
INLINE void finish_as(const el_plan *p, const void *acc, int stride, int tile, const int32_t *corrections, int base,
                      const float *k, const float *link, int c0, int c1, const float *added, float *y, const int real,
                      const int has_k, const int act, const int has_affine, const int how, const int has_post,
                      const int bordered) {
    const float *const table = p->table;
    const size_t row = (size_t)p->table_stride, c_out = (size_t)p->c_out;
    const int ci = p->link_c, co = p->c_out, squeeze = p->link == EL_LINK_SQUEEZE;
    const vf none = SPREAD(0.f), lo = SPREAD(p->lo), hi = SPREAD(p->hi), inverse_gamma = SPREAD(p->inverse_gamma);
    /* Rows that are not asked for are not there. */
    const size_t slope = 2, scale2 = slope + (act == EL_ACT_PRELU), post = scale2 + (has_affine ? 2 : 0);
    int start = how ? c0 % ci : 0;
#define ROW(i) LOADF(table + (size_t)(i) * row + c)
    for (int c = c0; c < c1; c += LANES) {
        const vf scale = real ? none : ROW(0), shift = ROW(1);
        for (int q = 0; q < tile; q++) {
            vf v;
            if (real) {
                v = LOADF((const float *)acc + q * stride + (c - c0));
            } else {
                vu n = (vu)LOADI((const int32_t *)acc + q * stride + (c - c0));
                vu dot = (uint32_t)base - (n + n);
                if (bordered) dot = dot + (vu)LOADI(corrections + q * stride + (c - c0));
                v = __builtin_convertvector((vi)dot, vf) * scale;
            }
            if (has_k) v = v * SPREAD(k[q]);
            v = v + shift;
            if (act == EL_ACT_CLIP) {
                v = SELECT(v < lo, lo, v);
                v = SELECT(v > hi, hi, v);
            } else if (act == EL_ACT_PRELU) {
                v = SELECT(v >= none, v, v * ROW(slope));
            }
            if (has_affine) {
                v = v * ROW(scale2);
                v = v + ROW(scale2 + 1);
            }
            if (how) {
                vf l;
                if (how == LINK_AS_IT_IS) {
                    l = LOADF(link + q * ci + start);
                } else if (how == LINK_SUM) {
                    l = LOADF(link + q * ci + c);
                    for (int j = co + c; j < ci; j += co) l = l + LOADF(link + q * ci + j);
                } else {
                    float lanes[LANES];
                    link_slowly(link + q * ci, squeeze, c, ci, co, lanes);
                    l = LOADF(lanes);
                }
                l = l * inverse_gamma;
                v = v + l;
            }
            if (has_post) {
                v = v + ROW(post);
                v = SELECT(v >= none, v, v * ROW(post + 1));
                v = v + ROW(post + 2);
            }
            float *out = y + (size_t)q * c_out + c;
            if (c + LANES <= c1) {
                if (added) v = v + LOADF(added + (size_t)q * c_out + c);
                STOREF(out, v);
            } else {
                float lanes[LANES] = {0};
                if (added) {
                    memcpy(lanes, added + (size_t)q * c_out + c, sizeof(float) * (size_t)(c1 - c));
                    v = v + LOADF(lanes);
                }
                STOREF(lanes, v);
                memcpy(out, lanes, sizeof(float) * (size_t)(c1 - c));
            }
        }
        start += LANES;
        if (how && start >= ci) start -= ci; /* as it is: ci is a multiple of LANES */
    }
#undef ROW
}

static void finish(const el_plan *p, const void *acc, int stride, int tile, const int32_t *corrections, int base,
                   const float *k, const float *link, int c0, int c1, const float *added, float *y) {
#define AS(...) finish_as(p, acc, stride, tile, corrections, base, k, link, c0, c1, added, y, __VA_ARGS__)
    /* The commonest ones with everything that does not apply compiled away. */
    const int how = link_kind(p, c0), bordered = corrections != NULL;
    enum { PLAIN = 0, CLIP_AFFINE = EL_ACT_CLIP << 2 | 2, POST = 1 };
    switch (bordered << 16 | p->real << 12 | p->has_k << 8 | how << 4 | p->act << 2 | p->has_affine << 1 | p->has_post) {
#define CASE(bordered, real, has_k, how, tail)                                                     \
    case (bordered) << 16 | (real) << 12 | (has_k) << 8 | (how) << 4 | (tail):                     \
        AS(real, has_k, (tail) >> 2, (tail) >> 1 & 1, how, (tail) & 1, bordered);                  \
        break;
        CASE(0, 0, 0, LINK_AS_IT_IS, PLAIN)
        CASE(1, 0, 0, LINK_AS_IT_IS, PLAIN)
        CASE(0, 0, 0, LINK_SUM, PLAIN)
        CASE(0, 0, 1, LINK_AS_IT_IS, PLAIN)
        CASE(0, 0, 1, LINK_SUM, PLAIN)
        CASE(0, 0, 0, LINK_OFF, PLAIN)
        CASE(1, 0, 0, LINK_OFF, PLAIN)
        CASE(0, 1, 0, LINK_OFF, PLAIN)
        CASE(0, 0, 0, LINK_AS_IT_IS, CLIP_AFFINE)
        CASE(1, 0, 0, LINK_AS_IT_IS, CLIP_AFFINE)
        CASE(0, 1, 0, LINK_AS_IT_IS, CLIP_AFFINE)
        CASE(0, 1, 0, LINK_OFF, CLIP_AFFINE)
        CASE(0, 0, 0, LINK_AS_IT_IS, POST)
        CASE(1, 0, 0, LINK_AS_IT_IS, POST)
        default: AS(p->real, p->has_k, p->act, p->has_affine, how, p->has_post, bordered);
#undef CASE
    }
#undef AS
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Layouts of binary weights: blocks of BYTE_BLOCK channels, in a block byte by byte of the bit string, a byte of each
 * channel side by side, that of channel c at BYTE_PLACE(c); or, as they are stored, words of 8 channels side by side. */

#ifdef BYTE_BLOCK
static size_t weight_size(int words, int channels) {
    return (size_t)((channels + BYTE_BLOCK - 1) / BYTE_BLOCK) * BYTE_BLOCK * (size_t)words * sizeof(uint64_t);
}

static void lay_out(const uint64_t *blocks, int words, int channels, void *weight) {
    uint8_t *out = weight;
    memset(out, 0, weight_size(words, channels));
    for (int c = 0; c < channels; c++) {
        const uint64_t *from = blocks + (size_t)(c / 8) * 8 * (size_t)words + (size_t)(c % 8);
        uint8_t *to = out + (size_t)(c / BYTE_BLOCK) * BYTE_BLOCK * (size_t)words * 8 + (size_t)BYTE_PLACE(c % BYTE_BLOCK);
        for (int j = 0; j < words * 8; j++, to += BYTE_BLOCK) *to = (uint8_t)(from[(size_t)(j / 8) * 8] >> (8 * (j % 8)));
    }
}
#else
static size_t weight_size(int words, int channels) {
    return (size_t)(channels + EL_CHANNEL_BLOCK - 1) / EL_CHANNEL_BLOCK * EL_CHANNEL_BLOCK * (size_t)words * sizeof(uint64_t);
}
#define lay_out NULL
#endif

/* ------------------------------------------------------------------------------------------------------------------ */
/* Counts of the bits of 64 channels side by side: bit-sliced, so that plane j of 64 bits holds bit j of all 64 counts.
 * Four planes hold the counts of 15 taps. */

#ifndef OWN_DEPTHWISE
#define TAPS_AT_ONCE 15

/* Write 64 counts, or add them to those that are there. First the planes are interleaved, so that nibble i of every[j] is
 * the count of channel 4 i + j; then a vector of them, shifted by a nibble at a time, gives neighbours. */
INLINE void write_counts(const uint64_t *planes, int add, int32_t *counts) {
    const uint64_t bits = 0x5555555555555555, pairs = 0x3333333333333333;
    uint64_t even[2], odd[2], every[4];
    for (int i = 0; i < 2; i++) {
        const uint64_t low = planes[2 * i], high = planes[2 * i + 1];
        even[i] = (low & bits) | (high & bits) << 1;
        odd[i] = (low >> 1 & bits) | (high & ~bits);
    }
    every[0] = (even[0] & pairs) | (even[1] & pairs) << 2;
    every[1] = (odd[0] & pairs) | (odd[1] & pairs) << 2;
    every[2] = (even[0] >> 2 & pairs) | (even[1] & ~pairs);
    every[3] = (odd[0] >> 2 & pairs) | (odd[1] & ~pairs);
    for (int half = 0; half < 2; half++, counts += 32) {
        uint32_t lanes[LANES];
        for (int i = 0; i < LANES; i++) lanes[i] = (uint32_t)(every[i % 4] >> (32 * half + i / 4 * 4));
        const vu nibbles = (vu)LOADI(lanes);
        for (int i = 0; i < 32; i += LANES) {
            vi n = (vi)(nibbles >> i & 15);
            if (add) n = n + LOADI(counts + i);
            *(vi_loose *)(counts + i) = (vi_loose)n;
        }
    }
}

static void count_depthwise(const uint64_t *base, const size_t *offsets, int taps, int length, const uint64_t *weight,
                            int32_t *counts) {
    for (int w = 0; w < length; w++, base++, weight++, counts += 64)
        for (int t = 0; t < taps;) {
            const int first = t, end = taps - t > TAPS_AT_ONCE ? t + TAPS_AT_ONCE : taps;
            uint64_t planes[4] = {0};
            for (; t < end; t += 2) {
                const uint64_t a = base[offsets[t]] ^ weight[(size_t)t * (size_t)length];
                const uint64_t b = t + 1 < end ? base[offsets[t + 1]] ^ weight[(size_t)(t + 1) * (size_t)length] : 0;
                const uint64_t differ = planes[0] ^ a, carry = (planes[0] & a) | (differ & b), more = planes[1] & carry;
                planes[0] = differ ^ b;
                planes[1] ^= carry;
                planes[3] ^= planes[2] & more;
                planes[2] ^= more;
            }
            t = end;
            write_counts(planes, first > 0, counts);
        }
}
#endif

/* One bit, for what is left over where a processor takes several at a time. */
INLINE uint64_t sign_bit(const float *x, const float *threshold, const uint32_t *flip, int i) {
    uint32_t value;
    float v;
    memcpy(&value, x + i, 4);
    if (flip) value ^= flip[i];
    memcpy(&v, &value, 4);
    return v >= (threshold ? threshold[i] : 0.f);
}

/* pack() for n pixels, from a function that packs one word of up to 64 floats; the commonest way to call it with all that
 * does not apply compiled away. */
#define PACK_PIXELS(word64)                                                                                          \
    static void pack(const float *x, int n, size_t x_step, const float *threshold, const uint32_t *flip, int c,      \
                     uint64_t *bits, size_t step) {                                                                  \
        const int plain = !threshold && !flip && c % 64 == 0;                                                        \
        for (int p = 0; plain && p < n; p++, x += x_step, bits += step)                                              \
            for (int i = 0; i < c; i += 64) bits[i / 64] = word64(x + i, NULL, NULL, 64);                            \
        for (int p = 0; !plain && p < n; p++, x += x_step, bits += step)                                             \
            for (int i = 0; i < c; i += 64)                                                                          \
                bits[i / 64] = word64(x + i, threshold ? threshold + i : NULL, flip ? flip + i : NULL,               \
                                      c - i < 64 ? c - i : 64);                                                      \
    }

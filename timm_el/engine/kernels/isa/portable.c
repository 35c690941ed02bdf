/* Any processor: vectors of 16 bytes, which every compiler knows, and no instruction that only some have. */
#define LANES 4
#include "vectors.h"

#include "depthwise.h"
#include "real.h"
#include "signs.h"
#include "unary.h"

#define BLOCK 16
#define TILE 4
#define REAL_TILE 8
#define ROOM 31 /* words whose counts, of 8 at most a byte, a byte can hold */

typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t shorts __attribute__((vector_size(16)));
typedef bytes bytes_loose __attribute__((aligned(1), may_alias));

INLINE uint64_t signs_of_word(const float *x, const float *threshold, const uint32_t *flip, int n) {
    uint64_t word = 0;
    int i = 0;
    for (int half = 0; half < 64; half += 32) {
        vi hits = {0};
        vu place = {1, 2, 4, 8};
        for (; i + 4 <= n && i < half + 32; i += 4, place <<= 4) {
            vf v = load_floats(x + i);
            if (flip) v = (vf)((vi)v ^ load_ints(flip + i));
            hits |= (v >= (threshold ? load_floats(threshold + i) : spread(0.f))) & (vi)place;
        }
        word |= (uint64_t)(uint32_t)(hits[0] | hits[1] | hits[2] | hits[3]) << half;
    }
    for (; i < n; i++) word |= sign_bit(x, threshold, flip, i) << i;
    return word;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Sixteen times each byte: what a processor without a byte shuffle would take four instructions for. */
#define S1(b) {b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b}
#define S4(b) S1(b), S1(b + 1), S1(b + 2), S1(b + 3)
#define S16(b) S4(b), S4(b + 4), S4(b + 8), S4(b + 12)
#define S64(b) S16(b), S16(b + 16), S16(b + 32), S16(b + 48)
static const bytes repeated[256] = {S64(0), S64(64), S64(128), S64(192)};

/* Carry-save: a + b + *sum bit by bit, of which *sum keeps the low bit; gives the high one. */
INLINE bytes add(bytes *sum, bytes a, bytes b) {
    const bytes differ = *sum ^ a, carry = (*sum & a) | (differ & b);
    *sum = differ ^ b;
    return carry;
}

/* Bits of each byte. */
INLINE bytes popcount(bytes x) {
    const bytes odd = (bytes)((vu)x >> 1) & 0x55;
    x = x - odd;
    x = (x & 0x33) + ((bytes)((vu)x >> 2) & 0x33);
    return (x + (bytes)((vu)x >> 4)) & 0x0f;
}

/* One pixel by 16 channels. Bits of one weight are summed in planes of ones, twos and fours; eights are counted. */
static void count_block(const el_strings *in, int p, const uint8_t *weight, int32_t *counts) {
    const bytes none = {0};
    bytes ones = none, twos = none, fours = none, eights = none;
    int room = ROOM, first = 1;
    for (int s = 0; s < in->segments; s++) {
        const uint64_t *run = (const uint64_t *)(const void *)(in->base[p] + in->offsets[s]);
        for (int k = 0; k < in->length / 8; k++, weight += 8 * BLOCK) {
            bytes d[8], t[4], f[2];
            for (int j = 0; j < 8; j++)
                d[j] = *(const bytes_loose *)(weight + j * BLOCK) ^ repeated[run[k] >> (8 * j) & 255];
            for (int j = 0; j < 4; j++) t[j] = add(&ones, d[2 * j], d[2 * j + 1]);
            for (int j = 0; j < 2; j++) f[j] = add(&twos, t[2 * j], t[2 * j + 1]);
            eights = eights + popcount(add(&fours, f[0], f[1]));
            if (--room && !(s + 1 == in->segments && k + 1 == in->length / 8)) continue;
            room = ROOM;
            bytes few = popcount(fours);
            few = popcount(twos) + few + few;
            few = popcount(ones) + few + few;
            const shorts even = ((shorts)few & 255) + (((shorts)eights & 255) << 3);
            const shorts odd = ((shorts)few >> 8) + ((shorts)eights >> 8 << 3);
            const vu wide[4] = {(vu)even & 65535, (vu)odd & 65535, (vu)even >> 16, (vu)odd >> 16};
            for (int i = 0; i < 4; i++)
                store_ints(counts + 4 * i, first ? (vi)wide[i] : (vi)wide[i] + load_ints(counts + 4 * i));
            ones = twos = fours = eights = none;
            first = 0;
        }
    }
}

static void count(const el_strings *in, int tile, const void *weight, int channels, int32_t *counts, int stride) {
    const size_t block = (size_t)in->segments * (size_t)in->length * BLOCK;
    const uint8_t *w = weight;
    for (int c = 0; c < channels; c += BLOCK, w += block)
        for (int p = 0; p < tile; p++) count_block(in, p, w, counts + p * stride + c);
}

const el_counter el_counter_portable = {
    .tile_pixels = TILE,
    .layout = EL_BYTES_OF_16,
    .packed_bytes = el_bytes_of_words,
    .pack = pack,
    .count = count,
    .expand = expand,
    .count_depthwise = count_depthwise,
};

/* ------------------------------------------------------------------------------------------------------------------ */

INLINE const float *run_of(const el_strings *in, int p, int s) {
    return (const float *)(const void *)(in->base[p] + in->offsets[s]);
}

#ifdef __FP_FAST_FMAF

static void dot(const el_strings *in, int tile, const float *weight, int channels, float *out, int stride,
                el_prefetch next) {
    (void)next;
    for (int c = 0; c < channels; c += EL_REAL_BLOCK) {
        for (int p = 0; p < tile; p++) memset(out + p * stride + c, 0, EL_REAL_BLOCK * sizeof(float));
        for (int s = 0; s < in->segments; s++)
            for (int k = 0; k < in->length / 4; k++, weight += EL_REAL_BLOCK)
                for (int p = 0; p < tile; p++) {
                    const float x = run_of(in, p, s)[k];
                    float *sum = out + p * stride + c;
                    for (int j = 0; j < EL_REAL_BLOCK; j++) sum[j] = __builtin_fmaf(x, weight[j], sum[j]);
                }
    }
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    for (int i = 0; i < c; i++) {
        float sum = 0.f;
        for (int t = 0; t < n_taps; t++)
            sum = __builtin_fmaf(taps[t][i], weight[(size_t)t * (size_t)weight_stride + (size_t)i], sum);
        out[i] = sum;
    }
}

#else
/* A fused multiply-add without the instruction: in float64 the product of two floats is exact, and the sum, rounded to
 * float32, is the right one but where rounding it to float64 first has made a tie of it, or where float32 has fewer
 * bits, below 2^-126, or ends, at 2^128. All of it shows in the bits of the sum. So eight chains of sums are first
 * computed as if none of it occurred; if it did, they are computed once more with rounding to odd, which no second
 * rounding deceives.
 *
 * The quick way adds half of float32's last place to the bits of a sum and keeps those that float32 has. Nothing is
 * left in the low 32 bits after a tie. Sums are 2^81 times too large, so that the exponent field of 2^-80 holds 1024:
 * up to 2^48 two bits of it are 0, as they are in 0, and everywhere else that a sum can be, one of them is 1. These are
 * not kept either. So what is kept must differ from the sum in the low 32 bits, and must not in the high ones. */

typedef double vd __attribute__((vector_size(16)));
typedef double vd4 __attribute__((vector_size(32)));
typedef uint64_t vul __attribute__((vector_size(16)));
typedef union {
    vd4 four;
    vd two[2];
} doubles;
#define LOADD(p) ((doubles){__builtin_convertvector(load_floats(p), vd4)})

#define SCALE 0x1p81
#define HALF ((uint64_t)1 << 28)
#define KEEP (~((uint64_t)3 << 59 | (((uint64_t)1 << 29) - 1)))
#define REAL_CHANNELS 8 /* at a time */
#define STRETCH 128     /* inputs whose weights are widened at a time: they stay in the first cache */

/* a * b + c rounded to float32; c and one of the factors are SCALE times too large. In `same`, halves of the sum that
 * were kept as they are count -1. */
INLINE vd fused_quickly(vd a, vd b, vd c, vi *same) {
    const vul sum = (vul)(a * b + c) + HALF, kept = sum & KEEP;
    *same += (vi)sum == (vi)kept;
    return (vd)kept;
}

/* After n vectors of sums: all high halves were kept as they are, and no low one. */
INLINE int is_right(vi same, uint32_t n) {
    const vul wrong = (vul)same ^ (uint64_t)-n << 32;
    return !(wrong[0] | wrong[1]);
}

INLINE void write_sums(const vd *sum, float *out) {
    for (int j = 0; j < REAL_CHANNELS / 4; j++) {
        const doubles d = {.two = {sum[2 * j] * (1 / SCALE), sum[2 * j + 1] * (1 / SCALE)}};
        store_floats(out + 4 * j, __builtin_convertvector(d.four, vf));
    }
}

static float fused(float a, float b, float c) {
    const double product = (double)a * b, sum = product + c, part = sum - product;
    const double error = (product - (sum - part)) + (c - part);
    int64_t odd;
    memcpy(&odd, &sum, 8);
    if (error != 0. && error - error == 0. && !(odd & 1)) odd += (error > 0.) == (sum > 0.) ? 1 : -1;
    double rounded;
    memcpy(&rounded, &odd, 8);
    return (float)rounded;
}

/* One pixel by 8 channels. */
static void dot_exactly(const el_strings *in, int p, const float *weight, float *out) {
    memset(out, 0, REAL_CHANNELS * sizeof(float));
    for (int s = 0; s < in->segments; s++)
        for (int k = 0; k < in->length / 4; k++, weight += EL_REAL_BLOCK)
            for (int j = 0; j < REAL_CHANNELS; j++) out[j] = fused(run_of(in, p, s)[k], weight[j], out[j]);
}

/* `tile` pixels by 8 channels. */
static void dot_tile(const el_strings *in, int tile, const float *weight, float *out, int stride) {
    const int length = in->length / 4;
    const float *next = weight;
    vd sums[REAL_TILE][4] = {{{0}}}, w[STRETCH][4];
    vi same[REAL_TILE] = {{0}};
    for (int s = 0; s < in->segments; s++)
        for (int k = 0, n; k < length; k += n) {
            n = length - k < STRETCH ? length - k : STRETCH;
            for (int i = 0; i < n; i++, next += EL_REAL_BLOCK)
                for (int j = 0; j < 4; j++) w[i][j] = LOADD(next + j / 2 * 4).two[j % 2] * SCALE;
            for (int p = 0; p < tile; p++) {
                const float *x = run_of(in, p, s) + k;
                vd sum[4] = {sums[p][0], sums[p][1], sums[p][2], sums[p][3]};
                for (int i = 0; i < n; i++)
                    for (int j = 0; j < 4; j++) sum[j] = fused_quickly((vd){x[i], x[i]}, w[i][j], sum[j], same + p);
                for (int j = 0; j < 4; j++) sums[p][j] = sum[j];
            }
        }
    for (int p = 0; p < tile; p++, out += stride)
        if (is_right(same[p], 4 * (uint32_t)in->segments * (uint32_t)length)) write_sums(sums[p], out);
        else dot_exactly(in, p, weight, out);
}

static void dot(const el_strings *in, int tile, const float *weight, int channels, float *out, int stride,
                el_prefetch next) {
    (void)next;
    const size_t inputs = (size_t)in->segments * (size_t)(in->length / 4);
    for (int c = 0; c < channels; c += REAL_CHANNELS)
        dot_tile(in, tile, weight + (size_t)(c / EL_REAL_BLOCK) * EL_REAL_BLOCK * inputs + c % EL_REAL_BLOCK, out + c,
                 stride);
}

/* Eight channels from c on of one pixel; 0 if a sum may be wrong. */
static int dot_taps(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c, float *out) {
    vd sum[4] = {{0}};
    vi same = {0};
    weight += c;
    for (int t = 0; t < n_taps; t++, weight += weight_stride)
        for (int j = 0; j < 4; j++)
            sum[j] = fused_quickly(LOADD(taps[t] + c + j / 2 * 4).two[j % 2],
                                   LOADD(weight + j / 2 * 4).two[j % 2] * SCALE, sum[j], &same);
    write_sums(sum, out + c);
    return is_right(same, 4 * (uint32_t)n_taps);
}

static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    for (int i = 0; i < c; i += REAL_CHANNELS) {
        if (c - i >= REAL_CHANNELS && dot_taps(taps, n_taps, weight, weight_stride, i, out)) continue;
        for (int j = i; j < c && j < i + REAL_CHANNELS; j++) {
            out[j] = 0.f;
            for (int t = 0; t < n_taps; t++)
                out[j] = fused(taps[t][j], weight[(size_t)t * (size_t)weight_stride + (size_t)j], out[j]);
        }
    }
}
#endif

const el_real el_real_portable = {
    .tile_pixels = REAL_TILE,
    .abs_mean = abs_mean,
    .dot = dot,
    .dot_depthwise = dot_depthwise,
    .pool = pool,
    .unary = unary,
    .epilogue = epilogue,
};

/* ------------------------------------------------------------------------------------------------------------------ */

#include "int8_floats.h"

const el_int8 el_int8_portable = {
    .tile_pixels = INT8_TILE, .input_bytes = sizeof(INPUT), .largest = largest, .quantize = quantize, .dot = dot_int8};

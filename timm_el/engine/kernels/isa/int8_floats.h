/* An int8 half without instructions of its own. Products of bytes and sums of 1,024 of them are integers below 2^24,
 * which floats hold exactly, so that floats do the work. */
#define INPUT int8_t
#define ZERO 0
#include "quantize.h"

#define EXACT_INPUTS 1024 /* 127 * 127 * 1,024 is below 2^24 */
#define INT8_TILE 4

/* P pixels by 2 vectors of channels, `fours` times 4 inputs. */
INLINE void dot_some(const uint8_t *q, size_t step, int fours, const int8_t *weight, int first, int32_t *sums,
                     int stride, const int P) {
    vf sum[INT8_TILE][2];
    for (int p = 0; p < P; p++) sum[p][0] = sum[p][1] = (vf){0};
    for (int k = 0; k < fours; k++, weight += 256)
        for (int i = 0; i < 4; i++) {
            vf w[2];
            for (int v = 0; v < 2; v++)
                w[v] = __builtin_convertvector((vi)((vu)load_ints(weight + v * 4 * LANES) << (24 - 8 * i)) >> 24, vf);
            for (int p = 0; p < P; p++) {
                const vf x = spread((float)(int8_t)q[(size_t)p * step + (size_t)(4 * k + i)]);
                for (int v = 0; v < 2; v++) sum[p][v] = x * w[v] + sum[p][v];
            }
        }
    for (int p = 0; p < P; p++)
        for (int v = 0; v < 2; v++) {
            int32_t *to = sums + p * stride + v * LANES;
            const vi n = __builtin_convertvector(sum[p][v], vi);
            store_ints(to, first ? n : n + load_ints(to));
        }
}

static void dot_int8(const uint8_t *q, size_t step, int tile, int inputs, const void *weight, int channels,
                     int32_t *sums, int stride, el_prefetch next) {
    (void)next;
    const int fours = (inputs + 3) / 4;
    for (int c = 0; c < (channels + 63) / 64 * 64; c += 2 * LANES) {
        const int8_t *w =
            (const int8_t *)weight + (size_t)(c / 64) * el_int8_block_bytes(inputs) + (size_t)(c % 64) * 4;
        for (int from = 0; from < fours; from += EXACT_INPUTS / 4) {
            const int n = fours - from < EXACT_INPUTS / 4 ? fours - from : EXACT_INPUTS / 4;
            WITH_PIXELS(tile, INT8_TILE,
                        dot_some(q + 4 * from, step, n, w + (size_t)from * 256, from == 0, sums + c, stride, P))
        }
    }
}

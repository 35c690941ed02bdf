/* Real convolutions in 8-bit integers: what an instruction set supplies, beside its real half.
 *
 * Weights are int8, symmetric, with a scale per output channel. Inputs are int8, symmetric, with a scale per output
 * pixel where the kernel has one tap, else per output row, of the input rows of its windows: so it depends neither on a
 * tile nor on other images. Sums are exact integers, and every instruction set gives the same bits. The output is
 *
 *     v = float(sum) * scale[c]; v = v * k
 *
 * which is the epilogue of a binary convolution with K: row 0 of its table is the scale of the weights, and K is that
 * of the inputs. So scaling is written once, in real.h.
 *
 * Inputs q and their scale k, for m the largest abs(x) of those that share it:
 *
 *     k = m / 127,  q = x * (127 / m), rounded to the nearest integer, ties to even
 *     k = 0,        q = 0        where 127 / m is not finite: all x are 0, or below 4e-37
 *     k = NaN,      q = 0        where m is not finite: these outputs are NaN
 *
 * Layout of weights (el_int8_lay_out): blocks of 64 channels; in a block, four inputs at a time, the channels side by
 * side, then the 64 sums of each channel's weights (int32). What is missing to four inputs or 64 channels is zeros. */
#ifndef TIMM_EL_INT8_H
#define TIMM_EL_INT8_H

#include "isa.h"

#define EL_INT8_MOST_INPUTS (1 << 16) /* of an output pixel: 127 * 127 times as many fit into an int32 */

#define EL_INT8_SLACK 64 /* bytes behind inputs that `quantize` may write to, and that may be read */

struct el_int8 {
    int tile_pixels; /* pixels that `dot` takes at once, at most MOST_TILE */
    int input_bytes; /* of a quantized input, 1 or 2 */
    int zero;        /* each of its bytes, where the input is 0 */
    /* Return the largest of so_far and the magnitudes of n floats, NaN if one of them is. */
    float (*largest)(const float *x, size_t n, float so_far);
    /* Quantize n floats. What is at q is for `dot` of the same table only. */
    void (*quantize)(const float *x, size_t n, float inverse, void *q);
    /* Set sums[p * stride + c] to the dot product of pixel p, whose inputs are at q + p * step and filled up with zeros
     * to a multiple of 4, and channel c. Sums of channels beyond the last, up to a multiple of 64, are zeros. */
    void (*dot)(const uint8_t *q, size_t step, int tile, int inputs, const void *weight, int channels, int32_t *sums,
                int stride, el_prefetch next);
};

static inline size_t el_int8_block_bytes(int inputs) { return (size_t)((inputs + 3) / 4) * 256 + 64 * sizeof(int32_t); }

/* int8.c: bytes of the weights of a number of channels. */
size_t el_int8_bytes(int inputs, int channels);
/* int8.c: lay out weights (channels, inputs). */
void el_int8_lay_out(const int8_t *stored, int inputs, int channels, void *weight);
/* int8.c: 127 / m, or 0 where inputs are taken for zeros, and the scale k, for a largest magnitude m. */
float el_int8_inverse(float m, float *k);

#endif

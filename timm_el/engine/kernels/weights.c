/* Weights in memory: the layouts that counters read, and the way there from the stored one.
 *
 * A binary weight is a string of bits per output channel, tap by tap, each tap filled up to words of 64 bits. A layout
 * puts the strings of a block of channels side by side, a few bytes of each:
 *
 *     EL_WORDS_OF_8     c0 word 0, c1 word 0, ... c7 word 0,  c0 word 1, c1 word 1, ...
 *     EL_BYTES_OF_64    c0 byte 0, c1 byte 0, ... c63 byte 0, c0 byte 1, ...    in the order of place()
 *
 * The first one is stored (layout.py). Channels beyond the last are zeros. Depthwise weights have a bit per channel and
 * tap, taps one after the other, and have no other layout. */
#include "isa.h"
#include "rows.h"

#include <string.h>

static const struct {
    int channels, bytes; /* of a block; of a channel that stand together */
} blocks[EL_LAYOUTS] = {[EL_WORDS_OF_8] = {8, 8}, [EL_BYTES_OF_16] = {16, 1}, [EL_BYTES_OF_64] = {64, 1}};

/* Return the place of a channel in its block. Bytes are permuted so that sums of bytes, widened to 32 bits by unpacking
 * halves of 16 bytes twice, come out in the order of channels. */
static int place(el_layout layout, int channel) {
    switch (layout) {
        case EL_BYTES_OF_16: return 4 * (channel % 4) + channel / 4;
        case EL_BYTES_OF_64: return 16 * (channel / 4 % 4) + 4 * (channel / 16) + channel % 4;
        default: return channel;
    }
}

size_t el_bytes_of_words(int channels) { return (size_t)words_for(channels) * sizeof(uint64_t); }

size_t el_layout_bytes(el_layout layout, int words, int channels) {
    return (size_t)round_up(channels, blocks[layout].channels) * (size_t)words * sizeof(uint64_t);
}

void el_copy_to_layout(el_layout layout, const uint64_t *stored, int words, int channels, void *weight) {
    const int block = blocks[layout].channels, bytes = blocks[layout].bytes;
    memset(weight, 0, el_layout_bytes(layout, words, channels));
    for (int c = 0; c < channels; c++) {
        const char *from = (const char *)(stored + (size_t)(c / 8) * 8 * (size_t)words + (size_t)(c % 8));
        char *to = (char *)weight + (size_t)(c / block * block) * (size_t)words * 8 +
                   (size_t)(place(layout, c % block) * bytes);
        for (int j = 0; j < words; j++, from += 64)
            for (int i = 0; i < 8; i += bytes, to += block * bytes) memcpy(to, from + i, (size_t)bytes);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

size_t el_weight_size(const el_plan *p) {
    const int taps = p->conv.kh * p->conv.kw;
    if (p->int8) return el_int8_bytes((int)el_inputs_of(p), p->c_out);
    if (p->real) {
        if (is_depthwise(p)) return (size_t)taps * (size_t)round_up(p->c_out, 16) * sizeof(float);
        return (size_t)round_up(p->c_out, EL_REAL_BLOCK) * (size_t)taps * (size_t)p->c_in * sizeof(float);
    }
    if (is_depthwise(p)) return (size_t)taps * el_bytes_of_words(p->c_in);
    return (size_t)p->groups *
           el_layout_bytes(el_isa_active->counter->layout, taps * tap_words(p), p->c_out / p->groups);
}

int el_own_layout(void) { return el_isa_active->counter->layout != EL_WORDS_OF_8; }

void el_lay_out(const el_plan *p, const void *stored, void *weight) {
    const el_layout layout = el_isa_active->counter->layout;
    const int words = p->conv.kh * p->conv.kw * tap_words(p), og = p->c_out / p->groups;
    if (p->int8) {
        el_int8_lay_out(stored, (int)el_inputs_of(p), p->c_out, weight);
        return;
    }
    if (p->real || is_depthwise(p)) {
        memcpy(weight, stored, el_weight_size(p));
        return;
    }
    for (int g = 0; g < p->groups; g++) {
        const char *from = (const char *)stored + (size_t)g * el_layout_bytes(EL_WORDS_OF_8, words, og);
        el_copy_to_layout(layout, (const uint64_t *)(const void *)from, words, og,
                          (char *)weight + (size_t)g * el_layout_bytes(layout, words, og));
    }
}

/* Set sums[t][c] to (pad_value + 1) times the sum of the weights of tap t, which are +1 where a bit is 1, else -1. */
void el_tap_sums(const el_plan *p, const void *stored, int32_t *sums) {
    const int taps = p->conv.kh * p->conv.kw, words = tap_words(p), og = p->c_out / p->groups, cg = p->c_in / p->groups;
    memset(sums, 0, (size_t)taps * (size_t)p->table_stride * sizeof(int32_t));
    for (int c = 0; c < p->c_out; c++)
        for (int t = 0; t < taps; t++) {
            int ones = 0;
            if (is_depthwise(p)) {
                ones = (int)(((const uint64_t *)stored)[t * words + c / 64] >> (c % 64) & 1);
            } else {
                const char *group =
                    (const char *)stored + (size_t)(c / og) * el_layout_bytes(EL_WORDS_OF_8, taps * words, og);
                const uint64_t *channel = (const uint64_t *)(const void *)group +
                                          (size_t)(c % og / 8) * 8 * (size_t)(taps * words) + (size_t)(c % og % 8);
                for (int i = 0; i < words; i++) ones += __builtin_popcountll(channel[(size_t)(t * words + i) * 8]);
            }
            sums[(size_t)t * (size_t)p->table_stride + (size_t)c] = (p->pad_value + 1) * (2 * ones - cg);
        }
}

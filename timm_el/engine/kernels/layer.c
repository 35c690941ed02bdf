/* A layer, before any row of it: how large its bands, tiles and chunks are, and the memory that it needs. */
#include "rows.h"

#include <string.h>

#define CHUNK 512               /* binary output channels finished at a time: their counts stay in the first cache */
#define REAL_CHUNK_BYTES 262144 /* real weights used at a time: they stay in the second cache */
#define BAND_PIXELS 96          /* output pixels of a band, at least, if the image has them */

/* Return the next `bytes` bytes of memory, or NULL without memory, and move on. */
static void *part_of(char *memory, uint64_t *at, uint64_t bytes) {
    char *part = memory ? memory + *at : NULL;
    *at += (bytes + 63) / 64 * 64;
    return part;
}

/* Divide memory among what a layer needs. Return the bytes; without memory, that is all that happens. They are counted
 * in 64 bits, because a size of another image may need more than there are addresses. */
static uint64_t divide(const layer *l, char *memory, scratch *s) {
    const el_plan *p = l->p;
    const uint64_t pixels = (uint64_t)l->band_rows * (uint64_t)p->ow, in_rows = (uint64_t)l->in_rows;
    const uint64_t tile = (uint64_t)MOST_TILE * (uint64_t)(l->chunk + 64) * 4; /* counts and floats have 4 bytes */
    uint64_t at = 0;
    s->rows = part_of(memory, &at, l->copied ? in_rows * (uint64_t)l->width * l->pixel : 0);
    s->means = part_of(memory, &at, p->has_k ? in_rows * (uint64_t)p->w * sizeof(float) : 0);
    s->inputs = part_of(memory, &at, pixels * sizeof *s->inputs);
    s->k = part_of(memory, &at, pixels * sizeof(float));
    s->border = part_of(memory, &at, pixels);
    s->pooled = part_of(memory, &at, p->link_pool ? pixels * (uint64_t)p->link_c * sizeof(float) : 0);
    s->zeros = part_of(memory, &at, (size_t)round_up(p->c_in, 16) * sizeof(float));
    s->expanded = part_of(memory, &at, l->depthwise && !p->real ? (uint64_t)l->taps * l->tap : 0);
    s->quantized = part_of(memory, &at, p->int8 ? pixels * l->quantized + EL_INT8_SLACK : 0);
    s->quantized_rows = part_of(memory, &at, p->int8 && l->taps > 1 ? (uint64_t)p->conv.kh * l->quantized_row : 0);
    s->sums = part_of(memory, &at, tile);
    s->corrections = part_of(memory, &at, p->tap_sums ? tile : 0);
    return at + 64;
}

/* Find the runs of an output pixel's inputs: rows of the kernel where these follow one another in memory, else taps. */
static void set_runs(layer *l) {
    const el_window *w = &l->p->conv;
    const int whole_rows = w->dw == 1 && l->pixel == l->tap && !l->depthwise;
    l->segments = whole_rows ? w->kh : l->taps;
    l->length = (int)l->tap * (whole_rows ? w->kw : 1);
    for (int i = 0; i < l->segments; i++) {
        const int ky = whole_rows ? i : i / w->kw, kx = whole_rows ? 0 : i % w->kw;
        l->offsets[i] = ((size_t)(ky * w->dh) * (size_t)l->width + (size_t)(kx * w->dw)) * l->pixel;
    }
}

void el_set_up(layer *l, const el_plan *p) {
    const el_window *w = &p->conv;
    l->p = p;
    l->depthwise = is_depthwise(p);
    l->taps = w->kh * w->kw;
    l->tap = p->real        ? (size_t)(p->c_in / p->groups) * sizeof(float)
             : l->depthwise ? (size_t)words_for(p->c_in) * 64
                            : el_isa_active->counter->packed_bytes(p->c_in / p->groups);
    l->pixel = p->real ? (size_t)p->c_in * sizeof(float) : l->depthwise ? l->tap : (size_t)p->groups * l->tap;
    const int last = (p->ow - 1) * w->sw - w->pw + (w->kw - 1) * w->dw; /* column of the last tap */
    const int last_row = (p->oh - 1) * w->sh - w->ph + (w->kh - 1) * w->dh;
    const int padded = w->ph || w->pw || last >= p->w || last_row >= p->h;
    l->copied = !p->real || (!p->is_pool && !l->depthwise && (padded || w->kh > 1 || (p->int8 && l->taps > 1)));
    l->by_tile = !p->real && l->taps == 1 && p->groups == 1 && w->sh == 1 && w->sw == 1 && p->oh == p->h &&
                 p->ow == p->w && !w->ph && !w->pw;
    l->left = l->copied ? w->pw : 0;
    l->width = l->left + (l->copied && last >= p->w ? last + 1 : p->w);
    set_runs(l);
    l->chunk = l->depthwise ? round_up(p->c_out, EL_REAL_BLOCK) : CHUNK;
    if (p->int8) {
        const size_t bytes = (size_t)el_isa_active->int8->input_bytes;
        l->quantized = (size_t)round_up((int)el_inputs_of(p), 4) * bytes;
        l->quantized_row = (size_t)l->width * (size_t)p->c_in * bytes + EL_INT8_SLACK;
    }
    if (p->real && !l->depthwise) {
        const size_t fit = REAL_CHUNK_BYTES / channel_bytes(l) / EL_REAL_BLOCK;
        l->chunk = (int)(fit < 1 ? 1 : fit > 8 ? 8 : fit) * EL_REAL_BLOCK;
    }
    const int band_rows = (BAND_PIXELS + p->ow - 1) / p->ow;
    l->band_rows = band_rows < p->oh ? band_rows : p->oh;
    l->in_rows = (l->band_rows - 1) * w->sh + (w->kh - 1) * w->dh + 1;
    if (l->in_rows < w->kh) l->in_rows = w->kh;
    scratch none;
    const uint64_t bytes = divide(l, NULL, &none);
    l->bytes = bytes <= SIZE_MAX / 4 ? (size_t)bytes : SIZE_MAX / 2 + 1; /* which el_scratch refuses */
}

void el_prepare(stage *s, const layer *l, char *memory) {
    s->l = l;
    s->taken_from = s->taken_to = 0;
    divide(l, memory, &s->s);
    if (!l->depthwise) return;
    if (l->p->real) memset(s->s.zeros, 0, (size_t)round_up(l->p->c_in, 16) * sizeof(float));
    else el_isa_active->counter->expand(l->p->weight, (size_t)l->taps * (size_t)tap_words(l->p), s->s.expanded);
}

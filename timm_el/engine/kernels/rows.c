/* A layer, a few rows at a time: which rows, which pixels, which channels, in which order. All arithmetic is in isa/.
 *
 * Output rows are made in bands, the pixels of a band in tiles, the channels of a tile in chunks:
 *
 *        input rows of a band                  output rows of a band
 *
 *     y0 +-----------------------+        oy0 +------+------+------+----
 *        | 0 0 0 0 padding 0 0 0 |            | tile | tile | tile |        a tile may go on in the next row
 *        | 0 +---------------+ 0 |  window    +------+------+------+----
 *        | 0 | packed signs, | 0 |  ------>   | tile | ...
 *        | 0 | or floats     | 0 |        oy1 +------+----
 *        +-----------------------+
 *        the last rows are the first ones of the next band: they move up
 *
 * For a band:  take_rows   packs the signs (or copies the floats) of its input rows
 *              locate      finds where each output pixel's inputs start, and its K, and pools its link
 *              quantize    rounds inputs to int8, where the layer is int8
 * For a tile:  take_tile   packs the signs of its input pixels instead, where a window is one pixel
 *              accumulate  counts bits that differ, or takes dot products
 *              correct     finds what padding adds
 *              prefetch    asks for a part of the next layer's weights
 *              finish      computes the epilogue and writes outputs
 *
 * So a value of x is read from memory once for its sign and, still in cache, once more for the link.
 *
 * Rows of x, link, added and y may be rings: of what one layer makes for the next, only rows that are still needed are
 * kept, row y at y % ring. A band ends where one of the rings does, so that its rows follow one another in memory:
 *
 *     ring of 4 rows    | 8 | 5 | 6 | 7 |    row 8 has taken the place of row 4; a band of rows 7 .. 9 is cut after 7
 */
#include "rows.h"

#include <string.h>

#define K_PIXELS 8              /* pixels whose signs and means are taken while they are in the first cache */

/* Output rows oy0 .. oy1 whose windows start at input row y0, of channels c0 .. c1. */
typedef struct {
    int oy0, oy1, y0, c0, c1;
} band;

/* Pixels first .. first + count of a band, the first of which is output pixel (oy, ox); channels c .. c + n, of one
 * group, in rows of `stride` sums. */
typedef struct {
    int first, count, oy, ox;
    int group, c, n, stride;
} tile;

/* Move (oy, ox) by one output pixel. */
static void next_pixel(const el_plan *p, int *oy, int *ox) {
    if (++*ox == p->ow) *ox = 0, ++*oy;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Pack n pixels of x to expanded signs, a few words at a time. */
static void pack_expanded(const layer *l, const float *x, int n, char *bytes) {
    enum { MOST_WORDS = 64 };
    const el_plan *p = l->p;
    const el_counter *counter = el_isa_active->counter;
    uint64_t bits[MOST_WORDS];
    const int words = words_for(p->c_in), most = words < MOST_WORDS ? words : MOST_WORDS, at_once = MOST_WORDS / most;
    for (int i = 0; i < n; i += at_once)
        for (int w = 0; w < words; w += most) { /* whole pixels, or one pixel in pieces */
            const int pixels = n - i < at_once ? n - i : at_once, c = 64 * w;
            const int some = words - w < most ? words - w : most;
            counter->pack(x + (size_t)i * (size_t)p->c_in + c, pixels, (size_t)p->c_in,
                          p->threshold ? p->threshold + c : NULL, p->flip ? p->flip + c : NULL,
                          p->c_in - c < 64 * some ? p->c_in - c : 64 * some, (char *)bits, (size_t)some * sizeof *bits);
            counter->expand(bits, (size_t)(pixels * some), bytes);
            bytes += pixels * some * 64;
        }
}

/* Pack n pixels of x, group by group, as the counter reads them. */
static void pack_pixels(const layer *l, const float *x, int n, char *bits) {
    const el_plan *p = l->p;
    const int cg = p->c_in / p->groups;
    if (l->depthwise) {
        pack_expanded(l, x, n, bits);
        return;
    }
    for (int g = 0; g < p->groups; g++)
        el_isa_active->counter->pack(x + g * cg, n, (size_t)p->c_in, p->threshold ? p->threshold + g * cg : NULL,
                                     p->flip ? p->flip + g * cg : NULL, cg, bits + (size_t)g * l->tap, l->pixel);
}

/* Take input rows from .. to of the band that starts at y0: signs and means of abs(x), or copies of floats. */
static void take_rows(const stage *s, int y0, int from, int to) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const size_t row_bytes = (size_t)l->width * l->pixel, image = (size_t)p->w * l->pixel;
    for (int y = from; y < to; y++) {
        char *row = s->s.rows + (size_t)(y - y0) * row_bytes;
        if (y < 0 || y >= p->h) {
            memset(row, 0, row_bytes);
            continue;
        }
        const float *x = row_of(&s->x, y);
        const size_t left = (size_t)l->left * l->pixel, end = left + image;
        memset(row, 0, left);
        if (end < row_bytes) memset(row + end, 0, row_bytes - end);
        row += left;
        if (p->real) {
            memcpy(row, x, image < row_bytes - left ? image : row_bytes - left);
            continue;
        }
        const int step = p->has_k ? K_PIXELS : p->w;
        for (int at = 0; at < p->w; at += step, x += (size_t)step * (size_t)p->c_in) {
            const int n = p->w - at < step ? p->w - at : step;
            pack_pixels(l, x, n, row + (size_t)at * l->pixel);
            if (p->has_k)
                el_isa_active->real->abs_mean(x, n, p->c_in, s->s.means + (size_t)(y - y0) * (size_t)p->w + at);
        }
    }
}

/* Make the input rows of a band be in the scratch. Rows that it shares with the last one move to the front. */
static void take_band(stage *s, const band *b) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_window *w = &p->conv;
    const int end = (b->oy1 - 1) * w->sh - w->ph + (w->kh - 1) * w->dh + 1;
    int start = b->y0;
    if (s->taken_from <= b->y0 && b->y0 < s->taken_to) {
        const size_t kept = (size_t)(s->taken_to - b->y0), gone = (size_t)(b->y0 - s->taken_from);
        const size_t row = (size_t)l->width * l->pixel;
        memmove(s->s.rows, s->s.rows + gone * row, kept * row);
        if (p->has_k) memmove(s->s.means, s->s.means + gone * (size_t)p->w, kept * (size_t)p->w * sizeof(float));
        start = s->taken_to;
    }
    take_rows(s, b->y0, start, end);
    s->taken_from = b->y0;
    s->taken_to = start > end ? start : end;
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Return the mean over the taps of the means of abs(x); taps outside of the image are zeros. */
static float scale_of_input(const layer *l, const float *means, int y0, int oy, int ox) {
    const el_window *w = &l->p->conv;
    float sum = 0.f;
    for (int ky = 0; ky < w->kh; ky++) {
        const int y = oy * w->sh - w->ph + ky * w->dh;
        if (y < 0 || y >= l->p->h) continue;
        for (int kx = 0; kx < w->kw; kx++) {
            const int x = ox * w->sw - w->pw + kx * w->dw;
            if (x >= 0 && x < l->p->w) sum = sum + means[(size_t)(y - y0) * (size_t)l->p->w + (size_t)x];
        }
    }
    return sum / (float)l->taps;
}

/* Pool one window of the link, channels c0 .. c1, to `out`. */
static void pool_window(const stage *s, int oy, int ox, int c0, int c1, float *out) {
    const el_plan *p = s->l->p;
    const el_window *k = &p->pool;
    const float *window[EL_MAX_POOL];
    int n = 0;
    for (int ky = 0; ky < k->kh; ky++) {
        const int iy = oy * k->sh - k->ph + ky * k->dh;
        if (iy < 0 || iy >= p->link_h) continue;
        const float *row = row_of(&s->link, iy) + c0;
        for (int kx = 0; kx < k->kw; kx++) {
            const int ix = ox * k->sw - k->pw + kx * k->dw;
            if (ix >= 0 && ix < p->link_w) window[n++] = row + (size_t)ix * (size_t)p->link_c;
        }
    }
    el_isa_active->real->pool(window, n, p->link_pool, c1 - c0, out);
}

/* Mark the pixels of an output row to which padding adds something. */
static void mark_border(const el_plan *p, int oy, uint8_t *border) {
    const el_window *w = &p->conv;
    const int y = oy * w->sh - w->ph, reach = (w->kw - 1) * w->dw;
    memset(border, y < 0 || y + (w->kh - 1) * w->dh >= p->h, (size_t)p->ow);
    for (int ox = 0; ox < p->ow && ox * w->sw < w->pw; ox++) border[ox] = 1;
    for (int ox = p->ow - 1; ox >= 0 && ox * w->sw - w->pw + reach >= p->w; ox--) border[ox] = 1;
}

/* Find, of each output pixel of a band: where its inputs start, its K, its pooled link, whether padding touches it. */
static void locate(const stage *s, const band *b) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_window *w = &p->conv;
    const size_t step = (size_t)w->sw * l->pixel;
    const int plain_k = l->taps == 1 && !w->ph && !w->pw && l->width == p->w;
    for (int oy = b->oy0; oy < b->oy1; oy++) {
        const int y = oy * w->sh - w->ph, first = (oy - b->oy0) * p->ow;
        /* A copied band starts at input row y0, and its rows where padding starts; else there is no padding. */
        const char *start = l->copied ? s->s.rows + (size_t)(y - b->y0) * (size_t)l->width * l->pixel
                                      : (const char *)row_of(&s->x, y < 0 ? 0 : y);
        for (int ox = 0; ox < p->ow; ox++) s->s.inputs[first + ox] = start + (size_t)ox * step;
        if (p->tap_sums) mark_border(p, oy, s->s.border + first);
        for (int ox = 0; p->has_k && !l->by_tile && ox < p->ow; ox++)
            s->s.k[first + ox] = plain_k && y < p->h && ox * w->sw < p->w
                                     ? s->s.means[(size_t)(y - b->y0) * (size_t)p->w + (size_t)(ox * w->sw)]
                                     : scale_of_input(l, s->s.means, b->y0, oy, ox);
        for (int ox = 0; p->link_pool && ox < p->ow; ox++)
            pool_window(s, oy, ox, 0, p->link_c, s->s.pooled + (size_t)(first + ox) * (size_t)p->link_c);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Pack the input pixels of a tile just before they are counted: the link, which reads them once more, then finds them
 * in the first cache. Input and output pixels are the same ones here. */
static void take_tile(const stage *s, const tile *t) {
    const el_plan *p = s->l->p;
    int left = t->count, i = t->first, y = t->oy, x = t->ox;
    for (int n; left > 0; left -= n, i += n, y++, x = 0) {
        n = p->w - x < left ? p->w - x : left;
        const float *pixels = row_of(&s->x, y) + (size_t)x * (size_t)p->c_in;
        if (p->has_k) el_isa_active->real->abs_mean(pixels, n, p->c_in, s->s.k + i);
        pack_pixels(s->l, pixels, n, s->s.rows + (size_t)i * s->l->pixel);
    }
}

/* Return where the weights of a channel of a full real convolution start, at a multiple of EL_REAL_BLOCK. */
static const char *weight_of(const layer *l, int c) { return (const char *)l->p->weight + (size_t)c * channel_bytes(l); }

/* Return the weights that the next chunk of channels needs, of them the part that falls to this tile. */
static el_prefetch next_chunk(const layer *l, const band *b, const tile *t, int pixels) {
    const el_plan *p = l->p;
    const int from = t->c + t->n, n = b->c1 - from < l->chunk ? b->c1 - from : l->chunk;
    if (n <= 0) return (el_prefetch){p->weight, 0};
    const size_t bytes = (size_t)n * channel_bytes(l), start = bytes * (size_t)t->first / (size_t)pixels;
    return (el_prefetch){weight_of(l, from) + start,
                         bytes * (size_t)(t->first + t->count) / (size_t)pixels - start};
}

static void accumulate_real_depthwise(const stage *s, const tile *t) {
    const el_plan *p = s->l->p;
    const el_window *w = &p->conv;
    const float *taps[EL_MAX_TAPS];
    int oy = t->oy, ox = t->ox;
    for (int q = 0; q < t->count; q++, next_pixel(p, &oy, &ox)) {
        int n = 0;
        for (int ky = 0; ky < w->kh; ky++) {
            const int y = oy * w->sh - w->ph + ky * w->dh;
            const float *row = y < 0 || y >= p->h ? NULL : row_of(&s->x, y);
            for (int kx = 0; kx < w->kw; kx++) {
                const int x = ox * w->sw - w->pw + kx * w->dw;
                taps[n++] = !row || x < 0 || x >= p->w ? s->s.zeros : row + (size_t)x * (size_t)p->c_in;
            }
        }
        el_isa_active->real->dot_depthwise(taps, n, p->weight, round_up(p->c_out, 16), p->c_out,
                                           (float *)(void *)s->s.sums + (size_t)q * (size_t)t->stride);
    }
}

static void accumulate_int8(const stage *s, const band *b, const tile *t, int pixels) {
    const layer *l = s->l;
    el_isa_active->int8->dot(s->s.quantized + (size_t)t->first * l->quantized, l->quantized, t->count,
                             (int)el_inputs_of(l->p), weight_of(l, t->c), t->n, (int32_t *)(void *)s->s.sums, t->stride,
                             next_chunk(l, b, t, pixels));
}

static void count_full(const stage *s, const tile *t) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_counter *counter = el_isa_active->counter;
    const int og = p->c_out / p->groups, words = l->taps * tap_words(p);
    const char *base[MOST_TILE];
    for (int q = 0; q < t->count; q++) base[q] = s->s.inputs[t->first + q] + (size_t)t->group * l->tap;
    const el_strings in = {.base = base, .offsets = l->offsets, .segments = l->segments, .length = l->length};
    const char *weight = (const char *)p->weight + (size_t)t->group * el_layout_bytes(counter->layout, words, og) +
                         el_layout_bytes(counter->layout, words, t->c - t->group * og);
    counter->count(&in, t->count, weight, t->n, (int32_t *)(void *)s->s.sums, t->stride);
}

/* Sum up a tile: counts of differing bits, or dot products. */
static void accumulate(const stage *s, const band *b, const tile *t, int pixels) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_strings in = {
        .base = s->s.inputs + t->first, .offsets = l->offsets, .segments = l->segments, .length = l->length};
    if (l->depthwise && p->real) accumulate_real_depthwise(s, t);
    else if (l->depthwise)
        el_isa_active->counter->count_depthwise(&in, t->count, s->s.expanded, (int32_t *)(void *)s->s.sums, t->stride);
    else if (p->int8) accumulate_int8(s, b, t, pixels);
    else if (p->real)
        el_isa_active->real->dot(&in, t->count, (const float *)(const void *)weight_of(l, t->c), t->n,
                                 (float *)(void *)s->s.sums, t->stride, next_chunk(l, b, t, pixels));
    else count_full(s, t);
}

/* Add up what the taps of one output pixel that are outside of the image change in its dot products. */
static void correct_pixel(const el_plan *p, int oy, int ox, int c, int n, int32_t *out) {
    const el_window *w = &p->conv;
    memset(out, 0, sizeof(int32_t) * (size_t)n);
    for (int ky = 0; ky < w->kh; ky++)
        for (int kx = 0; kx < w->kw; kx++) {
            const int y = oy * w->sh - w->ph + ky * w->dh, x = ox * w->sw - w->pw + kx * w->dw;
            if (y >= 0 && y < p->h && x >= 0 && x < p->w) continue;
            const int32_t *sums = p->tap_sums + (size_t)(ky * w->kw + kx) * (size_t)p->table_stride + c;
            for (int i = 0; i < n; i++) out[i] += sums[i];
        }
}

/* Return what padding adds to the sums of a tile, or NULL. */
static const int32_t *correct(const stage *s, const tile *t) {
    const el_plan *p = s->l->p;
    const uint8_t *border = s->s.border + t->first;
    if (!p->tap_sums || !memchr(border, 1, (size_t)t->count)) return NULL;
    int oy = t->oy, ox = t->ox;
    for (int q = 0; q < t->count; q++, next_pixel(p, &oy, &ox)) {
        int32_t *row = s->s.corrections + (size_t)q * (size_t)t->stride;
        if (border[q]) correct_pixel(p, oy, ox, t->c, t->n, row);
        else memset(row, 0, (size_t)t->n * sizeof *row);
    }
    return s->s.corrections;
}

/* Read the part of the next layer's weights that falls to a tile of the image into the second cache. */
static void prefetch(const stage *s, const band *b, const tile *t) {
    const el_plan *p = s->l->p;
    const int64_t i = (int64_t)b->oy0 * p->ow + t->first, pixels = (int64_t)p->oh * p->ow;
    const size_t to = s->next.bytes * (size_t)(i + t->count) / (size_t)pixels;
    for (size_t at = s->next.bytes * (size_t)i / (size_t)pixels / 64 * 64; at < to; at += 64)
        __builtin_prefetch(s->next.at + at, 0, 2);
}

/* Compute the epilogue of a tile. */
static void finish(const stage *s, const band *b, const tile *t, const int32_t *corrections, el_epilogue *epilogue) {
    const el_plan *p = s->l->p;
    const float *link = p->link_pool ? s->s.pooled : p->link ? row_of(&s->link, b->oy0) : NULL;
    const float *added = s->added.base ? row_of(&s->added, b->oy0) : NULL;
    const el_tile outputs = {
        .plan = p,
        .pixels = t->count,
        .c0 = t->c,
        .c1 = t->c + t->n,
        .stride = t->stride,
        .bits = s->l->taps * (p->c_in / p->groups),
        .sums = s->s.sums,
        .corrections = corrections,
        .k = s->s.k + t->first,
        .link = link ? link + (size_t)t->first * (size_t)p->link_c : NULL,
        .added = added ? added + (size_t)t->first * (size_t)p->c_out : NULL,
        .y = row_of(&s->y, b->oy0) + (size_t)t->first * (size_t)p->c_out,
    };
    epilogue(&outputs);
}

/* Make the output rows of a band whose input rows are there. */
static void run_band(const stage *s, const band *b) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const int pixels = (b->oy1 - b->oy0) * p->ow, og = l->depthwise ? p->c_out : p->c_out / p->groups;
    const int most = p->int8   ? el_isa_active->int8->tile_pixels
                     : p->real ? el_isa_active->real->tile_pixels
                               : el_isa_active->counter->tile_pixels;
    locate(s, b);
    if (p->int8) el_quantize(s, b->oy0, b->oy1);
    for (int c = b->c0, n; c < b->c1; c += n) {
        const int group = c / og, end = (group + 1) * og < b->c1 ? (group + 1) * og : b->c1;
        n = end - c < l->chunk ? end - c : l->chunk;
        el_epilogue *epilogue = el_isa_active->real->epilogue(p, c);
        tile t = {.oy = b->oy0, .group = group, .c = c, .n = n, .stride = round_up(n, EL_REAL_BLOCK)};
        for (; t.first < pixels; t.first += t.count) {
            t.count = pixels - t.first < most ? pixels - t.first : most;
            if (l->by_tile && c == b->c0) take_tile(s, &t);
            accumulate(s, b, &t, pixels);
            const int32_t *corrections = correct(s, &t);
            if (s->next.bytes && c == b->c0) prefetch(s, b, &t);
            finish(s, b, &t, corrections, epilogue);
            t.ox += t.count;
            t.oy += t.ox / p->ow;
            t.ox %= p->ow;
        }
    }
}

static void pool_rows(const stage *s, int from, int to, int c0, int c1) {
    const el_plan *p = s->l->p;
    for (int oy = from; oy < to; oy++) {
        float *y = row_of(&s->y, oy) + c0;
        for (int ox = 0; ox < p->ow; ox++, y += p->c_out) pool_window(s, oy, ox, c0, c1, y);
    }
}

/* Return the row, at most `to`, before which a band that starts at row `from` ends for the sake of a ring. */
static int end_of_ring(const row_view *v, int from, int to) {
    const int end = from - from % v->ring + v->ring;
    return end < to ? end : to;
}

/* Rows of the input that the last call left are not taken again. */
void el_run_rows(stage *s, int from, int to, int c0, int c1) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    if (p->is_pool) {
        pool_rows(s, from, to, c0, c1);
        return;
    }
    for (int oy0 = from, oy1; oy0 < to; oy0 = oy1) {
        oy1 = end_of_ring(&s->y, oy0, oy0 + l->band_rows < to ? oy0 + l->band_rows : to);
        if (s->added.base) oy1 = end_of_ring(&s->added, oy0, oy1);
        if (p->link && !p->link_pool) oy1 = end_of_ring(&s->link, oy0, oy1);
        const band b = {.oy0 = oy0, .oy1 = oy1, .y0 = oy0 * p->conv.sh - p->conv.ph, .c0 = c0, .c1 = c1};
        if (l->copied && !l->by_tile) take_band(s, &b);
        run_band(s, &b);
    }
}

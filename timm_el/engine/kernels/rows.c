/* One layer: which rows, which pixels, which channels, in which order. All arithmetic is in the bodies. */
#include "rows.h"

#include <string.h>

#define CHUNK 512              /* binary output channels finished at a time: their counts stay in the first cache */
#define REAL_CHUNK_BYTES 262144 /* real weights used at a time: they stay in the second cache */
#define BAND_PIXELS 96         /* output pixels of a band, at least, if the image has them */
#define K_PIXELS 8             /* whose signs and means are taken while they are in the first cache */

#define AT(type, where) ((type *)(void *)(s->scratch + s->l->where))

/* Input rows from .. to of the band that starts at y0: their signs and means of abs(x), or copies of real ones. */
static void take_rows(const stage *s, int y0, int from, int to) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const int groups = l->depthwise ? 1 : p->groups, cg = p->c_in / groups;
    const size_t unit = p->real ? sizeof(float) : sizeof(uint64_t), pixel = (size_t)l->pixel * unit;
    for (int y = from; y < to; y++) {
        char *row = AT(char, rows_at) + (size_t)(y - y0) * (size_t)l->width * pixel;
        if (y < 0 || y >= p->h) {
            memset(row, 0, (size_t)l->width * pixel);
            continue;
        }
        const float *x = s->x + image_size(y % s->x_ring, p->w, p->c_in);
        const int right = l->width - l->left - p->w;
        memset(row, 0, (size_t)l->left * pixel);
        row += (size_t)l->left * pixel;
        if (right > 0) memset(row + (size_t)p->w * pixel, 0, (size_t)right * pixel);
        if (p->real) {
            memcpy(row, x, (size_t)p->w * pixel);
            continue;
        }
        const int step = p->has_k ? K_PIXELS : p->w;
        for (int at = 0; at < p->w; at += step, x += (size_t)step * (size_t)p->c_in) {
            const int n = p->w - at < step ? p->w - at : step;
            for (int g = 0; g < groups; g++)
                el_body_active->pack(x + g * cg, n, (size_t)p->c_in, p->threshold ? p->threshold + g * cg : NULL,
                           p->flip ? p->flip + g * cg : NULL, cg,
                           (uint64_t *)(void *)row + at * l->pixel + g * l->tap, (size_t)l->pixel);
            if (p->has_k) el_body_active->abs_mean(x, n, p->c_in, AT(float, k_at) + (size_t)(y - y0) * (size_t)p->w + at);
        }
    }
}

/* The same of `tile` pixels from (oy, ox) on, the i-th of the band, just before they are counted: their link, which reads
 * them once more, then finds them in the first cache. */
static void take_tile(const stage *s, int oy, int ox, int i, int tile) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    for (int n; tile > 0; tile -= n, i += n, oy++, ox = 0) {
        n = p->w - ox < tile ? p->w - ox : tile;
        const float *x = s->x + image_size(oy % s->x_ring, p->w, p->c_in) + (size_t)ox * (size_t)p->c_in;
        if (p->has_k) el_body_active->abs_mean(x, n, p->c_in, AT(float, scale_at) + i);
        el_body_active->pack(x, n, (size_t)p->c_in, p->threshold, p->flip, p->c_in,
                             AT(uint64_t, rows_at) + (size_t)i * (size_t)l->pixel, (size_t)l->pixel);
    }
}

/* Mean of the means of abs(x) over the taps; taps outside the image are zeros. */
static float scale_of_input(const layer *l, const float *k, int y0, int oy, int ox) {
    const el_window *w = &l->p->conv;
    float sum = 0.f;
    for (int ky = 0; ky < w->kh; ky++) {
        const int y = oy * w->sh - w->ph + ky * w->dh;
        if (y < 0 || y >= l->p->h) continue;
        for (int kx = 0; kx < w->kw; kx++) {
            const int x = ox * w->sw - w->pw + kx * w->dw;
            if (x >= 0 && x < l->p->w) sum = sum + k[(size_t)(y - y0) * (size_t)l->p->w + (size_t)x];
        }
    }
    return sum / (float)l->taps;
}

/* What padding changes in the dot products of one pixel. */
static void correct(const el_plan *p, int oy, int ox, int c0, int c1, int32_t *out) {
    const el_window *w = &p->conv;
    memset(out, 0, sizeof(int32_t) * (size_t)(c1 - c0));
    for (int ky = 0; ky < w->kh; ky++)
        for (int kx = 0; kx < w->kw; kx++) {
            const int y = oy * w->sh - w->ph + ky * w->dh, x = ox * w->sw - w->pw + kx * w->dw;
            if (y >= 0 && y < p->h && x >= 0 && x < p->w) continue;
            const int32_t *sums = p->tap_sums + (size_t)(ky * w->kw + kx) * (size_t)p->table_stride + c0;
            for (int c = 0; c < c1 - c0; c++) out[c] += sums[c];
        }
}

/* One window of the link's pool, channels c0 .. c1, to `out`. */
static void pool_window(const stage *s, int oy, int ox, int c0, int c1, float *out) {
    const el_plan *p = s->l->p;
    const el_window *k = &p->pool;
    const float *window[EL_MAX_POOL];
    int n = 0;
    for (int ky = 0; ky < k->kh; ky++) {
        const int iy = oy * k->sh - k->ph + ky * k->dh;
        if (iy < 0 || iy >= p->link_h) continue;
        const float *row = s->link + image_size(iy % s->link_ring, p->link_w, p->link_c) + c0;
        for (int kx = 0; kx < k->kw; kx++) {
            const int ix = ox * k->sw - k->pw + kx * k->dw;
            if (ix >= 0 && ix < p->link_w) window[n++] = row + (size_t)ix * (size_t)p->link_c;
        }
    }
    el_body_active->pool(window, n, p->link_pool, c1 - c0, out);
}

/* For each output pixel of a band: where its inputs start, what its link adds, its K, whether padding touches it. */
static void locate(const stage *s, int oy0, int oy1, int y0) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_window *w = &p->conv;
    const size_t pixel = (size_t)l->pixel * (p->real ? sizeof(float) : sizeof(uint64_t)), step = (size_t)w->sw * pixel;
    const int ow = p->ow, reach = (w->kw - 1) * w->dw, border_matters = p->tap_sums != NULL;
    const int plain_k = l->taps == 1 && !w->ph && !w->pw && l->width == p->w;
    for (int oy = oy0; oy < oy1; oy++) {
        const int y = oy * w->sh - w->ph, first = (oy - oy0) * ow;
        const char **base = AT(const char *, base_at) + first;
        /* A copied band starts at input row y0, and its rows where padding starts; else there is no padding. */
        const char *start = l->copied ? AT(const char, rows_at) + (size_t)(y - y0) * (size_t)l->width * pixel
                                      : (const char *)(s->x + (y < 0 ? 0 : image_size(y % s->x_ring, p->w, p->c_in)));
        for (int ox = 0; ox < ow; ox++) base[ox] = start + (size_t)ox * step;

        uint8_t *border = AT(uint8_t, border_at) + first;
        memset(border, border_matters && (y < 0 || y + (w->kh - 1) * w->dh >= p->h), (size_t)ow);
        for (int ox = 0; border_matters && ox < ow && ox * w->sw < w->pw; ox++) border[ox] = 1;
        for (int ox = ow - 1; border_matters && ox >= 0 && ox * w->sw - w->pw + reach >= p->w; ox--) border[ox] = 1;

        for (int ox = 0; p->has_k && !l->by_tile && ox < ow; ox++)
            AT(float, scale_at)[first + ox] =
                plain_k && y < p->h && ox * w->sw < p->w
                    ? AT(float, k_at)[(size_t)(y - y0) * (size_t)p->w + (size_t)(ox * w->sw)]
                    : scale_of_input(l, AT(float, k_at), y0, oy, ox);

        for (int ox = 0; p->link_pool && ox < ow; ox++)
            pool_window(s, oy, ox, 0, p->link_c, AT(float, pooled_at) + (size_t)(first + ox) * (size_t)p->link_c);
    }
}

/* Accumulators of a tile of pixels, for channels c .. c + n. */
static void accumulate(const stage *s, int first, int tile, int group, int c, int n, int stride, int oy, int ox,
                       const char *ahead, size_t ahead_bytes) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const void *const *base = AT(const void *const, base_at) + first;
    if (l->depthwise && p->real) {
        const el_window *w = &p->conv;
        const float *taps[EL_MAX_TAPS];
        for (int q = 0; q < tile; q++) {
            int t = 0;
            for (int ky = 0; ky < w->kh; ky++)
                for (int kx = 0; kx < w->kw; kx++, t++) {
                    const int y = oy * w->sh - w->ph + ky * w->dh, x = ox * w->sw - w->pw + kx * w->dw;
                    taps[t] = y < 0 || y >= p->h || x < 0 || x >= p->w
                                  ? AT(float, zeros_at)
                                  : s->x + image_size(y % s->x_ring, p->w, p->c_in) + (size_t)x * (size_t)p->c_in;
                }
            el_body_active->dot_depthwise(taps, t, p->weight, round_up(p->c_out, 16), p->c_out,
                                AT(float, acc_at) + (size_t)q * (size_t)stride);
            if (++ox == p->ow) ox = 0, oy++;
        }
    } else if (l->depthwise) {
        for (int q = 0; q < tile; q++)
            el_body_active->count_depthwise(base[q], l->offsets, l->taps, l->tap, p->weight,
                                  AT(int32_t, acc_at) + (size_t)q * (size_t)stride);
    } else if (p->real) {
        el_body_active->dot((const float *const *)base, tile, l->offsets, l->segments, l->length,
                  (const float *)p->weight + (size_t)c * (size_t)l->taps * (size_t)l->tap, n, AT(float, acc_at), stride,
                  ahead, ahead_bytes);
    } else {
        const int og = p->c_out / p->groups, string = l->taps * l->tap;
        const uint64_t *starts[MOST_TILE];
        for (int q = 0; q < tile; q++) starts[q] = (const uint64_t *)base[q] + group * l->tap;
        const char *weight = (const char *)p->weight + (size_t)group * el_body_active->weight_size(string, og);
        el_body_active->count(starts, tile, l->offsets, l->segments, l->length,
                    weight + el_body_active->weight_size(string, c - group * og), n, AT(int32_t, acc_at), stride);
    }
}

/* Bring memory nearer that is needed next, a part for each tile of pixels: the i-th of all. */
static void fetch_ahead(const char *next, size_t bytes, int64_t i, int64_t tile, int64_t pixels) {
    const size_t to = bytes * (size_t)(i + tile) / (size_t)pixels;
    for (size_t at = bytes * (size_t)i / (size_t)pixels / 64 * 64; at < to; at += 64) __builtin_prefetch(next + at, 0, 2);
}

/* Output rows oy0 .. oy1, channels c0 .. c1. */
static void band(const stage *s, int oy0, int oy1, int y0, int c0, int c1) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    float *const y = s->y + image_size(oy0 % s->y_ring, p->ow, p->c_out);
    const float *const link = p->link_pool ? AT(float, pooled_at)
                              : p->link    ? s->link + image_size(oy0 % s->link_ring, p->link_w, p->link_c)
                                           : NULL;
    const float *const added = s->added ? s->added + image_size(oy0 % s->added_ring, p->ow, p->c_out) : NULL;
    const int pixels = (oy1 - oy0) * p->ow, groups = l->depthwise ? 1 : p->groups, og = p->c_out / groups;
    const int base = l->taps * (p->c_in / p->groups), most = p->real ? el_body_active->real_tile_pixels : el_body_active->tile_pixels;
    locate(s, oy0, oy1, y0);
    for (int c = c0; c < c1;) {
        const int group = c / og, end = (group + 1) * og < c1 ? (group + 1) * og : c1;
        const int n = end - c < l->chunk ? end - c : l->chunk, stride = round_up(n, EL_REAL_BLOCK);
        int oy = oy0, ox = 0;
        for (int i = 0; i < pixels; i += most) {
            const int tile = pixels - i < most ? pixels - i : most;
            int32_t *corrections = NULL;
            const char *ahead = p->weight;
            size_t ahead_bytes = 0;
            if (p->real && !l->depthwise && c + n < c1) { /* the next weights, while these are in use */
                const size_t row = (size_t)l->taps * (size_t)l->tap * sizeof(float);
                const size_t bytes = (size_t)(c1 - c - n < l->chunk ? c1 - c - n : l->chunk) * row;
                const size_t from = bytes * (size_t)i / (size_t)pixels;
                ahead += (size_t)(c + n) * row + from;
                ahead_bytes = bytes * (size_t)(i + tile) / (size_t)pixels - from;
            }
            if (l->by_tile && c == c0) take_tile(s, oy, ox, i, tile);
            accumulate(s, i, tile, group, c, n, stride, oy, ox, ahead, ahead_bytes);
            if (p->tap_sums && memchr(AT(uint8_t, border_at) + i, 1, (size_t)tile)) corrections = AT(int32_t, correction_at);
            for (int q = 0; q < tile; q++) {
                int32_t *row = corrections ? corrections + (size_t)q * (size_t)stride : NULL;
                if (row && AT(uint8_t, border_at)[i + q]) correct(p, oy, ox, c, c + n, row);
                else if (row) memset(row, 0, (size_t)n * sizeof *row);
                if (++ox == p->ow) ox = 0, oy++;
            }
            if (s->ahead && c == c0)
                fetch_ahead(s->ahead, s->ahead_bytes, (int64_t)oy0 * p->ow + i, tile, (int64_t)p->oh * p->ow);
            el_body_active->finish(p, AT(char, acc_at), stride, tile, corrections, base, AT(float, scale_at) + i,
                         link ? link + (size_t)i * (size_t)p->link_c : NULL, c, c + n,
                         added ? added + (size_t)i * (size_t)p->c_out : NULL, y + (size_t)i * (size_t)p->c_out);
        }
        c += n;
    }
}

/* The row before which a band that starts at `from` must end, so that its rows follow one another in memory. */
static int end_of_ring(int from, int ring) { return from - from % ring + ring; }

static void pool_rows(const stage *s, int from, int to, int c0, int c1) {
    const el_plan *p = s->l->p;
    for (int oy = from; oy < to; oy++) {
        float *y = s->y + image_size(oy % s->y_ring, p->ow, p->c_out) + c0;
        for (int ox = 0; ox < p->ow; ox++, y += p->c_out) pool_window(s, oy, ox, c0, c1, y);
    }
}

/* Output rows from .. to of the image, channels c0 .. c1. Rows of the input that the last call left are not taken again. */
void el_run_rows(stage *s, int from, int to, int c0, int c1) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_window *w = &p->conv;
    const size_t row_bytes = (size_t)l->width * (size_t)l->pixel * (p->real ? sizeof(float) : sizeof(uint64_t));
    if (p->is_pool) {
        pool_rows(s, from, to, c0, c1);
        return;
    }
    for (int oy0 = from, oy1; oy0 < to; oy0 = oy1) {
        oy1 = oy0 + l->band_rows < to ? oy0 + l->band_rows : to;
        if (oy1 > end_of_ring(oy0, s->y_ring)) oy1 = end_of_ring(oy0, s->y_ring);
        if (s->added && oy1 > end_of_ring(oy0, s->added_ring)) oy1 = end_of_ring(oy0, s->added_ring);
        if (p->link && !p->link_pool && oy1 > end_of_ring(oy0, s->link_ring)) oy1 = end_of_ring(oy0, s->link_ring);
        const int y0 = oy0 * w->sh - w->ph, y1 = (oy1 - 1) * w->sh - w->ph + (w->kh - 1) * w->dh + 1;
        if (l->copied && !l->by_tile) {
            int start = y0;
            if (s->taken_from <= y0 && y0 < s->taken_to) { /* the rows that two bands share move to the front */
                const size_t kept = (size_t)(s->taken_to - y0), gone = (size_t)(y0 - s->taken_from);
                memmove(AT(char, rows_at), AT(char, rows_at) + gone * row_bytes, kept * row_bytes);
                if (p->has_k)
                    memmove(AT(float, k_at), AT(float, k_at) + gone * (size_t)p->w, kept * (size_t)p->w * sizeof(float));
                start = s->taken_to;
            }
            take_rows(s, y0, start, y1);
            s->taken_from = y0;
            s->taken_to = start > y1 ? start : y1;
        }
        band(s, oy0, oy1, y0, c0, c1);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

void el_set_up(layer *l, const el_plan *p) {
    l->p = p;
    l->depthwise = is_depthwise(p);
    l->taps = p->conv.kh * p->conv.kw;
    l->tap = p->real ? p->c_in / p->groups : tap_words(p);
    l->pixel = p->real ? p->c_in : pixel_words(p);
    const int last = (p->ow - 1) * p->conv.sw - p->conv.pw + (p->conv.kw - 1) * p->conv.dw; /* column of the last tap */
    const int last_row = (p->oh - 1) * p->conv.sh - p->conv.ph + (p->conv.kh - 1) * p->conv.dh;
    const int padded = p->conv.ph || p->conv.pw || last >= p->w || last_row >= p->h;
    l->copied = !p->real || (!p->is_pool && !l->depthwise && (padded || p->conv.kh > 1));
    l->by_tile = !p->real && l->taps == 1 && p->groups == 1 && p->conv.sh == 1 && p->conv.sw == 1 && p->oh == p->h &&
                 p->ow == p->w && !p->conv.ph && !p->conv.pw;
    l->left = l->copied ? p->conv.pw : 0;
    l->width = l->left + (l->copied && last >= p->w ? last + 1 : p->w);
    const int whole_rows = p->conv.dw == 1 && l->pixel == l->tap && !l->depthwise; /* a kernel's row is one run */
    l->segments = whole_rows ? p->conv.kh : l->taps;
    l->length = whole_rows ? p->conv.kw * l->tap : l->tap;
    for (int i = 0; i < l->segments; i++) {
        const int ky = whole_rows ? i : i / p->conv.kw, kx = whole_rows ? 0 : i % p->conv.kw;
        l->offsets[i] = ((size_t)(ky * p->conv.dh) * (size_t)l->width + (size_t)(kx * p->conv.dw)) * (size_t)l->pixel;
    }
    const size_t unit = p->real ? sizeof(float) : sizeof(uint64_t);
    l->chunk = l->depthwise ? round_up(p->c_out, EL_REAL_BLOCK) : CHUNK;
    if (p->real && !l->depthwise) {
        const size_t fit = REAL_CHUNK_BYTES / ((size_t)l->taps * (size_t)l->tap * sizeof(float)) / EL_REAL_BLOCK;
        l->chunk = (int)(fit < 1 ? 1 : fit > 8 ? 8 : fit) * EL_REAL_BLOCK;
    }
    const int band_rows = (BAND_PIXELS + p->ow - 1) / p->ow;
    l->band_rows = band_rows < p->oh ? band_rows : p->oh;
    l->in_rows = (l->band_rows - 1) * p->conv.sh + (p->conv.kh - 1) * p->conv.dh + 1;
    if (l->in_rows < p->conv.kh) l->in_rows = p->conv.kh;

    const size_t pixels = (size_t)l->band_rows * (size_t)p->ow, tile = (size_t)MOST_TILE * (size_t)(l->chunk + 64) * 4;
    size_t at = 0;
    l->rows_at = at, at += l->copied ? aligned((size_t)l->in_rows * (size_t)l->width * (size_t)l->pixel * unit) : 0;
    l->k_at = at, at += p->has_k ? aligned((size_t)l->in_rows * (size_t)p->w * sizeof(float)) : 0;
    l->base_at = at, at += aligned(pixels * sizeof(void *));
    l->scale_at = at, at += aligned(pixels * sizeof(float));
    l->border_at = at, at += aligned(pixels);
    l->pooled_at = at, at += p->link_pool ? aligned(pixels * (size_t)p->link_c * sizeof(float)) : 0;
    l->zeros_at = at, at += aligned((size_t)round_up(p->c_in, 16) * sizeof(float));
    l->acc_at = at, at += aligned(tile);
    l->correction_at = at, at += p->tap_sums ? aligned(tile) : 0;
    l->bytes = at + 64;
}

void el_prepare(stage *s, const layer *l, char *scratch) {
    s->l = l;
    s->scratch = scratch;
    s->taken_from = s->taken_to = 0;
    if (l->depthwise && l->p->real) memset(AT(float, zeros_at), 0, (size_t)round_up(l->p->c_in, 16) * sizeof(float));
}

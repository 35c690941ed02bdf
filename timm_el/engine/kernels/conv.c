/* The convolution: which rows, which pixels, which channels, in which order. All arithmetic is in the bodies. */
#include "engine.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHUNK 512              /* binary output channels finished at a time: their counts stay in the first cache */
#define REAL_CHUNK_BYTES 262144 /* real weights used at a time: they stay in the second cache */
#define BAND_PIXELS 96         /* output pixels of a band, at least, if the image has them */
#define FEW_PIXELS 96          /* for one thread */
#define MOST_TILE 8
#define K_PIXELS 8             /* whose signs and means are taken while they are in the first cache */

static const el_body *body = &el_body_portable;
static size_t large_image_bytes = 1000000; /* half of what a core's second cache has these days */

static const el_body *const bodies[] = {
#if defined(__x86_64__) && defined(__GNUC__)
    &el_body_avx512, &el_body_avx2,
#elif defined(__aarch64__)
    &el_body_neon,
#endif
    &el_body_portable,
};
#define N_BODIES ((int)(sizeof bodies / sizeof *bodies))

int el_abi(void) { return EL_ABI; }

const char *el_bodies(void) {
    static char names[64];
    names[0] = 0;
    for (int i = 0; i < N_BODIES; i++)
        if (bodies[i]->supported()) {
            if (names[0]) strcat(names, " ");
            strcat(names, bodies[i]->name);
        }
    return names;
}

int el_use(const char *name) {
    for (int i = 0; i < N_BODIES; i++)
        if (!strcmp(bodies[i]->name, name) && bodies[i]->supported()) {
            body = bodies[i];
            return EL_OK;
        }
    return EL_BAD_PLAN;
}

void el_large_image(size_t bytes) { large_image_bytes = bytes; }

const char *el_active(void) { return body->name; }

double el_chip_rate(void) { return body->chip_rate(); }

/* ------------------------------------------------------------------------------------------------------------------ */

static int is_depthwise(const el_plan *p) { return p->groups > 1 && p->groups == p->c_in && p->c_out == p->c_in; }

static int words_for(int bits) { return (bits + 63) / 64; }

static int round_up(int n, int to) { return (n + to - 1) / to * to; }

static int bad_window(const el_window *w) {
    return w->kh < 1 || w->kw < 1 || w->sh < 1 || w->sw < 1 || w->ph < 0 || w->pw < 0 || w->dh < 1 || w->dw < 1;
}

/* Some place of a window along one axis has no pixel of the image. */
static int is_outside(int taps, int stride, int padding, int dilation, int size, int n) {
    for (int64_t o = 0; o < n; o++) {
        int64_t at = o * stride - padding;
        int t = 0;
        while (t < taps && at < 0) at += dilation, t++;
        if (t == taps || at >= size) return 1;
    }
    return 0;
}

/* Every window of a pool must have a pixel of the image. */
static int has_empty_window(const el_window *k, int h, int w, int oh, int ow) {
    return is_outside(k->kh, k->sh, k->ph, k->dh, h, oh) || is_outside(k->kw, k->sw, k->pw, k->dw, w, ow);
}

static int is_bad(const el_plan *p) {
    if (p->n < 0 || p->h < 1 || p->w < 1 || p->c_in < 1 || p->oh < 0 || p->ow < 0 || p->c_out < 1) return 1;
    if (bad_window(&p->conv) || (int64_t)p->conv.kh * p->conv.kw > EL_MAX_TAPS) return 1;
    if (p->groups < 1 || p->c_in % p->groups || p->c_out % p->groups) return 1;
    if (p->pad_value < -1 || p->pad_value > 1 || !p->table || !p->weight) return 1;
    if (p->table_stride % 16 || p->table_stride < p->c_out + 15) return 1;
    if (p->has_k && (p->groups != 1 || p->real)) return 1;
    if (p->real && p->groups > 1 && !is_depthwise(p)) return 1;
    if (p->act < 0 || p->act > EL_ACT_PRELU || p->link < 0 || p->link > EL_LINK_EXPAND) return 1;
    if (p->link_pool < 0 || p->link_pool > EL_POOL_AVG) return 1;
    if (!p->link) return 0;
    if (p->link_c < 1 || p->link_h < 1 || p->link_w < 1) return 1;
    if (p->link == EL_LINK_IDENTITY && p->link_c != p->c_out) return 1;
    if (p->link == EL_LINK_SQUEEZE && p->link_c < p->c_out) return 1;
    if (p->link_pool == EL_POOL_NONE) return p->link_h != p->oh || p->link_w != p->ow;
    if (bad_window(&p->pool) || (int64_t)p->pool.kh * p->pool.kw > EL_MAX_POOL) return 1;
    return has_empty_window(&p->pool, p->link_h, p->link_w, p->oh, p->ow);
}

/* Bits of one tap of one group, bits of one pixel, in words. */
static int tap_words(const el_plan *p) { return is_depthwise(p) ? words_for(p->c_in) : words_for(p->c_in / p->groups); }

static int pixel_words(const el_plan *p) { return is_depthwise(p) ? tap_words(p) : p->groups * tap_words(p); }

size_t el_weight_size(const el_plan *p) {
    const int taps = p->conv.kh * p->conv.kw;
    if (p->real) {
        if (is_depthwise(p)) return (size_t)taps * (size_t)round_up(p->c_out, 16) * sizeof(float);
        return (size_t)round_up(p->c_out, EL_REAL_BLOCK) * (size_t)taps * (size_t)p->c_in * sizeof(float);
    }
    if (is_depthwise(p)) return (size_t)taps * (size_t)tap_words(p) * sizeof(uint64_t);
    return (size_t)p->groups * body->weight_size(taps * tap_words(p), p->c_out / p->groups);
}

static size_t blocks_size(int words, int channels) {
    return (size_t)round_up(channels, EL_CHANNEL_BLOCK) * (size_t)words * sizeof(uint64_t);
}

int el_own_layout(void) { return body->lay_out != NULL; }

void el_lay_out(const el_plan *p, const void *stored, void *weight) {
    const int words = p->conv.kh * p->conv.kw * tap_words(p), og = p->c_out / p->groups;
    if (is_depthwise(p) || !body->lay_out) {
        memcpy(weight, stored, el_weight_size(p));
        return;
    }
    for (int g = 0; g < p->groups; g++)
        body->lay_out((const uint64_t *)(const void *)((const char *)stored + (size_t)g * blocks_size(words, og)), words, og,
                      (char *)weight + (size_t)g * body->weight_size(words, og));
}

/* (pad_value + 1) times the sum of each tap's weights, which are +1 where a bit is 1 and -1 elsewhere. */
void el_tap_sums(const el_plan *p, const void *stored, int32_t *sums) {
    const int taps = p->conv.kh * p->conv.kw, words = tap_words(p), og = p->c_out / p->groups, cg = p->c_in / p->groups;
    memset(sums, 0, (size_t)taps * (size_t)p->table_stride * sizeof(int32_t));
    for (int c = 0; c < p->c_out; c++)
        for (int t = 0; t < taps; t++) {
            int ones = 0;
            if (is_depthwise(p)) {
                ones = (int)(((const uint64_t *)stored)[t * words + c / 64] >> (c % 64) & 1);
            } else {
                const char *group = (const char *)stored + (size_t)(c / og) * blocks_size(taps * words, og);
                const uint64_t *channel = (const uint64_t *)(const void *)group +
                                          (size_t)(c % og / 8) * 8 * (size_t)(taps * words) + (size_t)(c % og % 8);
                for (int i = 0; i < words; i++) ones += __builtin_popcountll(channel[(size_t)(t * words + i) * 8]);
            }
            sums[(size_t)t * (size_t)p->table_stride + (size_t)c] = (p->pad_value + 1) * (2 * ones - cg);
        }
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* One layer of the work: the same for all threads. */
typedef struct {
    const el_plan *p;
    int depthwise, copied;    /* copied: the band's input is in the scratch, padded; else it is read where it is */
    int taps, tap, pixel;     /* words of a tap of a group, and of an input pixel; floats where real */
    int segments, length;     /* the runs of an output pixel's inputs */
    int left, width;          /* columns of zeros before a row, and columns of a row with its padding */
    int band_rows, in_rows;   /* output and input rows of a band */
    int chunk;                /* output channels at a time */
    size_t rows_at, k_at, base_at, links_at, scale_at, border_at, pooled_at, zeros_at, acc_at, correction_at, bytes;
    size_t offsets[EL_MAX_TAPS];
} layer;

/* One layer in one thread, in one image: where its rows are. x is input row x_row0, and so on. */
typedef struct {
    const layer *l;
    char *scratch;
    const float *x, *link, *added;
    float *y;
    int x_row0, link_row0, y_row0;
    int taken_from, taken_to; /* input rows that are in the scratch */
    const char *ahead;        /* weights of the layer that comes next, to be fetched while this one runs */
    size_t ahead_bytes;
} stage;

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
        const float *x = s->x + (size_t)(y - s->x_row0) * (size_t)p->w * (size_t)p->c_in;
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
                body->pack(x + g * cg, n, (size_t)p->c_in, p->threshold ? p->threshold + g * cg : NULL,
                           p->flip ? p->flip + g * cg : NULL, cg,
                           (uint64_t *)(void *)row + at * l->pixel + g * l->tap, (size_t)l->pixel);
            if (p->has_k) body->abs_mean(x, n, p->c_in, AT(float, k_at) + (size_t)(y - y0) * (size_t)p->w + at);
        }
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

/* One window of a pool, to `out`; x is row `row0` of an image of h x w pixels of c channels. */
static void pool_window(const float *x, int row0, int h, int w, int c, const el_window *k, int mode, int oy, int ox,
                        float *out) {
    const float *window[EL_MAX_POOL];
    int n = 0;
    for (int ky = 0; ky < k->kh; ky++) {
        const int iy = oy * k->sh - k->ph + ky * k->dh;
        if (iy < 0 || iy >= h) continue;
        for (int kx = 0; kx < k->kw; kx++) {
            const int ix = ox * k->sw - k->pw + kx * k->dw;
            if (ix >= 0 && ix < w) window[n++] = x + ((size_t)(iy - row0) * (size_t)w + (size_t)ix) * (size_t)c;
        }
    }
    body->pool(window, n, mode, c, out);
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
                                      : (const char *)s->x + (size_t)(y < 0 ? 0 : y - s->x_row0) * (size_t)p->w * pixel;
        for (int ox = 0; ox < ow; ox++) base[ox] = start + (size_t)ox * step;

        uint8_t *border = AT(uint8_t, border_at) + first;
        memset(border, border_matters && (y < 0 || y + (w->kh - 1) * w->dh >= p->h), (size_t)ow);
        for (int ox = 0; border_matters && ox < ow && ox * w->sw < w->pw; ox++) border[ox] = 1;
        for (int ox = ow - 1; border_matters && ox >= 0 && ox * w->sw - w->pw + reach >= p->w; ox--) border[ox] = 1;

        for (int ox = 0; p->has_k && ox < ow; ox++)
            AT(float, scale_at)[first + ox] =
                plain_k && y < p->h && ox * w->sw < p->w
                    ? AT(float, k_at)[(size_t)(y - y0) * (size_t)p->w + (size_t)(ox * w->sw)]
                    : scale_of_input(l, AT(float, k_at), y0, oy, ox);

        const float **links = AT(const float *, links_at) + first;
        for (int ox = 0; p->link_pool && ox < ow; ox++) {
            float *pooled = AT(float, pooled_at) + (size_t)(first + ox) * (size_t)p->link_c;
            pool_window(s->link, s->link_row0, p->link_h, p->link_w, p->link_c, &p->pool, p->link_pool, oy, ox, pooled);
            links[ox] = pooled;
        }
        if (!p->link || p->link_pool) continue;
        const float *link = s->link + (size_t)(oy - s->link_row0) * (size_t)p->link_w * (size_t)p->link_c;
        for (int ox = 0; ox < ow; ox++) links[ox] = link + (size_t)ox * (size_t)p->link_c;
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
                                  : s->x + ((size_t)(y - s->x_row0) * (size_t)p->w + (size_t)x) * (size_t)p->c_in;
                }
            body->dot_depthwise(taps, t, p->weight, round_up(p->c_out, 16), p->c_out,
                                AT(float, acc_at) + (size_t)q * (size_t)stride);
            if (++ox == p->ow) ox = 0, oy++;
        }
    } else if (l->depthwise) {
        for (int q = 0; q < tile; q++)
            body->count_depthwise(base[q], l->offsets, l->taps, l->tap, p->weight,
                                  AT(int32_t, acc_at) + (size_t)q * (size_t)stride);
    } else if (p->real) {
        body->dot((const float *const *)base, tile, l->offsets, l->segments, l->length,
                  (const float *)p->weight + (size_t)c * (size_t)l->taps * (size_t)l->tap, n, AT(float, acc_at), stride,
                  ahead, ahead_bytes);
    } else {
        const int og = p->c_out / p->groups, string = l->taps * l->tap;
        const uint64_t *starts[MOST_TILE];
        for (int q = 0; q < tile; q++) starts[q] = (const uint64_t *)base[q] + group * l->tap;
        const char *weight = (const char *)p->weight + (size_t)group * body->weight_size(string, og);
        body->count(starts, tile, l->offsets, l->segments, l->length,
                    weight + body->weight_size(string, c - group * og), n, AT(int32_t, acc_at), stride);
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
    const size_t place = (size_t)(oy0 - s->y_row0) * (size_t)p->ow * (size_t)p->c_out;
    const int pixels = (oy1 - oy0) * p->ow, groups = l->depthwise ? 1 : p->groups, og = p->c_out / groups;
    const int base = l->taps * (p->c_in / p->groups), most = p->real ? body->real_tile_pixels : body->tile_pixels;
    locate(s, oy0, oy1, y0);
    for (int c = c0; c < c1;) {
        const int group = c / og, end = (group + 1) * og < c1 ? (group + 1) * og : c1;
        const int n = end - c < l->chunk ? end - c : l->chunk, stride = round_up(n, EL_REAL_BLOCK);
        int oy = oy0, ox = 0;
        for (int i = 0; i < pixels; i += most) {
            const int tile = pixels - i < most ? pixels - i : most;
            const int32_t *corrections[MOST_TILE] = {NULL};
            const char *ahead = p->weight;
            size_t ahead_bytes = 0;
            if (p->real && !l->depthwise && c + n < c1) { /* the next weights, while these are in use */
                const size_t row = (size_t)l->taps * (size_t)l->tap * sizeof(float);
                const size_t bytes = (size_t)(c1 - c - n < l->chunk ? c1 - c - n : l->chunk) * row;
                const size_t from = bytes * (size_t)i / (size_t)pixels;
                ahead += (size_t)(c + n) * row + from;
                ahead_bytes = bytes * (size_t)(i + tile) / (size_t)pixels - from;
            }
            accumulate(s, i, tile, group, c, n, stride, oy, ox, ahead, ahead_bytes);
            for (int q = 0; q < tile; q++) {
                if (AT(uint8_t, border_at)[i + q]) {
                    int32_t *correction = AT(int32_t, correction_at) + (size_t)q * (size_t)stride;
                    correct(p, oy, ox, c, c + n, correction);
                    corrections[q] = correction;
                }
                if (++ox == p->ow) ox = 0, oy++;
            }
            if (s->ahead && c == c0)
                fetch_ahead(s->ahead, s->ahead_bytes, (int64_t)oy0 * p->ow + i, tile, (int64_t)p->oh * p->ow);
            body->finish(p, AT(char, acc_at), stride, tile, corrections, base, AT(float, scale_at) + i,
                         AT(const float *const, links_at) + i, c, c + n,
                         s->added ? s->added + place + (size_t)i * (size_t)p->c_out : NULL,
                         s->y + place + (size_t)i * (size_t)p->c_out);
        }
        c += n;
    }
}

/* Output rows from .. to of the image, channels c0 .. c1. Rows of the input that the last call left are not taken again. */
static void run_rows(stage *s, int from, int to, int c0, int c1) {
    const layer *l = s->l;
    const el_plan *p = l->p;
    const el_window *w = &p->conv;
    const size_t row_bytes = (size_t)l->width * (size_t)l->pixel * (p->real ? sizeof(float) : sizeof(uint64_t));
    for (int oy0 = from; oy0 < to; oy0 += l->band_rows) {
        const int oy1 = oy0 + l->band_rows < to ? oy0 + l->band_rows : to;
        const int y0 = oy0 * w->sh - w->ph, y1 = (oy1 - 1) * w->sh - w->ph + (w->kh - 1) * w->dh + 1;
        if (l->copied) {
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

static size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

static void set_up(layer *l, const el_plan *p) {
    l->p = p;
    l->depthwise = is_depthwise(p);
    l->taps = p->conv.kh * p->conv.kw;
    l->tap = p->real ? p->c_in / p->groups : tap_words(p);
    l->pixel = p->real ? p->c_in : pixel_words(p);
    const int last = (p->ow - 1) * p->conv.sw - p->conv.pw + (p->conv.kw - 1) * p->conv.dw; /* column of the last tap */
    const int last_row = (p->oh - 1) * p->conv.sh - p->conv.ph + (p->conv.kh - 1) * p->conv.dh;
    const int padded = p->conv.ph || p->conv.pw || last >= p->w || last_row >= p->h;
    l->copied = !p->real || (padded && !l->depthwise);
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
    l->links_at = at, at += aligned(pixels * sizeof(void *));
    l->scale_at = at, at += aligned(pixels * sizeof(float));
    l->border_at = at, at += aligned(pixels);
    l->pooled_at = at, at += p->link_pool ? aligned(pixels * (size_t)p->link_c * sizeof(float)) : 0;
    l->zeros_at = at, at += aligned((size_t)round_up(p->c_in, 16) * sizeof(float));
    l->acc_at = at, at += aligned(tile);
    l->correction_at = at, at += p->tap_sums ? aligned(tile) : 0;
    l->bytes = at + 64;
}

static void prepare(stage *s, const layer *l, char *scratch) {
    s->l = l;
    s->scratch = scratch;
    s->taken_from = s->taken_to = 0;
    if (l->depthwise && l->p->real) memset(AT(float, zeros_at), 0, (size_t)round_up(l->p->c_in, 16) * sizeof(float));
}

static size_t image_size(int h, int w, int c) { return (size_t)h * (size_t)w * (size_t)c; }

/* ------------------------------------------------------------------------------------------------------------------ */
/* One convolution on all threads. */

typedef struct {
    layer l;
    const float *x, *link, *added;
    float *y;
    const el_plan *next;   /* what runs after this, or NULL */
    int row_items, splits; /* the work is cut to row_items runs of rows times splits ranges of channels */
    atomic_int failed;
} conv_job;

static void conv_piece(void *context, int item) {
    conv_job *j = context;
    const el_plan *p = j->l.p;
    char *scratch = el_scratch(EL_SLOT_BAND, j->l.bytes);
    if (!scratch) {
        atomic_store(&j->failed, 1);
        return;
    }
    const int64_t rows = (int64_t)p->n * p->oh;
    const int part = item / j->splits, split = item % j->splits;
    const int64_t from = rows * part / j->row_items, to = rows * (part + 1) / j->row_items;
    const int blocks = (p->c_out + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK;
    const int c0 = (int)((int64_t)blocks * split / j->splits) * EL_REAL_BLOCK;
    int c1 = (int)((int64_t)blocks * (split + 1) / j->splits) * EL_REAL_BLOCK;
    if (c1 > p->c_out) c1 = p->c_out;
    stage s = {0};
    if (j->next && item == 0) {
        s.ahead = j->next->weight;
        s.ahead_bytes = el_weight_size(j->next);
    }
    for (int64_t row = from; row < to;) {
        const size_t image = (size_t)(row / p->oh);
        const int oy0 = (int)(row % p->oh), oy1 = to - row < p->oh - oy0 ? oy0 + (int)(to - row) : p->oh;
        prepare(&s, &j->l, scratch);
        s.x = j->x + image * image_size(p->h, p->w, p->c_in);
        if (p->link) s.link = j->link + image * image_size(p->link_h, p->link_w, p->link_c);
        s.y = j->y + image * image_size(p->oh, p->ow, p->c_out);
        if (j->added) s.added = j->added + image * image_size(p->oh, p->ow, p->c_out);
        run_rows(&s, oy0, oy1, c0, c1);
        row += oy1 - oy0;
    }
}

static int run_conv(const el_plan *p, const el_plan *next, const float *x, const float *link, const float *added, float *y,
                    int threads) {
    if (is_bad(p) || !x || !y || (p->link && !link)) return EL_BAD_PLAN;
    if ((int64_t)p->n * p->oh * p->ow == 0) return EL_OK;
    conv_job j = {.x = x, .link = link, .added = added, .y = y, .next = next, .row_items = 1, .splits = 1};
    atomic_init(&j.failed, 0);
    set_up(&j.l, p);
    /* Few pixels: threads share the output channels. Many: they share the rows. */
    const int64_t rows = (int64_t)p->n * p->oh;
    const int blocks = (p->c_out + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK;
    if (threads > 1) {
        if (!j.l.depthwise && p->groups == 1 && rows * p->ow < (int64_t)FEW_PIXELS * threads && blocks >= threads)
            j.splits = threads;
        else
            j.row_items = (int)(rows < threads ? rows : threads);
    }
    el_parallel(conv_piece, &j, j.row_items * j.splits, threads);
    return atomic_load(&j.failed) ? EL_NO_MEMORY : EL_OK;
}

int el_conv(const el_plan *p, const float *x, const float *link, const float *added, float *y, int threads) {
    return run_conv(p, NULL, x, link, added, y, threads);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Several convolutions, a few rows of each at a time. */

typedef struct {
    layer l[EL_MAX_CHAIN];
    size_t scratch_at[EL_MAX_CHAIN], out_at[EL_MAX_CHAIN], bytes;
    int out_rows[EL_MAX_CHAIN]; /* rows that the output buffer of a layer holds */
    int n, row_items;
    const float *x, *added;
    float *y;
    atomic_int failed;
} chain_job;

/* Input rows that output rows from .. to need. */
static void rows_for(const el_plan *p, int from, int to, int *first, int *last) {
    const el_window *w = &p->conv;
    *first = from * w->sh - w->ph;
    *last = (to - 1) * w->sh - w->ph + (w->kh - 1) * w->dh + 1;
    if (p->link) {
        int a = from, b = to;
        if (p->link_pool) {
            a = from * p->pool.sh - p->pool.ph;
            b = (to - 1) * p->pool.sh - p->pool.ph + (p->pool.kh - 1) * p->pool.dh + 1;
        }
        if (a < *first) *first = a;
        if (b > *last) *last = b;
    }
    if (*first < 0) *first = 0;
    if (*last > p->h) *last = p->h;
}

/* Input rows that any `rows` output rows need, at most. */
static int rows_span(const el_plan *p, int rows) {
    const el_window *w = &p->conv, *pool = &p->pool;
    int before = w->ph, after = (w->kh - 1) * w->dh - w->ph;
    if (p->link) {
        const int link_before = p->link_pool ? pool->ph : 0, link_after = p->link_pool ? (pool->kh - 1) * pool->dh - pool->ph : 0;
        if (link_before > before) before = link_before;
        if (link_after > after) after = link_after;
    }
    const int span = (rows - 1) * w->sh + before + after + 1;
    return span < p->h ? span : p->h;
}

/* Make output rows from .. to of layer i, and all that they need; rows that are there are kept. */
static void make_rows(chain_job *j, stage *stages, int *have, int i, int from, int to) {
    stage *s = stages + i;
    const el_plan *p = s->l->p;
    const size_t row = (size_t)p->ow * (size_t)p->c_out;
    if (i + 1 < j->n) { /* the output is a window of rows: y_row0 .. have[i] */
        if (from > s->y_row0) {
            if (have[i] > from)
                memmove(s->y, s->y + (size_t)(from - s->y_row0) * row, (size_t)(have[i] - from) * row * sizeof(float));
            else
                have[i] = from;
            s->y_row0 = from;
        }
        if (have[i] >= to) return;
        from = have[i];
        if (to - s->y_row0 > j->out_rows[i]) { /* cannot be: rows_span() says so */
            atomic_store(&j->failed, 1);
            return;
        }
    }
    if (i > 0) {
        int first, last;
        rows_for(p, from, to, &first, &last);
        make_rows(j, stages, have, i - 1, first, last);
        s->x = s->link = stages[i - 1].y;
        s->x_row0 = s->link_row0 = stages[i - 1].y_row0;
    }
    run_rows(s, from, to, 0, p->c_out);
    have[i] = to;
}

static void chain_piece(void *context, int item) {
    chain_job *j = context;
    const el_plan *first = j->l[0].p, *last = j->l[j->n - 1].p;
    char *scratch = el_scratch(EL_SLOT_BAND, j->bytes);
    if (!scratch) {
        atomic_store(&j->failed, 1);
        return;
    }
    const int64_t rows = (int64_t)last->n * last->oh;
    const int64_t from = rows * item / j->row_items, to = rows * (item + 1) / j->row_items;
    stage stages[EL_MAX_CHAIN] = {{0}};
    int have[EL_MAX_CHAIN];
    for (int64_t row = from; row < to;) {
        const size_t image = (size_t)(row / last->oh), out = image * image_size(last->oh, last->ow, last->c_out);
        const int oy0 = (int)(row % last->oh), oy1 = to - row < last->oh - oy0 ? oy0 + (int)(to - row) : last->oh;
        for (int i = 0; i < j->n; i++) {
            prepare(stages + i, j->l + i, scratch + j->scratch_at[i]);
            stages[i].y = (float *)(void *)(scratch + j->out_at[i]);
            stages[i].y_row0 = have[i] = 0;
        }
        stages[0].x = stages[0].link = j->x + image * image_size(first->h, first->w, first->c_in);
        stages[j->n - 1].y = j->y + out;
        if (j->added) stages[j->n - 1].added = j->added + out;
        const int step = j->l[j->n - 1].band_rows;
        for (int oy = oy0; oy < oy1; oy += step)
            make_rows(j, stages, have, j->n - 1, oy, oy + step < oy1 ? oy + step : oy1);
        row += oy1 - oy0;
    }
}

/* A few rows of each layer at a time pay where images do not fit into a core's cache and threads have rows to share. */
static int is_large(const el_plan *const *plans, int n, int threads) {
    size_t most = image_size(plans[0]->h, plans[0]->w, plans[0]->c_in);
    for (int i = 0; i < n; i++) {
        const size_t size = image_size(plans[i]->oh, plans[i]->ow, plans[i]->c_out);
        if (size > most) most = size;
    }
    for (int i = 0; i < n; i++) /* rows of input and link go hand in hand */
        if (plans[i]->link && plans[i]->conv.sh != (plans[i]->link_pool ? plans[i]->pool.sh : 1)) return 0;
    const el_plan *last = plans[n - 1];
    return most * sizeof(float) > large_image_bytes && (threads == 1 || (int64_t)last->n * last->oh >= 8 * threads);
}

static int run_as_one(const el_plan *const *plans, int n, const float *x, const float *added, float *y, int threads) {
    chain_job *j = malloc(sizeof *j);
    if (!j) return EL_NO_MEMORY;
    j->n = n;
    j->x = x;
    j->added = added;
    j->y = y;
    atomic_init(&j->failed, 0);
    int rows = 0;
    size_t at = 0;
    for (int i = n - 1; i >= 0; i--) {
        set_up(&j->l[i], plans[i]);
        j->scratch_at[i] = at, at += aligned(j->l[i].bytes);
        /* What layer i + 1 asks for at once, and what it may still hold of the call before. */
        j->out_at[i] = at;
        if (i + 1 < n) at += aligned((size_t)rows * (size_t)plans[i]->ow * (size_t)plans[i]->c_out * sizeof(float));
        else rows = j->l[i].band_rows;
        j->out_rows[i] = rows;
        rows = rows_span(plans[i], rows);
    }
    j->bytes = at + 64;
    const int64_t all = (int64_t)plans[n - 1]->n * plans[n - 1]->oh;
    j->row_items = (int)(all < threads ? all : threads);
    el_parallel(chain_piece, j, j->row_items, threads);
    const int failed = atomic_load(&j->failed);
    free(j);
    return failed ? EL_NO_MEMORY : EL_OK;
}

int el_chain(const el_plan *const *plans, int n, const float *x, const float *added, float *y, int threads) {
    if (n < 1 || n > EL_MAX_CHAIN || !x || !y) return EL_BAD_PLAN;
    for (int i = 0; i < n; i++) {
        const el_plan *p = plans[i], *before = plans[i ? i - 1 : 0];
        if (is_bad(p) || (p->link && (p->link_h != p->h || p->link_w != p->w || p->link_c != p->c_in))) return EL_BAD_PLAN;
        if (i && (p->n != before->n || p->h != before->oh || p->w != before->ow || p->c_in != before->c_out))
            return EL_BAD_PLAN;
        if ((int64_t)p->n * p->oh * p->ow == 0) return EL_OK;
    }
    if (is_large(plans, n, threads)) return run_as_one(plans, n, x, added, y, threads);
    for (int i = 0; i < n; i++) {
        const el_plan *p = plans[i];
        float *out = y;
        if (i + 1 < n) {
            out = el_scratch(i % 2 ? EL_SLOT_ODD : EL_SLOT_EVEN,
                             (size_t)p->n * image_size(p->oh, p->ow, p->c_out) * sizeof(float));
            if (!out) return EL_NO_MEMORY;
        }
        const int failed = run_conv(p, i + 1 < n ? plans[i + 1] : NULL, x, x, i + 1 == n ? added : NULL, out, threads);
        if (failed) return failed;
        x = out;
    }
    return EL_OK;
}

/* ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    const float *x;
    float *y;
    const el_window *window;
    int n, h, w, c, mode, oh, ow, items;
} pool_job;

static void pool_piece(void *context, int item) {
    const pool_job *j = context;
    const int64_t rows = (int64_t)j->n * j->oh, to = rows * (item + 1) / j->items;
    for (int64_t row = rows * item / j->items; row < to; row++)
        for (int ox = 0; ox < j->ow; ox++)
            pool_window(j->x + (size_t)(row / j->oh) * image_size(j->h, j->w, j->c), 0, j->h, j->w, j->c, j->window, j->mode,
                        (int)(row % j->oh), ox, j->y + ((size_t)row * (size_t)j->ow + (size_t)ox) * (size_t)j->c);
}

int el_pool(const float *x, int n, int h, int w, int c, const el_window *window, int mode, int oh, int ow, float *y,
            int threads) {
    if (!x || !y || n < 0 || h < 1 || w < 1 || c < 1 || oh < 1 || ow < 1 || bad_window(window)) return EL_BAD_PLAN;
    if (mode != EL_POOL_MAX && mode != EL_POOL_AVG) return EL_BAD_PLAN;
    if ((int64_t)window->kh * window->kw > EL_MAX_POOL || has_empty_window(window, h, w, oh, ow)) return EL_BAD_PLAN;
    const int64_t rows = (int64_t)n * oh;
    pool_job j = {x, y, window, n, h, w, c, mode, oh, ow, (int)(rows < threads ? rows : threads)};
    if (rows) el_parallel(pool_piece, &j, j.items, threads);
    return EL_OK;
}

void el_nhwc(const float *nchw, int n, int c, int64_t pixels, float *nhwc) {
    for (int i = 0; i < n; i++, nchw += (int64_t)c * pixels)
        for (int64_t p = 0; p < pixels; p++)
            for (int k = 0; k < c; k++) *nhwc++ = nchw[k * pixels + p];
}

double el_count_time(int words, int channels, int pixels, int repeats) {
    if (words < 1 || channels < 1 || pixels < 1 || repeats < 1) return 0.;
    const int stride = round_up(channels, EL_REAL_BLOCK);
    const size_t start = 0;
    uint64_t *rows = malloc(((size_t)channels + (size_t)pixels) * (size_t)words * 8);
    void *weight = aligned_alloc(64, aligned(body->weight_size(words, channels)));
    int32_t *counts = malloc((size_t)MOST_TILE * (size_t)stride * sizeof(int32_t));
    double seconds = 0.;
    if (rows && weight && counts) {
        uint64_t seed = 88172645463325252u;
        for (size_t i = 0; i < ((size_t)channels + (size_t)pixels) * (size_t)words; i++) {
            seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
            rows[i] = seed;
        }
        if (body->lay_out) body->lay_out(rows, words, channels, weight);
        else memcpy(weight, rows, (size_t)channels / 8 * 8 * (size_t)words * 8);
        const uint64_t *x = rows + (size_t)channels * (size_t)words;
        struct timespec a, b;
        for (int r = 0; r < repeats; r++) {
            clock_gettime(CLOCK_MONOTONIC, &a);
            for (int i = 0; i < pixels; i += body->tile_pixels) {
                const uint64_t *strings[MOST_TILE];
                const int m = pixels - i < body->tile_pixels ? pixels - i : body->tile_pixels;
                for (int q = 0; q < m; q++) strings[q] = x + (size_t)(i + q) * (size_t)words;
                body->count(strings, m, &start, 1, words, weight, channels, counts, stride);
            }
            clock_gettime(CLOCK_MONOTONIC, &b);
            const double now = (double)(b.tv_sec - a.tv_sec) + 1e-9 * (double)(b.tv_nsec - a.tv_nsec);
            if (r == 0 || now < seconds) seconds = now;
        }
    }
    free(rows);
    free(weight);
    free(counts);
    return seconds;
}

/* The convolution: which rows, which pixels, which channels, in which order. All arithmetic is in the bodies. */
#include "engine.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHUNK 512              /* binary output channels finished at a time: their counts stay in the first cache */
#define REAL_CHUNK_BYTES 262144 /* real weights used at a time: they stay in the second cache */
#define BAND_PIXELS 96         /* output pixels of a band, at least, if the image has them */
#define MOST_TILE 8

static const el_body *body = &el_body_portable;

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

const char *el_active(void) { return body->name; }

double el_chip_rate(void) { return body->chip_rate(); }

/* ------------------------------------------------------------------------------------------------------------------ */

static int is_depthwise(const el_plan *p) { return p->groups > 1 && p->groups == p->c_in && p->c_out == p->c_in; }

static int words_for(int bits) { return (bits + 63) / 64; }

static int round_up(int n, int to) { return (n + to - 1) / to * to; }

static int bad_window(const el_window *w) {
    return w->kh < 1 || w->kw < 1 || w->sh < 1 || w->sw < 1 || w->ph < 0 || w->pw < 0 || w->dh < 1 || w->dw < 1;
}

static int is_bad(const el_plan *p) {
    if (p->n < 0 || p->h < 1 || p->w < 1 || p->c_in < 1 || p->oh < 0 || p->ow < 0 || p->c_out < 1) return 1;
    if (bad_window(&p->conv) || (int64_t)p->conv.kh * p->conv.kw > EL_MAX_TAPS) return 1;
    if (p->groups < 1 || p->c_in % p->groups || p->c_out % p->groups) return 1;
    if (p->pad_value < -1 || p->pad_value > 1 || !p->table || !p->weight) return 1;
    if (p->table_stride % 16 || p->table_stride < p->c_out) return 1;
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
    /* Every window of the pool must have a pixel of the image: its first and its last one have. */
    int64_t last_h = (int64_t)(p->oh - 1) * p->pool.sh - p->pool.ph, last_w = (int64_t)(p->ow - 1) * p->pool.sw - p->pool.pw;
    return last_h >= p->link_h || last_w >= p->link_w || (p->pool.kh - 1) * p->pool.dh < p->pool.ph ||
           (p->pool.kw - 1) * p->pool.dw < p->pool.pw;
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

/* From (O, kH, kW, ceil(I / 8)) bytes, least significant bit first. */
int el_prepack(const el_plan *p, const uint8_t *bits, void *weight, int32_t *tap_sums) {
    const int taps = p->conv.kh * p->conv.kw, cg = p->c_in / p->groups, og = p->c_out / p->groups;
    const int bytes = (cg + 7) / 8, words = tap_words(p), depthwise = is_depthwise(p);
    const size_t row = (size_t)taps * (size_t)words;
    uint64_t *rows = NULL;
    if (depthwise) memset(weight, 0, el_weight_size(p));
    else if (!(rows = malloc((size_t)og * row * sizeof(uint64_t)))) return EL_NO_MEMORY;
    if (tap_sums) memset(tap_sums, 0, (size_t)taps * (size_t)p->table_stride * sizeof(int32_t));
    for (int g = 0; g < p->groups; g++) {
        if (rows) memset(rows, 0, (size_t)og * row * sizeof(uint64_t));
        for (int o = 0; o < og; o++)
            for (int t = 0; t < taps; t++) {
                const int c = g * og + o;
                const uint8_t *source = bits + ((size_t)c * (size_t)taps + (size_t)t) * (size_t)bytes;
                int ones = 0;
                for (int i = 0; i < cg; i++) {
                    const uint64_t bit = source[i / 8] >> (i % 8) & 1;
                    ones += (int)bit;
                    if (depthwise) ((uint64_t *)weight)[(size_t)t * (size_t)words + (size_t)(c / 64)] |= bit << (c % 64);
                    else rows[(size_t)o * row + (size_t)t * (size_t)words + (size_t)(i / 64)] |= bit << (i % 64);
                }
                if (tap_sums)
                    tap_sums[(size_t)t * (size_t)p->table_stride + (size_t)c] = (p->pad_value + 1) * (2 * ones - cg);
            }
        if (rows) body->prepack(rows, (int)row, og, (char *)weight + (size_t)g * body->weight_size((int)row, og));
    }
    free(rows);
    return EL_OK;
}

int el_prepack_real(const el_plan *p, const float *oihw, float *weight) {
    const int taps = p->conv.kh * p->conv.kw, cg = p->c_in / p->groups, depthwise = is_depthwise(p);
    memset(weight, 0, el_weight_size(p));
    for (int o = 0; o < p->c_out; o++)
        for (int i = 0; i < cg; i++)
            for (int t = 0; t < taps; t++) {
                const float value = oihw[((size_t)o * (size_t)cg + (size_t)i) * (size_t)taps + (size_t)t];
                if (depthwise) {
                    weight[(size_t)t * (size_t)round_up(p->c_out, 16) + (size_t)o] = value;
                } else {
                    const size_t k = (size_t)t * (size_t)cg + (size_t)i, all = (size_t)taps * (size_t)cg;
                    weight[(size_t)(o / EL_REAL_BLOCK) * EL_REAL_BLOCK * all + k * EL_REAL_BLOCK + (size_t)(o % EL_REAL_BLOCK)] = value;
                }
            }
    return EL_OK;
}

/* ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    const el_plan *p;
    const el_tensors *t;
    int depthwise, direct;    /* direct: a pixel's string is its own packed, or real, input; nothing to gather */
    int taps, tap, pixel;     /* words of a tap of a group, and of an input pixel; floats where real */
    int string;               /* words, or floats, of an output pixel's string for one group */
    int band_rows, in_rows;   /* output and input rows of a band */
    int row_items, splits;    /* the work is cut to row_items * splits pieces */
    int chunk;                /* output channels at a time */
    size_t bits_at, k_at, panel_at, pooled_at, acc_at, correction_at, bytes; /* in the scratch */
    atomic_int failed;
} job;

/* Rows of the band from input row y0 on: signs, and sums of abs(x). Rows outside the image are not touched. */
static void pack_rows(const job *j, int image, int y0, int from, int to, uint64_t *bits, float *k) {
    const el_plan *p = j->p;
    const int groups = j->depthwise ? 1 : p->groups, cg = p->c_in / groups;
    for (int y = from; y < to; y++) {
        if (y < 0 || y >= p->h) continue;
        const float *x = j->t->x + ((size_t)image * (size_t)p->h + (size_t)y) * (size_t)p->w * (size_t)p->c_in;
        uint64_t *out = bits + (size_t)(y - y0) * (size_t)p->w * (size_t)j->pixel;
        for (int i = 0; i < p->w; i++) {
            for (int g = 0; g < groups; g++)
                body->pack(x + g * cg, p->threshold ? p->threshold + g * cg : NULL, p->flip ? p->flip + g * cg : NULL,
                           cg, out + g * j->tap);
            if (p->has_k) k[(size_t)(y - y0) * (size_t)p->w + (size_t)i] = body->abs_sum(x, p->c_in) / (float)p->c_in;
            x += p->c_in;
            out += j->pixel;
        }
    }
}

/* Mean of abs(x) over channels and taps; taps outside the image are zeros. */
static float scale_of_input(const job *j, const float *k, int y0, int oy, int ox) {
    const el_window *w = &j->p->conv;
    float sum = 0.f;
    for (int ky = 0; ky < w->kh; ky++) {
        const int y = oy * w->sh - w->ph + ky * w->dh;
        if (y < 0 || y >= j->p->h) continue;
        for (int kx = 0; kx < w->kw; kx++) {
            const int x = ox * w->sw - w->pw + kx * w->dw;
            if (x >= 0 && x < j->p->w) sum = sum + k[(size_t)(y - y0) * (size_t)j->p->w + (size_t)x];
        }
    }
    return sum / (float)j->taps;
}

/* The taps of one output pixel side by side, zeros where they are outside the image; `size` bytes a tap. */
static void gather(const job *j, const char *rows, int y0, size_t size, size_t pixel, int oy, int ox, char *out) {
    const el_plan *p = j->p;
    const el_window *w = &p->conv;
    for (int ky = 0; ky < w->kh; ky++) {
        const int y = oy * w->sh - w->ph + ky * w->dh, x0 = ox * w->sw - w->pw;
        const int inside = y >= 0 && y < p->h;
        if (inside && w->dw == 1 && size == pixel && x0 >= 0 && x0 + w->kw <= p->w) {
            memcpy(out, rows + ((size_t)(y - y0) * (size_t)p->w + (size_t)x0) * pixel, size * (size_t)w->kw);
            out += size * (size_t)w->kw;
            continue;
        }
        for (int kx = 0; kx < w->kw; kx++, out += size) {
            const int x = x0 + kx * w->dw;
            if (inside && x >= 0 && x < p->w)
                memcpy(out, rows + ((size_t)(y - y0) * (size_t)p->w + (size_t)x) * pixel, size);
            else
                memset(out, 0, size);
        }
    }
}

/* What padding changes in the dot products of one pixel; 0 if it has no tap outside the image. */
static int correct(const job *j, int oy, int ox, int c0, int c1, int32_t *out) {
    const el_plan *p = j->p;
    const el_window *w = &p->conv;
    int found = 0;
    for (int ky = 0; ky < w->kh; ky++)
        for (int kx = 0; kx < w->kw; kx++) {
            const int y = oy * w->sh - w->ph + ky * w->dh, x = ox * w->sw - w->pw + kx * w->dw;
            if (y >= 0 && y < p->h && x >= 0 && x < p->w) continue;
            const int32_t *sums = p->tap_sums + (size_t)(ky * w->kw + kx) * (size_t)p->table_stride + c0;
            if (found++)
                for (int c = 0; c < c1 - c0; c++) out[c] += sums[c];
            else
                memcpy(out, sums, sizeof(int32_t) * (size_t)(c1 - c0));
        }
    return found;
}

/* The pixel that the link adds, pooled into `pooled` if need be. */
static const float *link_row(const job *j, int image, int oy, int ox, float *pooled) {
    const el_plan *p = j->p;
    const size_t c = (size_t)p->link_c;
    const float *x = j->t->link + (size_t)image * (size_t)p->link_h * (size_t)p->link_w * c;
    if (!p->link_pool) return x + ((size_t)oy * (size_t)p->link_w + (size_t)ox) * c;
    const float *window[EL_MAX_POOL];
    int n = 0;
    for (int ky = 0; ky < p->pool.kh; ky++) {
        const int y = oy * p->pool.sh - p->pool.ph + ky * p->pool.dh;
        if (y < 0 || y >= p->link_h) continue;
        for (int kx = 0; kx < p->pool.kw; kx++) {
            const int xx = ox * p->pool.sw - p->pool.pw + kx * p->pool.dw;
            if (xx >= 0 && xx < p->link_w) window[n++] = x + ((size_t)y * (size_t)p->link_w + (size_t)xx) * c;
        }
    }
    body->pool(window, n, p->link_pool, p->link_c, pooled);
    return pooled;
}

/* Output rows oy0 .. oy1 of one image, channels c0 .. c1. */
static void band(const job *j, char *scratch, int image, int oy0, int oy1, int y0, int c0, int c1) {
    const el_plan *p = j->p;
    const uint64_t *bits = (const uint64_t *)(void *)(scratch + j->bits_at);
    const float *k = (const float *)(void *)(scratch + j->k_at);
    const float *image_x = j->t->x + (size_t)image * (size_t)p->h * (size_t)p->w * (size_t)p->c_in;
    int32_t *correction = (int32_t *)(void *)(scratch + j->correction_at);
    char *acc = scratch + j->acc_at;
    const int pixels = (oy1 - oy0) * p->ow, og = p->c_out / p->groups;
    const int base = j->taps * (p->c_in / p->groups);
    const size_t unit = p->real ? sizeof(float) : sizeof(uint64_t);
    const int padded = p->tap_sums != NULL;
    float *y = j->t->y + ((size_t)image * (size_t)p->oh + (size_t)oy0) * (size_t)p->ow * (size_t)p->c_out;

    for (int i = 0; p->link_pool && i < pixels; i++)
        link_row(j, image, oy0 + i / p->ow, i % p->ow,
                 (float *)(void *)(scratch + j->pooled_at) + (size_t)i * (size_t)p->link_c);

#define LINK(i) (!p->link ? NULL : p->link_pool                                                             \
                 ? (const float *)(void *)(scratch + j->pooled_at) + (size_t)(i) * (size_t)p->link_c         \
                 : link_row(j, image, oy0 + (i) / p->ow, (i) % p->ow, NULL))

    if (j->depthwise) {
        const void *taps[EL_MAX_TAPS];
        for (int i = 0; i < pixels; i++) {
            const int oy = oy0 + i / p->ow, ox = i % p->ow;
            int t = 0;
            for (int ky = 0; ky < p->conv.kh; ky++)
                for (int kx = 0; kx < p->conv.kw; kx++, t++) {
                    const int yy = oy * p->conv.sh - p->conv.ph + ky * p->conv.dh;
                    const int xx = ox * p->conv.sw - p->conv.pw + kx * p->conv.dw;
                    if (yy < 0 || yy >= p->h || xx < 0 || xx >= p->w)
                        taps[t] = p->real ? NULL : scratch + j->panel_at; /* zeros */
                    else if (p->real)
                        taps[t] = image_x + ((size_t)yy * (size_t)p->w + (size_t)xx) * (size_t)p->c_in;
                    else
                        taps[t] = bits + ((size_t)(yy - y0) * (size_t)p->w + (size_t)xx) * (size_t)j->pixel;
                }
            int corrected = 0;
            if (p->real) {
                body->dot_depthwise((const float *const *)taps, t, p->weight, round_up(p->c_out, 16), p->c_out,
                                    (float *)(void *)acc);
            } else {
                body->count_depthwise((const uint64_t *const *)taps, t, p->weight, j->tap, (int32_t *)(void *)acc);
                corrected = padded && correct(j, oy, ox, 0, p->c_out, correction);
            }
            body->finish(p, acc, corrected ? correction : NULL, base, 0.f, LINK(i), 0, p->c_out,
                         y + (size_t)i * (size_t)p->c_out);
        }
        return;
    }

    char *panel = scratch + j->panel_at;
    const size_t string = (size_t)j->string * unit;
    for (int g = 0; g < p->groups; g++) {
        const int from = g * og > c0 ? g * og : c0, to = (g + 1) * og < c1 ? (g + 1) * og : c1;
        if (from >= to) continue;
        const char *rows = p->real ? (const char *)image_x : (const char *)(bits + g * j->tap);
        const int row0 = p->real ? 0 : y0;
        const size_t pixel = (size_t)(p->real ? p->c_in : j->pixel) * unit;
        if (!j->direct)
            for (int i = 0; i < pixels; i++)
                gather(j, rows, row0, (size_t)j->tap * unit, pixel, oy0 + i / p->ow, i % p->ow, panel + (size_t)i * string);
        const char *weight = (const char *)p->weight;
        if (!p->real) weight += (size_t)g * body->weight_size(j->string, og);
        for (int c = from; c < to; c += j->chunk) {
            const int n = to - c < j->chunk ? to - c : j->chunk;
            const int stride = round_up(n, EL_REAL_BLOCK);
            const int tile = p->real ? body->real_tile_pixels : body->tile_pixels;
            for (int i = 0; i < pixels; i += tile) {
                const int m = pixels - i < tile ? pixels - i : tile;
                const void *strings[MOST_TILE];
                for (int q = 0; q < m; q++) {
                    const int oy = oy0 + (i + q) / p->ow, ox = (i + q) % p->ow;
                    strings[q] = !j->direct ? panel + (size_t)(i + q) * string
                                            : rows + ((size_t)(oy * p->conv.sh - row0) * (size_t)p->w +
                                                      (size_t)(ox * p->conv.sw)) * pixel;
                }
                if (p->real)
                    body->dot((const float *const *)strings, m, j->string,
                              (const float *)(const void *)weight + (size_t)c * (size_t)j->string, n,
                              (float *)(void *)acc, stride);
                else
                    body->count((const uint64_t *const *)strings, m, j->string,
                                weight + body->weight_size(j->string, c - g * og), n, (int32_t *)(void *)acc, stride);
                for (int q = 0; q < m; q++) {
                    const int oy = oy0 + (i + q) / p->ow, ox = (i + q) % p->ow;
                    const int corrected = padded && correct(j, oy, ox, c, c + n, correction);
                    body->finish(p, acc + (size_t)q * (size_t)stride * 4, corrected ? correction : NULL, base,
                                 p->has_k ? scale_of_input(j, k, y0, oy, ox) : 0.f, LINK(i + q), c, c + n,
                                 y + (size_t)(i + q) * (size_t)p->c_out);
                }
            }
        }
    }
#undef LINK
}

/* One piece of the work: a run of output rows of the whole batch, a range of channels. */
static void piece(void *context, int item) {
    job *j = context;
    const el_plan *p = j->p;
    char *scratch = el_scratch(j->bytes);
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
    uint64_t *bits = (uint64_t *)(void *)(scratch + j->bits_at);
    float *k = (float *)(void *)(scratch + j->k_at);
    if (j->depthwise && !p->real) memset(scratch + j->panel_at, 0, (size_t)j->tap * sizeof(uint64_t));
    int last_image = -1, packed_from = 0, packed_to = 0; /* input rows that are packed */
    for (int64_t row = from; row < to;) {
        const int image = (int)(row / p->oh), oy0 = (int)(row % p->oh);
        int oy1 = oy0 + j->band_rows < p->oh ? oy0 + j->band_rows : p->oh;
        if (row + (oy1 - oy0) > to) oy1 = oy0 + (int)(to - row);
        const int y0 = oy0 * p->conv.sh - p->conv.ph;
        const int y1 = (oy1 - 1) * p->conv.sh - p->conv.ph + (p->conv.kh - 1) * p->conv.dh + 1;
        if (!p->real) {
            int start = y0;
            if (image == last_image && y0 < packed_to) { /* the rows that two bands share move to the front */
                const size_t kept = (size_t)(packed_to - y0) * (size_t)p->w, gone = (size_t)(y0 - packed_from) * (size_t)p->w;
                memmove(bits, bits + gone * (size_t)j->pixel, kept * (size_t)j->pixel * sizeof(uint64_t));
                if (p->has_k) memmove(k, k + gone, kept * sizeof(float));
                start = packed_to;
            }
            pack_rows(j, image, y0, start, y1, bits, k);
            last_image = image;
            packed_from = y0;
            packed_to = y1;
        }
        band(j, scratch, image, oy0, oy1, y0, c0, c1);
        row += oy1 - oy0;
    }
}

static size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

int el_conv(const el_plan *p, const el_tensors *t, int threads) {
    if (is_bad(p) || !t->x || !t->y || (p->link && !t->link)) return EL_BAD_PLAN;
    if ((int64_t)p->n * p->oh * p->ow == 0) return EL_OK;
    job j = {.p = p, .t = t};
    atomic_init(&j.failed, 0);
    j.depthwise = is_depthwise(p);
    j.taps = p->conv.kh * p->conv.kw;
    j.tap = p->real ? p->c_in / p->groups : tap_words(p);
    j.pixel = p->real ? p->c_in : pixel_words(p);
    j.string = j.taps * j.tap;
    j.direct = j.taps == 1 && !p->conv.ph && !p->conv.pw && (int64_t)(p->oh - 1) * p->conv.sh < p->h &&
               (int64_t)(p->ow - 1) * p->conv.sw < p->w;
    const size_t unit = p->real ? sizeof(float) : sizeof(uint64_t);
    j.chunk = CHUNK;
    if (p->real) {
        const size_t fit = REAL_CHUNK_BYTES / ((size_t)j.string * sizeof(float)) / EL_REAL_BLOCK;
        j.chunk = (int)(fit < 1 ? 1 : fit > 8 ? 8 : fit) * EL_REAL_BLOCK;
    }

    /* Few pixels: threads share the output channels. Many: they share the rows. */
    const int64_t rows = (int64_t)p->n * p->oh, pixels = rows * p->ow;
    j.splits = 1;
    j.row_items = 1;
    if (threads > 1) {
        const int blocks = (p->c_out + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK;
        if (!j.depthwise && p->groups == 1 && pixels < (int64_t)BAND_PIXELS * threads && blocks >= threads)
            j.splits = threads;
        else
            j.row_items = (int)(rows < threads ? rows : threads);
    }
    int64_t band_rows = (BAND_PIXELS + p->ow - 1) / p->ow;
    if (band_rows > p->oh) band_rows = p->oh;
    j.band_rows = (int)band_rows;
    j.in_rows = (j.band_rows - 1) * p->conv.sh + (p->conv.kh - 1) * p->conv.dh + 1;

    const size_t band_pixels = (size_t)j.band_rows * (size_t)p->ow, wide = (size_t)round_up(p->c_out, EL_REAL_BLOCK) + 64;
    size_t at = 0;
    j.bits_at = at, at += p->real ? 0 : aligned((size_t)j.in_rows * (size_t)p->w * (size_t)j.pixel * unit);
    j.k_at = at, at += p->has_k ? aligned((size_t)j.in_rows * (size_t)p->w * sizeof(float)) : 0;
    j.panel_at = at, at += j.depthwise ? aligned((size_t)j.tap * unit) : j.direct ? 0 : aligned(band_pixels * (size_t)j.string * unit);
    j.pooled_at = at, at += p->link_pool ? aligned(band_pixels * (size_t)p->link_c * sizeof(float)) : 0;
    j.acc_at = at, at += aligned((j.depthwise ? wide : (size_t)MOST_TILE * (size_t)(j.chunk + 64)) * 4);
    j.correction_at = at, at += p->tap_sums ? aligned(wide * sizeof(int32_t)) : 0;
    j.bytes = at + 64;

    el_parallel(piece, &j, j.row_items * j.splits, threads);
    return atomic_load(&j.failed) ? EL_NO_MEMORY : EL_OK;
}

double el_count_time(int words, int channels, int pixels, int repeats) {
    if (words < 1 || channels < 1 || pixels < 1 || repeats < 1) return 0.;
    const int stride = round_up(channels, EL_REAL_BLOCK);
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
        body->prepack(rows, words, channels, weight);
        const uint64_t *x = rows + (size_t)channels * (size_t)words;
        struct timespec a, b;
        for (int r = 0; r < repeats; r++) {
            clock_gettime(CLOCK_MONOTONIC, &a);
            for (int i = 0; i < pixels; i += body->tile_pixels) {
                const uint64_t *strings[MOST_TILE];
                const int m = pixels - i < body->tile_pixels ? pixels - i : body->tile_pixels;
                for (int q = 0; q < m; q++) strings[q] = x + (size_t)(i + q) * (size_t)words;
                body->count(strings, m, words, weight, channels, counts, stride);
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

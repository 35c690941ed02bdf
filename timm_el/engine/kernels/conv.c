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
    const float *x, *link, *added;
    float *y;
    int depthwise, copied;    /* copied: the band's input is in the scratch, padded; else it is read where it is */
    int taps, tap, pixel;     /* words of a tap of a group, and of an input pixel; floats where real */
    int segments, length;     /* the runs of an output pixel's inputs */
    int left, width;          /* columns of zeros before a row, and columns of a row with its padding */
    int band_rows, in_rows;   /* output and input rows of a band */
    int row_items, splits;    /* the work is cut to row_items * splits pieces */
    int chunk;                /* output channels at a time */
    size_t rows_at, k_at, base_at, links_at, scale_at, border_at, pooled_at, zeros_at, acc_at, correction_at, bytes;
    atomic_int failed;
    size_t offsets[EL_MAX_TAPS];
} job;

#define AT(type, where) ((type *)(void *)(scratch + j->where))

/* Input rows from .. to of the band that starts at y0: their signs and means of abs(x), or copies of real ones. */
static void take_rows(const job *j, char *scratch, int image, int y0, int from, int to) {
    const el_plan *p = j->p;
    const int groups = j->depthwise ? 1 : p->groups, cg = p->c_in / groups;
    const size_t unit = p->real ? sizeof(float) : sizeof(uint64_t), pixel = (size_t)j->pixel * unit;
    for (int y = from; y < to; y++) {
        char *row = scratch + j->rows_at + (size_t)(y - y0) * (size_t)j->width * pixel;
        if (y < 0 || y >= p->h) {
            memset(row, 0, (size_t)j->width * pixel);
            continue;
        }
        const float *x = j->x + ((size_t)image * (size_t)p->h + (size_t)y) * (size_t)p->w * (size_t)p->c_in;
        const int right = j->width - j->left - p->w;
        memset(row, 0, (size_t)j->left * pixel);
        row += (size_t)j->left * pixel;
        if (right > 0) memset(row + (size_t)p->w * pixel, 0, (size_t)right * pixel);
        if (p->real) {
            memcpy(row, x, (size_t)p->w * pixel);
            continue;
        }
        for (int g = 0; g < groups; g++)
            body->pack(x + g * cg, p->w, (size_t)p->c_in, p->threshold ? p->threshold + g * cg : NULL,
                       p->flip ? p->flip + g * cg : NULL, cg, (uint64_t *)(void *)row + g * j->tap, (size_t)j->pixel);
        if (p->has_k) body->abs_mean(x, p->w, p->c_in, AT(float, k_at) + (size_t)(y - y0) * (size_t)p->w);
    }
}

/* Mean of the means of abs(x) over the taps; taps outside the image are zeros. */
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

/* What padding changes in the dot products of one pixel. */
static void correct(const job *j, int oy, int ox, int c0, int c1, int32_t *out) {
    const el_plan *p = j->p;
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

/* The window of the link's pool at one output pixel, to `out`. */
static void pool_link(const job *j, const float *image, int oy, int ox, float *out) {
    const el_plan *p = j->p;
    const el_window *w = &p->pool;
    const float *window[EL_MAX_POOL];
    int n = 0;
    for (int ky = 0; ky < w->kh; ky++) {
        const int y = oy * w->sh - w->ph + ky * w->dh;
        if (y < 0 || y >= p->link_h) continue;
        for (int kx = 0; kx < w->kw; kx++) {
            const int x = ox * w->sw - w->pw + kx * w->dw;
            if (x < 0 || x >= p->link_w) continue;
            window[n++] = image + ((size_t)y * (size_t)p->link_w + (size_t)x) * (size_t)p->link_c;
        }
    }
    body->pool(window, n, p->link_pool, p->link_c, out);
}

/* For each output pixel of a band: where its inputs start, what its link adds, its K, whether padding touches it. */
static void locate(const job *j, char *scratch, int image, int oy0, int oy1, int y0) {
    const el_plan *p = j->p;
    const el_window *w = &p->conv;
    const size_t unit = p->real ? sizeof(float) : sizeof(uint64_t), pixel = (size_t)j->pixel * unit;
    const char *rows = j->copied ? scratch + j->rows_at
                                 : (const char *)(j->x + (size_t)image * (size_t)p->h * (size_t)p->w * (size_t)p->c_in);
    const float *link = j->link;
    if (p->link) link += (size_t)image * (size_t)p->link_h * (size_t)p->link_w * (size_t)p->link_c;
    const int border_matters = p->tap_sums != NULL;
    int i = 0;
    for (int oy = oy0; oy < oy1; oy++) {
        const int y = oy * w->sh - w->ph, row_touches = y < 0 || y + (w->kh - 1) * w->dh >= p->h;
        for (int ox = 0; ox < p->ow; ox++, i++) {
            const int x = ox * w->sw - w->pw;
            /* A copied band starts at input row y0 and column -left, and both are where padding starts. */
            AT(const char *, base_at)[i] =
                rows + (j->copied ? ((size_t)(y - y0) * (size_t)j->width + (size_t)(x + j->left)) * pixel
                                  : ((size_t)(y < 0 ? 0 : y) * (size_t)p->w + (size_t)(x < 0 ? 0 : x)) * pixel);
            AT(uint8_t, border_at)[i] = border_matters && (row_touches || x < 0 || x + (w->kw - 1) * w->dw >= p->w);
            if (p->has_k)
                AT(float, scale_at)[i] = j->taps == 1 && y >= 0 && y < p->h && x >= 0 && x < p->w
                                             ? AT(float, k_at)[(size_t)(y - y0) * (size_t)p->w + (size_t)x]
                                             : scale_of_input(j, AT(float, k_at), y0, oy, ox);
            if (p->link_pool) {
                float *pooled = AT(float, pooled_at) + (size_t)i * (size_t)p->link_c;
                pool_link(j, link, oy, ox, pooled);
                AT(const float *, links_at)[i] = pooled;
            } else if (p->link) {
                AT(const float *, links_at)[i] =
                    link + ((size_t)oy * (size_t)p->link_w + (size_t)ox) * (size_t)p->link_c;
            }
        }
    }
}

/* Accumulators of a tile of pixels, for channels c .. c + n. */
static void accumulate(const job *j, char *scratch, int first, int tile, int group, int c, int n, int stride,
                       const float *image, int oy, int ox) {
    const el_plan *p = j->p;
    const void *const *base = AT(const void *const, base_at) + first;
    if (j->depthwise && p->real) {
        const el_window *w = &p->conv;
        const float *taps[EL_MAX_TAPS];
        for (int q = 0; q < tile; q++) {
            int t = 0;
            for (int ky = 0; ky < w->kh; ky++)
                for (int kx = 0; kx < w->kw; kx++, t++) {
                    const int y = oy * w->sh - w->ph + ky * w->dh, x = ox * w->sw - w->pw + kx * w->dw;
                    taps[t] = y < 0 || y >= p->h || x < 0 || x >= p->w
                                  ? AT(float, zeros_at)
                                  : image + ((size_t)y * (size_t)p->w + (size_t)x) * (size_t)p->c_in;
                }
            body->dot_depthwise(taps, t, p->weight, round_up(p->c_out, 16), p->c_out,
                                AT(float, acc_at) + (size_t)q * (size_t)stride);
            if (++ox == p->ow) ox = 0, oy++;
        }
    } else if (j->depthwise) {
        for (int q = 0; q < tile; q++)
            body->count_depthwise(base[q], j->offsets, j->taps, j->tap, p->weight,
                                  AT(int32_t, acc_at) + (size_t)q * (size_t)stride);
    } else if (p->real) {
        body->dot((const float *const *)base, tile, j->offsets, j->segments, j->length,
                  (const float *)p->weight + (size_t)c * (size_t)j->taps * (size_t)j->tap, n, AT(float, acc_at), stride);
    } else {
        const int og = p->c_out / p->groups, string = j->taps * j->tap;
        const uint64_t *starts[MOST_TILE];
        for (int q = 0; q < tile; q++) starts[q] = (const uint64_t *)base[q] + group * j->tap;
        const char *weight = (const char *)p->weight + (size_t)group * body->weight_size(string, og);
        body->count(starts, tile, j->offsets, j->segments, j->length,
                    weight + body->weight_size(string, c - group * og), n, AT(int32_t, acc_at), stride);
    }
}

/* Output rows oy0 .. oy1 of one image, channels c0 .. c1. */
static void band(const job *j, char *scratch, int image, int oy0, int oy1, int y0, int c0, int c1) {
    const el_plan *p = j->p;
    const float *x = j->x + (size_t)image * (size_t)p->h * (size_t)p->w * (size_t)p->c_in;
    const size_t place = ((size_t)image * (size_t)p->oh + (size_t)oy0) * (size_t)p->ow * (size_t)p->c_out;
    const int pixels = (oy1 - oy0) * p->ow, groups = j->depthwise ? 1 : p->groups, og = p->c_out / groups;
    const int base = j->taps * (p->c_in / p->groups), most = p->real ? body->real_tile_pixels : body->tile_pixels;
    locate(j, scratch, image, oy0, oy1, y0);
    for (int c = c0; c < c1;) {
        const int group = c / og, end = (group + 1) * og < c1 ? (group + 1) * og : c1;
        const int n = end - c < j->chunk ? end - c : j->chunk, stride = round_up(n, EL_REAL_BLOCK);
        int oy = oy0, ox = 0;
        for (int i = 0; i < pixels; i += most) {
            const int tile = pixels - i < most ? pixels - i : most;
            const int32_t *corrections[MOST_TILE] = {NULL};
            accumulate(j, scratch, i, tile, group, c, n, stride, x, oy, ox);
            for (int q = 0; q < tile; q++) {
                if (AT(uint8_t, border_at)[i + q]) {
                    int32_t *correction = AT(int32_t, correction_at) + (size_t)q * (size_t)stride;
                    correct(j, oy, ox, c, c + n, correction);
                    corrections[q] = correction;
                }
                if (++ox == p->ow) ox = 0, oy++;
            }
            if (p->real && c + n < c1) { /* the next weights, while these are in use */
                const size_t row = (size_t)j->taps * (size_t)j->tap * sizeof(float);
                const size_t bytes = (size_t)(c1 - c - n < j->chunk ? c1 - c - n : j->chunk) * row;
                const char *next = (const char *)p->weight + (size_t)(c + n) * row;
                const size_t from = bytes * (size_t)i / (size_t)pixels, to = bytes * (size_t)(i + tile) / (size_t)pixels;
                for (size_t at = from; at < to; at += 64) __builtin_prefetch(next + at, 0, 2);
            }
            body->finish(p, AT(char, acc_at), stride, tile, corrections, base, AT(float, scale_at) + i,
                         AT(const float *const, links_at) + i, c, c + n,
                         j->added ? j->added + place + (size_t)i * (size_t)p->c_out : NULL,
                         j->y + place + (size_t)i * (size_t)p->c_out);
        }
        c += n;
    }
}

/* One piece of the work: a run of output rows of the whole batch, a range of channels. */
static void piece(void *context, int item) {
    job *j = context;
    const el_plan *p = j->p;
    char *scratch = el_scratch(EL_SLOT_BAND, j->bytes);
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
    if (j->depthwise && p->real) memset(scratch + j->zeros_at, 0, (size_t)round_up(p->c_in, 16) * sizeof(float));
    const size_t row_bytes = (size_t)j->width * (size_t)j->pixel * (p->real ? sizeof(float) : sizeof(uint64_t));
    int last_image = -1, taken_from = 0, taken_to = 0; /* input rows that are in the scratch */
    for (int64_t row = from; row < to;) {
        const int image = (int)(row / p->oh), oy0 = (int)(row % p->oh);
        int oy1 = oy0 + j->band_rows < p->oh ? oy0 + j->band_rows : p->oh;
        if (row + (oy1 - oy0) > to) oy1 = oy0 + (int)(to - row);
        const int y0 = oy0 * p->conv.sh - p->conv.ph;
        const int y1 = (oy1 - 1) * p->conv.sh - p->conv.ph + (p->conv.kh - 1) * p->conv.dh + 1;
        if (j->copied) {
            int start = y0;
            if (image == last_image && y0 < taken_to) { /* the rows that two bands share move to the front */
                const size_t kept = (size_t)(taken_to - y0), gone = (size_t)(y0 - taken_from);
                memmove(scratch + j->rows_at, scratch + j->rows_at + gone * row_bytes, kept * row_bytes);
                if (p->has_k)
                    memmove(AT(float, k_at), AT(float, k_at) + gone * (size_t)p->w, kept * (size_t)p->w * sizeof(float));
                start = taken_to;
            }
            take_rows(j, scratch, image, y0, start, y1);
            last_image = image;
            taken_from = y0;
            taken_to = y1;
        }
        band(j, scratch, image, oy0, oy1, y0, c0, c1);
        row += oy1 - oy0;
    }
}

static size_t aligned(size_t n) { return (n + 63) / 64 * 64; }

int el_conv(const el_plan *p, const float *x, const float *link, const float *added, float *y, int threads) {
    if (is_bad(p) || !x || !y || (p->link && !link)) return EL_BAD_PLAN;
    if ((int64_t)p->n * p->oh * p->ow == 0) return EL_OK;
    job j;
    j.p = p;
    j.x = x;
    j.link = link;
    j.added = added;
    j.y = y;
    atomic_init(&j.failed, 0);
    j.depthwise = is_depthwise(p);
    j.taps = p->conv.kh * p->conv.kw;
    j.tap = p->real ? p->c_in / p->groups : tap_words(p);
    j.pixel = p->real ? p->c_in : pixel_words(p);
    const int last = (p->ow - 1) * p->conv.sw - p->conv.pw + (p->conv.kw - 1) * p->conv.dw; /* column of the last tap */
    const int last_row = (p->oh - 1) * p->conv.sh - p->conv.ph + (p->conv.kh - 1) * p->conv.dh;
    const int padded = p->conv.ph || p->conv.pw || last >= p->w || last_row >= p->h;
    j.copied = !p->real || (padded && !j.depthwise);
    j.left = p->conv.pw;
    j.width = j.left + (last >= p->w ? last + 1 : p->w);
    if (!j.copied) j.left = 0, j.width = p->w;
    if (p->conv.dw == 1 && j.pixel == j.tap && !j.depthwise) {
        j.segments = p->conv.kh;
        j.length = p->conv.kw * j.tap;
    } else {
        j.segments = j.taps;
        j.length = j.tap;
    }
    for (int s = 0; s < j.segments; s++) {
        const int ky = j.segments == j.taps ? s / p->conv.kw : s, kx = j.segments == j.taps ? s % p->conv.kw : 0;
        j.offsets[s] = ((size_t)(ky * p->conv.dh) * (size_t)j.width + (size_t)(kx * p->conv.dw)) * (size_t)j.pixel;
    }
    const size_t unit = p->real ? sizeof(float) : sizeof(uint64_t);
    j.chunk = j.depthwise ? round_up(p->c_out, EL_REAL_BLOCK) : CHUNK;
    if (p->real && !j.depthwise) {
        const size_t fit = REAL_CHUNK_BYTES / ((size_t)j.taps * (size_t)j.tap * sizeof(float)) / EL_REAL_BLOCK;
        j.chunk = (int)(fit < 1 ? 1 : fit > 8 ? 8 : fit) * EL_REAL_BLOCK;
    }

    /* Few pixels: threads share the output channels. Many: they share the rows. */
    const int64_t rows = (int64_t)p->n * p->oh, pixels = rows * p->ow;
    j.splits = 1;
    j.row_items = 1;
    if (threads > 1) {
        const int blocks = (p->c_out + EL_REAL_BLOCK - 1) / EL_REAL_BLOCK;
        if (!j.depthwise && p->groups == 1 && pixels < (int64_t)FEW_PIXELS * threads && blocks >= threads)
            j.splits = threads;
        else
            j.row_items = (int)(rows < threads ? rows : threads);
    }
    int64_t band_rows = (BAND_PIXELS + p->ow - 1) / p->ow;
    if (band_rows > p->oh) band_rows = p->oh;
    j.band_rows = (int)band_rows;
    j.in_rows = (j.band_rows - 1) * p->conv.sh + (p->conv.kh - 1) * p->conv.dh + 1;

    const size_t band_pixels = (size_t)j.band_rows * (size_t)p->ow;
    const size_t tile = (size_t)MOST_TILE * (size_t)(j.chunk + 64) * 4;
    size_t at = 0;
    j.rows_at = at, at += j.copied ? aligned((size_t)j.in_rows * (size_t)j.width * (size_t)j.pixel * unit) : 0;
    j.k_at = at, at += p->has_k ? aligned((size_t)j.in_rows * (size_t)p->w * sizeof(float)) : 0;
    j.base_at = at, at += aligned(band_pixels * sizeof(void *));
    j.links_at = at, at += aligned(band_pixels * sizeof(void *));
    j.scale_at = at, at += aligned(band_pixels * sizeof(float));
    j.border_at = at, at += aligned(band_pixels);
    j.pooled_at = at, at += p->link_pool ? aligned(band_pixels * (size_t)p->link_c * sizeof(float)) : 0;
    j.zeros_at = at, at += aligned((size_t)round_up(p->c_in, 16) * sizeof(float));
    j.acc_at = at, at += aligned(tile);
    j.correction_at = at, at += p->tap_sums ? aligned(tile) : 0;
    j.bytes = at + 64;

    el_parallel(piece, &j, j.row_items * j.splits, threads);
    return atomic_load(&j.failed) ? EL_NO_MEMORY : EL_OK;
}

int el_chain(const el_plan *const *plans, int n, const float *x, const float *added, float *y, int threads) {
    for (int i = 0; i < n; i++) {
        const el_plan *p = plans[i];
        float *out = y;
        if (i > 0 && (p->n != plans[i - 1]->n || p->h != plans[i - 1]->oh || p->w != plans[i - 1]->ow ||
                      p->c_in != plans[i - 1]->c_out))
            return EL_BAD_PLAN;
        if (i + 1 < n) {
            out = el_scratch(i % 2 ? EL_SLOT_ODD : EL_SLOT_EVEN,
                             (size_t)p->n * (size_t)p->oh * (size_t)p->ow * (size_t)p->c_out * sizeof(float));
            if (!out) return EL_NO_MEMORY;
        }
        const int failed = el_conv(p, x, x, i + 1 == n ? added : NULL, out, threads);
        if (failed) return failed;
        x = out;
    }
    return EL_OK;
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
        body->prepack(rows, words, channels, weight);
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

/* The part of a real half that is written once: abs_mean(), pool() and the epilogues, in vectors of LANES floats. */

typedef float eight_floats __attribute__((vector_size(32)));
typedef float four_floats __attribute__((vector_size(16)));

/* Compute several means side by side: the sums of one pixel wait for one another, those of several pixels do not. */
INLINE void abs_means(const float *x, const int pixels, int c, float *means) {
    const vi magnitude = (vi){0} + 0x7fffffff;
    vf sums[4][16 / LANES] = {{{0}}};
    int i = 0;
    for (; i + 16 <= c; i += 16)
        for (int p = 0; p < pixels; p++)
            for (int j = 0; j < 16 / LANES; j++)
                sums[p][j] = sums[p][j] + (vf)((vi)load_floats(x + (size_t)p * (size_t)c + i + LANES * j) & magnitude);
    for (int p = 0; p < pixels; p++, x += c) {
        float lanes[16];
        for (int j = 0; j < 16 / LANES; j++) store_floats(lanes + LANES * j, sums[p][j]);
        for (int j = 0; i + j < c; j++) lanes[j] = lanes[j] + (x[i + j] < 0.f ? -x[i + j] : x[i + j]);
        eight_floats eight[2];
        four_floats four[2];
        memcpy(eight, lanes, sizeof eight);
        eight[0] = eight[0] + eight[1];
        memcpy(four, eight, sizeof four);
        four[0] = four[0] + four[1];
        means[p] = ((four[0][0] + four[0][2]) + (four[0][1] + four[0][3])) / (float)c;
    }
}

static void abs_mean(const float *x, int n, int c, float *means) {
    for (; n >= 4; n -= 4, x += 4 * (size_t)c, means += 4) abs_means(x, 4, c, means);
    if (n == 3) abs_means(x, 3, c, means);
    else if (n == 2) abs_means(x, 2, c, means);
    else if (n == 1) abs_means(x, 1, c, means);
}

static void pool(const float *const *pixels, int n, int mode, int c, float *out) {
    int i = 0;
    const float count = (float)n, inverse = 1.f / count;
    const int exact = (n & (n - 1)) == 0; /* then a product with the inverse is the quotient, and much faster */
    for (; i + LANES <= c; i += LANES) {
        vf v = load_floats(pixels[0] + i);
        for (int j = 1; j < n; j++) {
            vf x = load_floats(pixels[j] + i);
            if (mode == EL_POOL_MAX) v = select_floats((vi)(x > v) | (vi)(x != x), x, v);
            else v = v + x;
        }
        store_floats(out + i, mode == EL_POOL_MAX ? v : exact ? v * spread(inverse) : v / spread(count));
    }
    for (; i < c; i++) {
        float v = pixels[0][i];
        for (int j = 1; j < n; j++) {
            float x = pixels[j][i];
            if (mode == EL_POOL_MAX) v = x > v || x != x ? x : v;
            else v = v + x;
        }
        out[i] = mode == EL_POOL_MAX ? v : v / count;
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* The epilogue. From the sums of a tile to its outputs:
 *
 *     float(bits - 2 count + correction) * scale                         [SUMS_COUNTS]
 *     float(sum) * scale                                                 [SUMS_INT8]
 *     sum                                                                [SUMS_FLOATS]
 *     * K                                                                [has_k]
 *     + shift
 *     clip to lo .. hi, or PReLU                                         [act]
 *     * scale2 + shift2                                                  [has_affine]
 *     + link * inverse_gamma                                             [link]
 *     PReLU between two shifts                                           [has_post]
 *     + added                                                            [if there is any]
 *
 * in this order, each operation rounded on its own: nothing may be folded or fused. Steps that a plan lacks are
 * compiled away from the commonest ones. The outer loop is over vectors of channels: their constants stay in registers. */

/* Ways to read a vector of channels of the link: not at all, as it lies, as a sum of runs of c_out, value by value. */
enum { LINK_OFF, LINK_WHOLE, LINK_SUM, LINK_SLOW };

enum { SUMS_COUNTS, SUMS_INT8, SUMS_FLOATS };

typedef struct {
    uint8_t sums, has_k, act, has_affine, link, has_post;
} steps;

static int link_reading(const el_plan *p, int c0) {
    if (!p->link) return LINK_OFF;
    if (c0 % LANES || p->c_out % LANES || p->link_c % LANES) return LINK_SLOW;
    if (p->link != EL_LINK_SQUEEZE) return LINK_WHOLE;
    return p->link_c % p->c_out ? LINK_SLOW : LINK_SUM;
}

static vf link_slowly(const el_plan *p, const float *pixel, int c) {
    const int squeeze = p->link == EL_LINK_SQUEEZE, ci = p->link_c, co = p->c_out;
    vf v = {0};
    for (int i = 0; i < LANES && c < co; i++, c++) {
        v[i] = squeeze ? pixel[c] : pixel[c % ci];
        for (int j = co; squeeze && j < ci; j += co) v[i] = v[i] + (j + c < ci ? pixel[j + c] : 0.f);
    }
    return v;
}

INLINE void compute_epilogue(const el_tile *t, const steps s) {
    const el_plan *p = t->plan;
    const size_t row = (size_t)p->table_stride, stride = (size_t)t->stride;
    const size_t c_out = (size_t)p->c_out, ci = (size_t)p->link_c;
    const int slope_row = 2, affine_row = slope_row + (s.act == EL_ACT_PRELU);
    const int post_row = affine_row + (s.has_affine ? 2 : 0);
    const vf none = {0}, lo = spread(p->lo), hi = spread(p->hi), inverse_gamma = spread(p->inverse_gamma);
    const vi bits = (vi){0} + t->bits;
    const int c1 = t->c1, pixels = t->pixels;
    const float *const k = t->k;
    size_t link_channel = s.link ? (size_t)t->c0 % ci : 0;
    for (int c = t->c0; c < c1; c += LANES) {
        const float *table = p->table + c; /* rows that are not asked for are not there */
        const vf scale = s.sums == SUMS_FLOATS ? none : load_floats(table), shift = load_floats(table + row);
        const vf slope = s.act == EL_ACT_PRELU ? load_floats(table + (size_t)slope_row * row) : none;
        const vf scale2 = s.has_affine ? load_floats(table + (size_t)affine_row * row) : none;
        const vf shift2 = s.has_affine ? load_floats(table + (size_t)(affine_row + 1) * row) : none;
        const vf post_in = s.has_post ? load_floats(table + (size_t)post_row * row) : none;
        const vf post_slope = s.has_post ? load_floats(table + (size_t)(post_row + 1) * row) : none;
        const vf post_out = s.has_post ? load_floats(table + (size_t)(post_row + 2) * row) : none;
        const int left = c1 - c;
        const size_t from = (size_t)(c - t->c0);
        const float *sums = (const float *)t->sums + from, *link = NULL, *added = t->added ? t->added + c : NULL;
        const int32_t *corrections = t->corrections ? t->corrections + from : NULL;
        if (s.link) link = t->link + (s.link == LINK_WHOLE ? link_channel : s.link == LINK_SUM ? (size_t)c : 0);
        float *y = t->y + c;
        for (int q = 0; q < pixels; q++, sums += stride, y += c_out) {
            vf v;
            if (s.sums == SUMS_FLOATS) {
                v = load_floats(sums);
            } else if (s.sums == SUMS_INT8) {
                v = __builtin_convertvector(load_ints(sums), vf) * scale;
            } else {
                const vu n = (vu)load_ints(sums);
                vu dot = (vu)bits - (n + n);
                if (corrections) {
                    dot = dot + (vu)load_ints(corrections);
                    corrections += stride;
                }
                v = __builtin_convertvector((vi)dot, vf) * scale;
            }
            if (s.has_k) v = v * spread(k[q]);
            v = v + shift;
            if (s.act == EL_ACT_CLIP) v = at_most(at_least(v, lo), hi);
            else if (s.act == EL_ACT_PRELU) v = prelu(v, slope);
            if (s.has_affine) {
                v = v * scale2;
                v = v + shift2;
            }
            if (s.link) {
                vf l = s.link == LINK_SLOW ? link_slowly(p, link, c) : load_floats(link);
                for (size_t j = c_out; s.link == LINK_SUM && j + (size_t)c < ci; j += c_out)
                    l = l + load_floats(link + j);
                l = l * inverse_gamma;
                v = v + l;
                link += ci;
            }
            if (s.has_post) v = prelu(v + post_in, post_slope) + post_out;
            if (added) {
                v = v + (left < LANES ? load_some(added, left) : load_floats(added));
                added += c_out;
            }
            if (left < LANES) store_some(y, v, left);
            else store_floats(y, v);
        }
        link_channel += LANES;
        if (s.link && link_channel >= ci) link_channel -= ci; /* link_c is a multiple of LANES where this is used */
    }
}

/* The commonest ones: a name and the steps that it has. */
#define COMMON_EPILOGUES(EPILOGUE)                                                                      \
    EPILOGUE(bare, .link = LINK_OFF)                                                                    \
    EPILOGUE(link_whole, .link = LINK_WHOLE)                                                            \
    EPILOGUE(link_sum, .link = LINK_SUM)                                                                \
    EPILOGUE(k_link_whole, .has_k = 1, .link = LINK_WHOLE)                                              \
    EPILOGUE(k_link_sum, .has_k = 1, .link = LINK_SUM)                                                  \
    EPILOGUE(link_post, .link = LINK_WHOLE, .has_post = 1)                                              \
    EPILOGUE(clip_affine_link, .act = EL_ACT_CLIP, .has_affine = 1, .link = LINK_WHOLE)                 \
    EPILOGUE(real_bare, .sums = SUMS_FLOATS)                                                                      \
    EPILOGUE(real_clip_affine, .sums = SUMS_FLOATS, .act = EL_ACT_CLIP, .has_affine = 1)                          \
    EPILOGUE(real_clip_affine_link, .sums = SUMS_FLOATS, .act = EL_ACT_CLIP, .has_affine = 1, .link = LINK_WHOLE) \
    EPILOGUE(real_link_post, .sums = SUMS_FLOATS, .link = LINK_WHOLE, .has_post = 1)                          \
    EPILOGUE(int8_bare, .sums = SUMS_INT8, .has_k = 1)                                                        \
    EPILOGUE(int8_clip, .sums = SUMS_INT8, .has_k = 1, .act = EL_ACT_CLIP)                                    \
    EPILOGUE(int8_link_post, .sums = SUMS_INT8, .has_k = 1, .link = LINK_WHOLE, .has_post = 1)                \
    EPILOGUE(int8_clip_affine, .sums = SUMS_INT8, .has_k = 1, .act = EL_ACT_CLIP, .has_affine = 1)

#define AS_FUNCTION(name, ...) \
    static void name(const el_tile *t) { compute_epilogue(t, (steps){__VA_ARGS__}); }
#define AS_ROW(name, ...) {{__VA_ARGS__}, name},

COMMON_EPILOGUES(AS_FUNCTION)

static steps steps_of(const el_plan *p, int c0) {
    return (steps){.sums = p->int8 ? SUMS_INT8 : p->real ? SUMS_FLOATS : SUMS_COUNTS,
                   .has_k = p->has_k || p->int8,
                   .act = (uint8_t)p->act,
                   .has_affine = p->has_affine != 0,
                   .link = (uint8_t)link_reading(p, c0),
                   .has_post = p->has_post != 0};
}

static void any_epilogue(const el_tile *t) { compute_epilogue(t, steps_of(t->plan, t->c0)); }

static el_epilogue *epilogue(const el_plan *p, int c0) {
    static const struct {
        steps has;
        el_epilogue *compute;
    } rows[] = {COMMON_EPILOGUES(AS_ROW)};
    const steps wanted = steps_of(p, c0);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (!memcmp(&rows[i].has, &wanted, sizeof wanted)) return rows[i].compute;
    return any_epilogue;
}

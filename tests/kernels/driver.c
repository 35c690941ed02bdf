/* The kernels' own test: random convolutions on every body and several thread counts against loops written from the
 * formula in engine.h, then several callers at once, and, where there is one, a fork. For sanitizers and emulators:
 * no Python.
 *
 *     cc $(cat flags.txt) -o driver *.c -lm -ldl && ./driver [cases [seed [nofork]]]
 */
#include "engine.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

static uint64_t state = 1;

static uint64_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static int pick(int low, int high) { return low + (int)(draw() >> 33) % (high - low + 1); }

static float real(void) {
    switch (pick(0, 60)) {
        case 0: return 0.f;
        case 1: return -0.f;
        case 2: return NAN;
        case 3: return INFINITY;
        case 4: return -INFINITY;
        case 5: return 1e-42f;
    }
    return (float)(pick(-1000, 1000)) / 300.f;
}

static float *reals(size_t n) {
    float *x = malloc((n ? n : 1) * sizeof(float));
    for (size_t i = 0; i < n; i++) x[i] = real();
    return x;
}

typedef struct {
    el_plan plan;
    uint8_t *bits;
    int8_t *int8; /* c_out, taps, c_in */
    void *stored; /* see layout.py */
    float *weight, *table, *threshold;
    uint32_t *flip;
    int padded, rows;
} subject;

static size_t size_of(int n, int h, int w, int c) { return (size_t)n * (size_t)h * (size_t)w * (size_t)c; }

/* A convolution of an image n x h x w x c; 0 if this draw makes none. */
static int make(subject *s, int n, int h, int w, int c, int in_chain) {
    memset(s, 0, sizeof *s);
    el_plan *p = &s->plan;
    p->n = n, p->h = h, p->w = w, p->c_in = c;
    p->real = pick(0, 3) == 0;
    const int kind = pick(0, 3);
    p->groups = 1, p->c_out = pick(0, 2) ? pick(1, 80) : c;
    if (kind == 0 && c > 1) p->groups = p->c_out = c;
    if (kind == 1 && !p->real && c % 2 == 0) p->groups = 2, p->c_out = 2 * pick(1, 40);
    p->int8 = p->real && p->groups == 1 && pick(0, 1);
    el_window *k = &p->conv;
    k->kh = pick(0, 1) ? 1 : pick(1, 5), k->kw = pick(0, 1) ? 1 : pick(1, 5);
    k->sh = pick(1, 2), k->sw = pick(1, 2), k->ph = pick(0, 2), k->pw = pick(0, 2), k->dh = pick(1, 2), k->dw = pick(1, 2);
    const int end_h = pick(0, 2), end_w = pick(0, 2);
    const int room_h = h + k->ph + end_h - k->dh * (k->kh - 1) - 1, room_w = w + k->pw + end_w - k->dw * (k->kw - 1) - 1;
    if (room_h < 0 || room_w < 0) return 0;
    p->oh = room_h / k->sh + 1, p->ow = room_w / k->sw + 1;
    p->pad_value = p->real ? 0 : pick(-1, 1);
    p->has_k = !p->real && p->groups == 1 && pick(0, 1);
    p->act = pick(0, 2), p->has_affine = pick(0, 2) == 0, p->has_post = pick(0, 2) == 0;
    p->lo = -.5f, p->hi = 1.25f, p->inverse_gamma = .37f;
    if (pick(0, 2)) {
        p->link_c = in_chain ? c : pick(0, 1) ? c : pick(1, 90);
        p->link = p->link_c == p->c_out ? EL_LINK_IDENTITY : p->link_c > p->c_out ? EL_LINK_SQUEEZE : EL_LINK_EXPAND;
        p->link_h = in_chain ? h : p->oh, p->link_w = in_chain ? w : p->ow;
        if (pick(0, 1) || p->link_h != p->oh || p->link_w != p->ow) {
            el_window *q = &p->pool;
            p->link_pool = pick(1, 2);
            q->kh = pick(1, 3), q->kw = pick(1, 3), q->sh = k->sh, q->sw = k->sw, q->dh = q->dw = 1;
            q->ph = pick(0, q->kh - 1), q->pw = pick(0, q->kw - 1);
            if (!in_chain) p->link_h = (p->oh - 1) * q->sh + 1, p->link_w = (p->ow - 1) * q->sw + 1;
            if ((p->oh - 1) * q->sh - q->ph >= p->link_h || (p->ow - 1) * q->sw - q->pw >= p->link_w) p->link = 0, p->link_pool = 0;
        }
    }
    const int taps = k->kh * k->kw, cg = c / p->groups;
    p->table_stride = (p->c_out + 30) / 16 * 16;
    s->rows = 2 + (p->act == EL_ACT_PRELU) + 2 * p->has_affine + 3 * p->has_post;
    s->table = calloc((size_t)s->rows * (size_t)p->table_stride, sizeof(float));
    for (int r = 0; r < s->rows; r++)
        for (int i = 0; i < p->c_out; i++) s->table[r * p->table_stride + i] = (float)pick(-100, 100) / 64.f;
    p->table = s->table;
    if (!p->real && pick(0, 1)) p->threshold = s->threshold = reals((size_t)c);
    if (!p->real && pick(0, 2) == 0) {
        s->flip = calloc((size_t)c, sizeof(uint32_t));
        for (int i = 0; i < c; i++) s->flip[i] = pick(0, 1) ? 0x80000000u : 0;
        p->flip = s->flip;
    }
    s->padded = !p->real && p->pad_value != -1 && (k->ph || k->pw || end_h || end_w);
    if (p->int8) {
        const size_t bytes = (size_t)p->c_out * (size_t)cg * (size_t)taps;
        s->int8 = malloc(bytes);
        for (size_t i = 0; i < bytes; i++) s->int8[i] = (int8_t)pick(-127, 127);
    } else if (p->real) {
        s->weight = reals((size_t)p->c_out * (size_t)cg * (size_t)taps);
    } else {
        const size_t bytes = (size_t)p->c_out * (size_t)taps * (size_t)((cg + 7) / 8);
        s->bits = malloc(bytes);
        for (size_t i = 0; i < bytes; i++) s->bits[i] = (uint8_t)draw();
    }
    return 1;
}

static size_t up(int n, int to) { return (size_t)(n + to - 1) / (size_t)to * (size_t)to; }

/* The weight as layout.py stores it, and what the active body needs. */
static void lay_out(subject *s) {
    el_plan *p = &s->plan;
    const int taps = p->conv.kh * p->conv.kw, cg = p->c_in / p->groups, og = p->c_out / p->groups;
    const int depthwise = p->groups > 1 && p->groups == p->c_in && p->c_in == p->c_out, words = (cg + 63) / 64;
    el_aligned_free((void *)p->weight), free((void *)p->tap_sums), free(s->stored);
    p->weight = p->tap_sums = s->stored = NULL;
    if (p->int8) {
        void *weight = el_aligned_alloc(64, el_weight_size(p));
        el_lay_out(p, s->int8, weight);
        p->weight = weight;
        return;
    }
    if (p->real) {
        float *stored = el_aligned_alloc(64, el_weight_size(p));
        memset(stored, 0, el_weight_size(p));
        for (int o = 0; o < p->c_out; o++)
            for (int i = 0; i < cg; i++)
                for (int t = 0; t < taps; t++)
                    stored[depthwise ? (size_t)t * up(p->c_out, 16) + (size_t)o
                                     : (size_t)(o / 64 * taps * cg + t * cg + i) * 64 + (size_t)(o % 64)] =
                        s->weight[(o * cg + i) * taps + t];
        p->weight = stored;
        return;
    }
    const size_t group = up(og, 8) * (size_t)(taps * words);
    uint64_t *stored = s->stored = calloc(depthwise ? (size_t)taps * up(p->c_out, 64) / 64 : (size_t)p->groups * group, 8);
    for (int o = 0; o < p->c_out; o++)
        for (int t = 0; t < taps; t++)
            for (int i = 0; i < cg; i++) {
                const uint64_t bit = s->bits[(o * taps + t) * ((cg + 7) / 8) + i / 8] >> (i % 8) & 1;
                if (depthwise) stored[(size_t)t * up(p->c_out, 64) / 64 + (size_t)(o / 64)] |= bit << (o % 64);
                else stored[(size_t)(o / og) * group + (size_t)((o % og / 8 * taps * words + t * words + i / 64) * 8 + o % og % 8)] |= bit << (i % 64);
            }
    void *weight = el_aligned_alloc(64, el_weight_size(p) + 1);
    el_lay_out(p, stored, weight);
    p->weight = weight;
    if (!s->padded) return;
    int32_t *sums = malloc((size_t)taps * (size_t)p->table_stride * 4);
    el_tap_sums(p, stored, sums);
    p->tap_sums = sums;
}

static void discard(subject *s) {
    el_aligned_free((void *)s->plan.weight);
    free((void *)s->plan.tap_sums);
    free(s->stored), free(s->bits), free(s->int8), free(s->weight), free(s->table), free(s->threshold), free(s->flip);
}

static float abs_mean(const float *x, int c) {
    float lanes[16] = {0};
    for (int i = 0; i < c; i++) lanes[i % 16] += fabsf(x[i]);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0] / (float)c;
}

static float link_of(const subject *s, const float *link, int image, int oy, int ox, int c) {
    const el_plan *p = &s->plan;
    if (!p->link_pool) return link[((size_t)(image * p->link_h + oy) * (size_t)p->link_w + (size_t)ox) * (size_t)p->link_c + (size_t)c];
    float best = 0.f;
    int count = 0;
    for (int ky = 0; ky < p->pool.kh; ky++)
        for (int kx = 0; kx < p->pool.kw; kx++) {
            const int y = oy * p->pool.sh - p->pool.ph + ky, x = ox * p->pool.sw - p->pool.pw + kx;
            if (y < 0 || y >= p->link_h || x < 0 || x >= p->link_w) continue;
            const float v = link[((size_t)(image * p->link_h + y) * (size_t)p->link_w + (size_t)x) * (size_t)p->link_c + (size_t)c];
            if (!count) best = v;
            else if (p->link_pool == EL_POOL_AVG) best = best + v;
            else if (v > best || isnan(v)) best = v;
            count++;
        }
    return p->link_pool == EL_POOL_AVG ? best / (float)count : best;
}

/* 127 / m for the inputs that share a scale with output pixel (oy, ox), or 0 if they are taken for zeros; the scale. */
static float inverse_of(const el_plan *p, const float *x, int oy, int ox, float *k) {
    const el_window *w = &p->conv;
    const int one = w->kh * w->kw == 1, left = ox * w->sw - w->pw;
    float m = 0.f;
    for (int ky = 0; ky < w->kh; ky++) {
        const int y = oy * w->sh - w->ph + ky * w->dh;
        for (int c = one ? left : 0; y >= 0 && y < p->h && c >= 0 && c < (one ? left + 1 : p->w) && c < p->w; c++)
            for (int i = 0; i < p->c_in; i++) {
                const float a = fabsf(x[((size_t)y * (size_t)p->w + (size_t)c) * (size_t)p->c_in + (size_t)i]);
                if (a > m || isnan(a)) m = a;
                if (isnan(m)) return *k = NAN, 0.f;
            }
    }
    if (isinf(m)) return *k = NAN, 0.f;
    return isinf(127.f / m) ? (*k = 0.f, 0.f) : (*k = m / 127.f, 127.f / m);
}

/* From the formula, one value at a time. */
static void expect(const subject *s, const float *x, const float *link, const float *added, float *y) {
    const el_plan *p = &s->plan;
    const el_window *k = &p->conv;
    const int cg = p->c_in / p->groups, og = p->c_out / p->groups, taps = k->kh * k->kw, bytes = (cg + 7) / 8;
    for (int image = 0; image < p->n; image++)
        for (int oy = 0; oy < p->oh; oy++)
            for (int ox = 0; ox < p->ow; ox++)
                for (int c = 0; c < p->c_out; c++, y++) {
                    int dot = 0;
                    float v = 0.f, scale = 0.f, k8 = 0.f;
                    const float inverse =
                        p->int8 ? inverse_of(p, x + (size_t)image * size_of(1, p->h, p->w, p->c_in), oy, ox, &k8) : 0.f;
                    for (int t = 0; t < taps; t++) {
                        const int iy = oy * k->sh - k->ph + t / k->kw * k->dh, ix = ox * k->sw - k->pw + t % k->kw * k->dw;
                        const int inside = iy >= 0 && iy < p->h && ix >= 0 && ix < p->w;
                        const float *pixel = inside ? x + ((size_t)(image * p->h + iy) * (size_t)p->w + (size_t)ix) * (size_t)p->c_in : NULL;
                        if (p->has_k && inside) scale += abs_mean(pixel, p->c_in);
                        for (int i = 0; i < cg; i++) {
                            const int from = c / og * cg + i;
                            if (p->int8) {
                                const float q = inside && inverse > 0.f ? nearbyintf(pixel[from] * inverse) : 0.f;
                                dot += (int)q * s->int8[(c * taps + t) * cg + i];
                                continue;
                            }
                            if (p->real) {
                                v = fmaf(inside ? pixel[from] : 0.f, s->weight[((size_t)c * (size_t)cg + (size_t)i) * (size_t)taps + (size_t)t], v);
                                continue;
                            }
                            int sign = p->pad_value;
                            if (inside) {
                                float value = pixel[from];
                                if (p->flip && p->flip[from]) value = -value;
                                sign = value >= (p->threshold ? p->threshold[from] : 0.f) ? 1 : -1;
                            }
                            const int bit = s->bits[((size_t)c * (size_t)taps + (size_t)t) * (size_t)bytes + (size_t)(i / 8)] >> (i % 8) & 1;
                            dot += bit ? sign : -sign;
                        }
                    }
#define ROW(r) p->table[(r) * p->table_stride + c]
                    const int slope = 2, affine = slope + (p->act == EL_ACT_PRELU), post = affine + 2 * p->has_affine;
                    if (!p->real || p->int8) v = (float)dot * ROW(0);
                    if (p->int8) v = v * k8;
                    if (p->has_k) v = v * (scale / (float)taps);
                    v = v + ROW(1);
                    if (p->act == EL_ACT_CLIP) v = v < p->lo ? p->lo : v, v = v > p->hi ? p->hi : v;
                    if (p->act == EL_ACT_PRELU) v = v >= 0.f ? v : v * ROW(slope);
                    if (p->has_affine) v = v * ROW(affine), v = v + ROW(affine + 1);
                    if (p->link) {
                        float l = p->link == EL_LINK_SQUEEZE ? link_of(s, link, image, oy, ox, c)
                                                             : link_of(s, link, image, oy, ox, c % p->link_c);
                        if (p->link == EL_LINK_SQUEEZE)
                            for (int j = p->c_out; j < p->link_c; j += p->c_out)
                                l = l + (j + c < p->link_c ? link_of(s, link, image, oy, ox, j + c) : 0.f);
                        l = l * p->inverse_gamma;
                        v = v + l;
                    }
                    if (p->has_post) {
                        v = v + ROW(post);
                        v = v >= 0.f ? v : v * ROW(post + 1);
                        v = v + ROW(post + 2);
                    }
                    if (added) v = v + added[((size_t)(image * p->oh + oy) * (size_t)p->ow + (size_t)ox) * (size_t)p->c_out + (size_t)c];
                    *y = v;
                }
}

static int same(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, 4) && !(isnan(a[i]) && isnan(b[i]))) return 0;
    return 1;
}

static char bodies[8][16];
static int n_bodies;

static int wrong;

static void report(const char *what, int number, int threads) {
    printf("%s %d: differs, body %s, %d threads\n", what, number, el_active(), threads);
    wrong++;
}

static void one_convolution(int number) {
    subject s;
    if (!make(&s, pick(0, 2), pick(1, 9), pick(1, 9), pick(1, 140), 0)) return;
    const el_plan *p = &s.plan;
    const size_t out = size_of(p->n, p->oh, p->ow, p->c_out);
    float *x = reals(size_of(p->n, p->h, p->w, p->c_in)), *link = p->link ? reals(size_of(p->n, p->link_h, p->link_w, p->link_c)) : NULL;
    float *added = pick(0, 2) ? NULL : reals(out), *expected = reals(out), *y = reals(out);
    expect(&s, x, link, added, expected);
    for (int b = 0; b < n_bodies; b++) {
        el_use(bodies[b]);
        lay_out(&s);
        for (int threads = 1; threads <= 3; threads++) {
            memset(y, 0, out * sizeof(float));
            if (el_conv(p, x, link, added, y, threads) || !same(y, expected, out)) report("convolution", number, threads);
        }
    }
    free(x), free(link), free(added), free(expected), free(y);
    discard(&s);
}

/* Several callers at once, each with work of its own. */
typedef struct {
    subject s;
    float *x, *expected, *y;
    int wrong;
} caller;

static void *call(void *argument) {
    caller *c = argument;
    const el_plan *p = &c->s.plan;
    const size_t out = size_of(p->n, p->oh, p->ow, p->c_out);
    for (int i = 0; i < 50; i++) {
        memset(c->y, 0, out * sizeof(float));
        if (el_conv(p, c->x, c->x, NULL, c->y, 1 + i % 3) || !same(c->y, c->expected, out)) c->wrong++;
    }
    return NULL;
}

/* A child has no workers, and calls all the same. */
static void in_a_fork(caller *c) {
#if defined(_WIN32)
    (void)c;
#else
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        call(c);
        _exit(c->wrong ? 1 : 0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    if (status) report("fork", 0, 3);
#endif
}

static void callers_at_once(int with_fork) {
    caller c[4];
    pthread_t threads[4];
    el_use(bodies[0]);
    for (int i = 0; i < 4; i++) {
        while (!make(&c[i].s, 2, 9, 9, 48 + i, 1)) {}
        const el_plan *p = &c[i].s.plan;
        const size_t out = size_of(p->n, p->oh, p->ow, p->c_out);
        c[i].x = reals(size_of(p->n, p->h, p->w, p->c_in)), c[i].expected = reals(out), c[i].y = reals(out), c[i].wrong = 0;
        expect(&c[i].s, c[i].x, c[i].x, NULL, c[i].expected);
        lay_out(&c[i].s);
    }
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, call, &c[i]);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    if (with_fork) in_a_fork(c);
    for (int i = 0; i < 4; i++) {
        if (c[i].wrong) report("callers at once", i, 3);
        free(c[i].x), free(c[i].expected), free(c[i].y);
        discard(&c[i].s);
    }
}

int main(int argc, char **argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : 200;
    state = argc > 2 ? (uint64_t)atoll(argv[2]) * 2654435761u + 1 : 88172645463325252u;
    char names[64];
    strcpy(names, el_bodies());
    for (char *name = strtok(names, " "); name; name = strtok(NULL, " ")) strcpy(bodies[n_bodies++], name);
    for (int i = 0; i < cases; i++) one_convolution(i);
    callers_at_once(argc < 4); /* some emulators do not survive a fork of several threads */
    if (el_use("no such body") != EL_BAD_PLAN) report("el_use", 0, 0);
    el_plan empty = {0};
    if (el_conv(&empty, NULL, NULL, NULL, NULL, 1) != EL_BAD_PLAN) report("bad plan", 0, 0);
    printf("%d convolutions, bodies %s: %d wrong\n", cases, el_bodies(), wrong);
    return wrong ? 1 : 0;
}

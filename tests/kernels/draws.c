/* Random steps. */
#include "net.h"

#include <stdlib.h>
#include <string.h>

static size_t up(int64_t n, int64_t to) { return (size_t)((n + to - 1) / to * to); }

static void draw_window(int32_t *ints, int most, int most_pad) {
    ints[0] = pick(0, 1) ? 1 : pick(1, most), ints[1] = pick(0, 1) ? 1 : pick(1, most);
    ints[2] = pick(1, 2), ints[3] = pick(1, 2);
    ints[4] = pick(0, most_pad), ints[5] = pick(0, most_pad);
    ints[6] = pick(1, 2), ints[7] = pick(1, 2);
}

static int float_tensor(net *n, int64_t count) {
    return net_tensor(n, EL_FLOAT32, reals((size_t)count), (size_t)count * sizeof(float));
}

/* Stored as layout.py does: what is missing to a full word, block or vector is zero. */
static int draw_weight(net *n, const int32_t *ints, int is_real, int is_int8) {
    const int64_t c_in = ints[EL_C_IN], c_out = ints[EL_C_OUT], groups = ints[EL_GROUPS], taps = ints[2] * ints[3];
    const int64_t cg = c_in / groups, og = c_out / groups;
    const int depthwise = groups > 1 && groups == c_in && c_in == c_out;
    if (is_int8) {
        const size_t count = (size_t)(c_out * taps * c_in);
        int8_t *stored = malloc(count);
        for (size_t i = 0; i < count; i++) stored[i] = (int8_t)pick(-127, 127);
        return net_tensor(n, EL_INT8, stored, count);
    }
    if (is_real) {
        const size_t count = depthwise ? (size_t)taps * up(c_out, 16) : up(c_out, 64) * (size_t)(taps * cg);
        float *stored = calloc(count, sizeof *stored);
        for (size_t i = 0; i < count; i++) {
            const int64_t o =
                depthwise ? (int64_t)(i % up(c_out, 16)) : (int64_t)(i / (size_t)(64 * taps * cg) * 64 + i % 64);
            if (o < c_out) stored[i] = real();
        }
        return net_tensor(n, EL_FLOAT32, stored, count * sizeof *stored);
    }
    const int64_t words = (cg + 63) / 64;
    const size_t bytes =
        depthwise ? (size_t)taps * up(c_out, 64) / 8 : (size_t)(groups * taps * words) * up(og, 8) * 8;
    uint8_t *stored = calloc(bytes, 1);
    for (int64_t o = 0; o < c_out; o++)
        for (int64_t t = 0; t < taps; t++)
            for (int64_t i = 0; i < cg; i++) {
                const int64_t g = o / og, k = o % og;
                const int64_t at =
                    depthwise ? t * (int64_t)up(c_out, 64) / 8 + o / 8
                              : ((g * (int64_t)(up(og, 8) / 8) + k / 8) * taps * words + t * words + i / 64) * 64 +
                                    k % 8 * 8 + i % 64 / 8;
                stored[at] |= (uint8_t)((draw() >> 40 & 1) << (depthwise ? o : i) % 8);
            }
    return net_tensor(n, EL_BITS, stored, bytes);
}

static int draw_table(net *n, const int32_t *ints) {
    const int rows = 2 + (ints[EL_ACT] == EL_ACT_PRELU) + 2 * ints[EL_HAS_AFFINE] + 3 * ints[EL_HAS_POST],
              c = ints[EL_C_OUT];
    const size_t stride = (size_t)(c + 30) / 16 * 16, bytes = (size_t)rows * stride * sizeof(float);
    float *table = calloc(bytes, 1);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < c; i++) table[(size_t)r * stride + (size_t)i] = (float)pick(-100, 100) / 64.f;
    return net_tensor(n, EL_FLOAT32, table, bytes);
}

static void draw_link(int32_t *ints, int64_t link_c) {
    const int c_out = ints[EL_C_OUT];
    ints[EL_LINK_C] = (int32_t)link_c;
    ints[EL_LINK] = link_c == c_out ? EL_LINK_IDENTITY : link_c > c_out ? EL_LINK_SQUEEZE : EL_LINK_EXPAND;
    int32_t *k = ints + EL_LINK_WINDOW;
    if (!pick(0, 2)) return;
    ints[EL_LINK_POOL] = pick(1, 2);
    draw_window(k, 3, 0);
    k[2] = ints[EL_WINDOW + 2], k[3] = ints[EL_WINDOW + 3];
    k[4] = pick(0, k[0] - 1), k[5] = pick(0, k[1] - 1), k[6] = k[7] = 1;
}

static void draw_conv(net *n, const image *values, const int32_t *wires) {
    const int c = (int)values[wires[0]].c, is_real = pick(0, 3) == 0, kind = pick(0, 3);
    int32_t ints[EL_INTS] = {c, pick(0, 2) ? pick(1, 80) : c};
    draw_window(ints + EL_WINDOW, 5, 2);
    ints[EL_PAD_END] = pick(0, 2), ints[EL_PAD_END + 1] = pick(0, 2);
    if (pick(0, 5) == 0) ints[EL_WINDOW + 4] = ints[EL_WINDOW + 5] = -1;
    ints[EL_GROUPS] = 1;
    if (kind == 0 && c > 1) ints[EL_GROUPS] = ints[EL_C_OUT] = c;
    if (kind == 1 && !is_real && c % 2 == 0) ints[EL_GROUPS] = 2, ints[EL_C_OUT] = 2 * pick(1, 40);
    ints[EL_PAD_VALUE] = is_real ? 0 : pick(-1, 1);
    ints[EL_HAS_K] = !is_real && ints[EL_GROUPS] == 1 && pick(0, 1);
    ints[EL_ACT] = pick(0, 2), ints[EL_HAS_AFFINE] = pick(0, 2) == 0, ints[EL_HAS_POST] = pick(0, 2) == 0;
    for (int i = 0; i < 8; i++) ints[EL_LINK_WINDOW + i] = i < 4 || i > 5;
    if (wires[1] >= 0) draw_link(ints, values[wires[1]].c);
    el_step_record *s = net_step(n, EL_CONV, 3, wires);
    memcpy(s->ints, ints, sizeof ints);
    s->constants[0] = -.5f, s->constants[1] = 1.25f, s->constants[2] = .37f;
    s->tensors[0] = draw_weight(n, ints, is_real, is_real && ints[EL_GROUPS] == 1 && pick(0, 1));
    s->tensors[1] = draw_table(n, ints);
    if (!is_real && pick(0, 1)) s->tensors[2] = float_tensor(n, c);
    if (is_real || pick(0, 2)) return;
    uint32_t *flip = calloc((size_t)c, sizeof *flip);
    for (int i = 0; i < c; i++) flip[i] = pick(0, 1) ? 0x80000000u : 0;
    s->tensors[3] = net_tensor(n, EL_INT32, flip, (size_t)c * sizeof *flip);
}

static void draw_channels(net *n, el_step_record *s, int c) {
    const int count = pick(1, 90), in_a_row = pick(0, 1);
    int32_t *index = malloc((size_t)count * sizeof *index);
    for (int i = 0; i < count; i++)
        index[i] = in_a_row && i && pick(0, 6) && index[i - 1] + 1 < c ? index[i - 1] + 1 : pick(0, c - 1);
    s->tensors[0] = net_tensor(n, EL_INT32, index, (size_t)count * sizeof *index);
}

static int divisor(int64_t c) {
    int d = pick(1, 8);
    while (c % d) d--;
    return pick(0, 6) ? d : (int)c;
}

static void fill(net *n, el_step_record *s, const image *x) {
    switch (s->kind) {
        case EL_POOL:
            draw_window(s->ints, 4, 0);
            s->ints[4] = pick(0, s->ints[0] - 1), s->ints[5] = pick(0, s->ints[1] - 1);
            s->ints[8] = pick(0, 1), s->ints[9] = pick(0, 1), s->ints[10] = pick(1, 2), s->ints[11] = pick(0, 1);
            break;
        case EL_BINARY: s->ints[0] = pick(0, EL_BINARY_OPS - 1); break;
        case EL_UNARY:
            s->ints[0] = pick(0, EL_UNARY_OPS - 1);
            s->constants[0] = s->ints[0] == EL_CLIP ? -1.f : .3f, s->constants[1] = 2.f;
            break;
        case EL_AFFINE:
        case EL_NORM:
            if (pick(0, 2)) s->tensors[0] = float_tensor(n, x->c);
            if (pick(0, 2)) s->tensors[1] = float_tensor(n, x->c);
            s->ints[0] = divisor(x->c), s->ints[1] = pick(0, 1), s->constants[0] = 1e-5f;
            break;
        case EL_PRELU: s->tensors[0] = float_tensor(n, x->c); break;
        case EL_CHANNELS: draw_channels(n, s, (int)x->c); break;
        case EL_INPUT_SCALE:
            draw_window(s->ints, 4, 2);
            s->ints[8] = pick(0, 1), s->ints[9] = pick(0, 1), s->ints[10] = divisor(x->c);
            if (pick(0, 4) == 0) s->ints[4] = s->ints[5] = -1;
            break;
        case EL_PAD:
            for (int i = 0; i < 4; i++) s->ints[i] = pick(0, 2);
            s->constants[0] = real();
            break;
    }
}

static int is_factor(int64_t b, int64_t a) { return b == 1 || a == b; }

/* A value that can be combined with this one: a constant, if there is none. */
static int32_t factor_of(net *n, const image *values, int count, const image *a) {
    for (int tries = 0; tries < 3; tries++) {
        const int i = pick(0, count - 1);
        const image *b = values + i;
        if (b == a && pick(0, 3)) continue;
        if (is_factor(b->n, a->n) && is_factor(b->h, a->h) && is_factor(b->w, a->w) && a->c % b->c == 0) return i;
    }
    el_step_record *s = net_step(n, EL_CONST, 0, NULL);
    const int64_t sizes[4] = {pick(0, 1) ? 1 : a->n, pick(0, 1) ? 1 : a->h, pick(0, 1) ? 1 : a->w,
                              pick(0, 1) ? a->c : divisor(a->c)};
    for (int i = 0; i < 4; i++) s->ints[i] = (int32_t)sizes[i];
    s->tensors[0] = float_tensor(n, sizes[0] * sizes[1] * sizes[2] * sizes[3]);
    return -1;
}

int draw_step(net *n, const image *values) {
    const int count = n->n_inputs + n->n_steps;
    const int source = pick(0, 2) ? count - 1 : pick(0, count - 1);
    const image *x = values + source;
    int32_t wires[8] = {source, -1, -1};
    const int kind = pick(0, 2) == 0 ? EL_CONV : pick(0, 3) == 0 ? EL_BINARY : pick(0, EL_KINDS - 1);
    int n_wires = 1;
    if (x->n < 1 || kind == EL_CONST || (kind == EL_FLATTEN && x->h * x->w * x->c > 3000)) return 0;
    if (kind == EL_CONV) {
        wires[1] = pick(0, 2) == 0 ? -1 : pick(0, 2) ? source : pick(0, count - 1);
        for (int i = 0; i < count; i++)
            if (pick(0, 1) && values[i].n == x->n && values[i].h <= x->h && values[i].w <= x->w) wires[2] = i;
        if (pick(0, 1)) wires[2] = -1;
        draw_conv(n, values, wires);
        return 1;
    }
    if (kind == EL_BINARY) {
        n_wires = 2;
        wires[1] = factor_of(n, values, count, x);
        if (wires[1] < 0) return 1;
    }
    for (int i = 0; kind == EL_CONCAT && i < count && n_wires < 6; i++)
        if (pick(0, 2) == 0 && values[i].n == x->n && values[i].h == x->h && values[i].w == x->w) wires[n_wires++] = i;
    fill(n, net_step(n, kind, n_wires, wires), x);
    return 1;
}

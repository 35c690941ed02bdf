/* Validity of plans: nothing is computed with a plan that el_is_bad() refuses. */
#include "rows.h"

static int is_bad_window(const el_window *w) {
    const int64_t most = EL_MAX_REACH;
    return w->kh < 1 || w->kw < 1 || w->sh < 1 || w->sw < 1 || w->ph < 0 || w->pw < 0 || w->dh < 1 || w->dw < 1 ||
           w->sh > most || w->sw > most || w->ph > most || w->pw > most || (int64_t)w->kh * w->dh > most ||
           (int64_t)w->kw * w->dw > most;
}

/* Return whether a window, at one of its n places along an axis, holds no pixel of the image. */
static int is_outside(int taps, int stride, int padding, int dilation, int size, int n) {
    for (int64_t o = 0; o < n; o++) {
        int64_t at = o * stride - padding;
        int t = 0;
        while (t < taps && at < 0) at += dilation, t++;
        if (t == taps || at >= size) return 1;
    }
    return 0;
}

static int has_empty_window(const el_window *k, int h, int w, int oh, int ow) {
    return is_outside(k->kh, k->sh, k->ph, k->dh, h, oh) || is_outside(k->kw, k->sw, k->pw, k->dw, w, ow);
}

int el_is_bad(const el_plan *p) {
    if (p->n < 0 || p->h < 1 || p->w < 1 || p->c_in < 1 || p->oh < 0 || p->ow < 0 || p->c_out < 1) return 1;
    if (is_bad_window(&p->conv) || (int64_t)p->conv.kh * p->conv.kw > EL_MAX_TAPS) return 1;
    if (p->is_pool) {
        if (p->link != EL_LINK_IDENTITY || !p->link_pool || p->link_c != p->c_in || p->c_out != p->c_in) return 1;
        if (p->link_h != p->h || p->link_w != p->w) return 1;
    } else if (!p->table || !p->weight || p->table_stride % 16 || p->table_stride < p->c_out + 15) {
        return 1;
    }
    if (p->groups < 1 || p->c_in % p->groups || p->c_out % p->groups) return 1;
    if (p->pad_value < -1 || p->pad_value > 1) return 1;
    if (p->has_k && (p->groups != 1 || p->real)) return 1;
    if (p->real && p->groups > 1 && !is_depthwise(p)) return 1;
    if (p->int8 && (!p->real || p->is_pool || p->groups > 1 || el_inputs_of(p) > EL_INT8_MOST_INPUTS)) return 1;
    if (p->act < 0 || p->act > EL_ACT_PRELU || p->link < 0 || p->link > EL_LINK_EXPAND) return 1;
    if (p->link_pool < 0 || p->link_pool > EL_POOL_AVG) return 1;
    if (!p->link) return 0;
    if (p->link_c < 1 || p->link_h < 1 || p->link_w < 1) return 1;
    if (p->link == EL_LINK_IDENTITY && p->link_c != p->c_out) return 1;
    if (p->link == EL_LINK_SQUEEZE && p->link_c < p->c_out) return 1;
    if (p->link_pool == EL_POOL_NONE) return p->link_h != p->oh || p->link_w != p->ow;
    if (is_bad_window(&p->pool) || (int64_t)p->pool.kh * p->pool.kw > EL_MAX_POOL) return 1;
    return has_empty_window(&p->pool, p->link_h, p->link_w, p->oh, p->ow);
}

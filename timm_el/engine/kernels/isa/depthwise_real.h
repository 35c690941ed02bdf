/* dot_depthwise() of a real half with a fused multiply-add of vectors. */

/* Return a * b + c, rounded once. */
INLINE vf fused(vf a, vf b, vf c) {
#if LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

/* V vectors of channels, of which the last one has n channels. */
INLINE void dot_taps(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c, int n,
                     float *out, const int V) {
    vf sum[4];
    for (int v = 0; v < V; v++) sum[v] = (vf){0};
    weight += c;
    for (int t = 0; t < n_taps; t++, weight += weight_stride)
        for (int v = 0; v < V; v++) {
            const float *x = taps[t] + c + v * LANES;
            sum[v] = fused(n < LANES ? load_some(x, n) : load_floats(x), load_floats(weight + v * LANES), sum[v]);
        }
    for (int v = 0; v < V; v++) store_floats(out + c + v * LANES, sum[v]);
}

/* Weights have a multiple of 16 channels, and sums one of 64. */
static void dot_depthwise(const float *const *taps, int n_taps, const float *weight, int weight_stride, int c,
                          float *out) {
    int i = 0;
    for (; i + 4 * LANES <= c; i += 4 * LANES) dot_taps(taps, n_taps, weight, weight_stride, i, LANES, out, 4);
    for (; i + LANES <= c; i += LANES) dot_taps(taps, n_taps, weight, weight_stride, i, LANES, out, 1);
    if (i < c) dot_taps(taps, n_taps, weight, weight_stride, i, c - i, out, 1);
}

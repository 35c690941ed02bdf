/* What a step's record must hold: numbers of wires, tensors and their sizes, ranges of integers. */
#include "program.h"

#include <stdlib.h>

const char *const el_kind_names[EL_KINDS] = {
    "conv", "pool", "mean", "binary", "unary", "affine", "prelu", "norm", "concat", "channels", "const", "input_scale",
    "flatten", "pad",
};

typedef struct {
    const char *name;
    int32_t low, high;
} range;

#define SIDE 32768 /* EL_MAX_REACH */
#define ANY_SIZE 0x7fffffff
#define WINDOW(padding)                                                                                              \
    {"kernel height", 1, EL_MAX_TAPS}, {"kernel width", 1, EL_MAX_TAPS}, {"stride", 1, SIDE}, {"stride", 1, SIDE},    \
        {"padding", padding, SIDE}, {"padding", padding, SIDE}, {"dilation", 1, SIDE}, {"dilation", 1, SIDE}
#define ENDS {"padding after the image", 0, SIDE}, {"padding after the image", 0, SIDE}
#define CHANNELS {"channels", 1, EL_MAX_CHANNELS}

static const range conv_ints[EL_CONV_INTS] = {
    CHANNELS, CHANNELS, WINDOW(-1), ENDS, {"groups", 1, EL_MAX_CHANNELS}, {"pad_value", -1, 1}, {"has_k", 0, 1},
    {"act", 0, EL_ACT_PRELU}, {"has_affine", 0, 1}, {"has_post", 0, 1}, {"link", 0, EL_LINK_EXPAND},
    {"link channels", 0, EL_MAX_CHANNELS}, {"link pool", 0, EL_POOL_AVG}, WINDOW(0)};
static const range pool_ints[EL_POOL_INTS] = {WINDOW(0), ENDS, {"mode", EL_POOL_MAX, EL_POOL_AVG}, {"ceil", 0, 1}};
static const range scale_ints[EL_SCALE_INTS] = {WINDOW(-1), ENDS, {"groups", 1, EL_MAX_CHANNELS}};
static const range binary_ints[] = {{"op", 0, EL_BINARY_OPS - 1}};
static const range unary_ints[] = {{"op", 0, EL_UNARY_OPS - 1}};
static const range norm_ints[] = {{"groups", 1, EL_MAX_CHANNELS}, {"over_pixels", 0, 1}};
static const range const_ints[] = {{"images", 1, ANY_SIZE}, {"height", 1, ANY_SIZE}, {"width", 1, ANY_SIZE}, CHANNELS};
static const range pad_ints[] = {{"left", 0, SIDE}, {"right", 0, SIDE}, {"top", 0, SIDE}, {"bottom", 0, SIDE}};

typedef struct {
    const char *name;
    int optional;
    uint32_t dtypes; /* bits */
} tensor_rule;

#define FLOATS (1u << EL_FLOAT32)

static const struct {
    int needed, optional; /* wires: those that must be a value, those that may be -1 */
    const range *ints;
    int n_ints;
    tensor_rule tensors[EL_TENSORS];
} rules[EL_KINDS] = {
    [EL_CONV] = {1, 2, conv_ints, EL_CONV_INTS,
                 {{"weight", 0, FLOATS | 1u << EL_BITS | 1u << EL_INT8},
                  {"table", 0, FLOATS},
                  {"threshold", 1, FLOATS},
                  {"flip", 1, 1u << EL_INT32}}},
    [EL_POOL] = {1, 0, pool_ints, EL_POOL_INTS, {{0}}},
    [EL_MEAN] = {1, 0, NULL, 0, {{0}}},
    [EL_BINARY] = {2, 0, binary_ints, 1, {{0}}},
    [EL_UNARY] = {1, 0, unary_ints, 1, {{0}}},
    [EL_AFFINE] = {1, 0, NULL, 0, {{"scale", 1, FLOATS}, {"shift", 1, FLOATS}}},
    [EL_PRELU] = {1, 0, NULL, 0, {{"slope", 0, FLOATS}}},
    [EL_NORM] = {1, 0, norm_ints, 2, {{"scale", 1, FLOATS}, {"shift", 1, FLOATS}}},
    [EL_CONCAT] = {-1, 0, NULL, 0, {{0}}},
    [EL_CHANNELS] = {1, 0, NULL, 0, {{"index", 0, 1u << EL_INT32}}},
    [EL_CONST] = {0, 0, const_ints, 4, {{"data", 0, FLOATS}}},
    [EL_INPUT_SCALE] = {1, 0, scale_ints, EL_SCALE_INTS, {{0}}},
    [EL_FLATTEN] = {1, 0, NULL, 0, {{0}}},
    [EL_PAD] = {1, 0, pad_ints, 4, {{0}}},
};

static int check_wires(const el_program_step *s, const el_error *e) {
    const int n = s->record->n_wires, needed = rules[s->record->kind].needed,
              all = needed + rules[s->record->kind].optional;
    if (needed < 0 ? n < 1 : n != all) return el_say(e, "reads %d values, expected %d", n, needed < 0 ? 1 : all);
    for (int i = 0; i < n; i++)
        if (s->wires[i] < 0 && (needed < 0 || i < needed)) return el_say(e, "wire %d is -1, expected a value", i);
    return EL_OK;
}

static int check_tensors(const el_program_step *s, const el_tensor_record *tensors, const el_error *e) {
    for (int i = 0; i < EL_TENSORS; i++) {
        const tensor_rule *rule = &rules[s->record->kind].tensors[i];
        const int at = s->record->tensors[i];
        if (at < 0 && rule->name && !rule->optional) return el_say(e, "there is no %s", rule->name);
        if (at < 0) continue;
        if (!rule->name) return el_say(e, "there is a tensor %d, expected -1", i);
        if (!(rule->dtypes >> tensors[at].dtype & 1))
            return el_say(e, "%s has dtype %u, which it cannot have", rule->name, tensors[at].dtype);
    }
    return EL_OK;
}

static int check_ints(const el_program_step *s, const el_error *e) {
    const range *r = rules[s->record->kind].ints;
    for (int i = 0; i < rules[s->record->kind].n_ints; i++)
        if (s->record->ints[i] < r[i].low || s->record->ints[i] > r[i].high)
            return el_say(e, "%s is %d, expected %d to %d", r[i].name, s->record->ints[i], r[i].low, r[i].high);
    return EL_OK;
}

/* A window's product and reach; whether padding may be SAME, -1 on both axes, its range has said. */
static int check_window(const int32_t *k, int most_taps, const el_error *e) {
    if ((int64_t)k[0] * k[1] > most_taps)
        return el_say(e, "kernel is %d x %d, expected at most %d taps", k[0], k[1], most_taps);
    if ((int64_t)k[0] * k[6] > SIDE || (int64_t)k[1] * k[7] > SIDE)
        return el_say(e, "kernel of %d x %d with dilation %d x %d, expected to reach over at most %d pixels", k[0],
                      k[1], k[6], k[7], SIDE);
    if ((k[4] < 0) != (k[5] < 0))
        return el_say(e, "padding is %d and %d, expected -1 twice or not at all", k[4], k[5]);
    return EL_OK;
}

static int expect_bytes(const el_program_step *s, int tensor, int64_t expected, const el_error *e) {
    if (s->record->tensors[tensor] < 0 || s->bytes[tensor] == expected) return EL_OK;
    return el_say(e, "%s has %lld bytes, expected %lld", rules[s->record->kind].tensors[tensor].name,
                  (long long)s->bytes[tensor], (long long)expected);
}

int64_t el_bytes_of_row(int channels) { return (channels + 30) / 16 * 16 * (int64_t)sizeof(float); }

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Bytes of a weight as layout.py stores it. */
static int64_t stored_bytes(const el_program_step *s) {
    const int32_t *ints = s->record->ints;
    const int real = s->real;
    const int64_t c_in = ints[EL_C_IN], c_out = ints[EL_C_OUT], groups = ints[EL_GROUPS];
    const int64_t taps = (int64_t)ints[EL_WINDOW] * ints[EL_WINDOW + 1];
    if (s->int8) return c_out * taps * c_in;
    if (groups > 1 && groups == c_in && c_in == c_out)
        return real ? taps * up(c_out, 16) * 4 : taps * up(c_out, 64) / 8;
    if (real) return up(c_out, EL_REAL_BLOCK) * taps * c_in * 4;
    return groups * up(c_out / groups, 8) * taps * up(c_in / groups, 64) / 8;
}

static int check_conv(const el_program_step *s, const el_error *e) {
    const int32_t *ints = s->record->ints;
    const int real = s->real, has_link = s->wires[1] >= 0;
    const int c_in = ints[EL_C_IN], c_out = ints[EL_C_OUT], groups = ints[EL_GROUPS];
    const int rows = 2 + (ints[EL_ACT] == EL_ACT_PRELU) + 2 * ints[EL_HAS_AFFINE] + 3 * ints[EL_HAS_POST];
    if (check_window(ints + EL_WINDOW, EL_MAX_TAPS, e)) return EL_BAD_PLAN;
    if (check_window(ints + EL_LINK_WINDOW, ints[EL_LINK_POOL] ? EL_MAX_POOL : EL_MAX_TAPS, e)) return EL_BAD_PLAN;
    if (c_in % groups || c_out % groups)
        return el_say(e, "groups is %d, expected a divisor of %d and %d channels", groups, c_in, c_out);
    if (real && groups > 1 && !(groups == c_in && c_in == c_out))
        return el_say(e, "groups is %d, expected 1 or %d for a real weight", groups, c_in);
    if (s->int8 && (groups > 1 || (int64_t)ints[EL_WINDOW] * ints[EL_WINDOW + 1] * c_in > EL_INT8_MOST_INPUTS))
        return el_say(e, "an int8 weight of %d groups and %d x %d taps of %d channels, expected 1 group and %d inputs",
                      groups, ints[EL_WINDOW], ints[EL_WINDOW + 1], c_in, EL_INT8_MOST_INPUTS);
    if (ints[EL_HAS_K] && (groups > 1 || real))
        return el_say(e, "has_k with groups %d, expected a binary weight and groups 1", groups);
    if (real && (s->tensors[2] || s->tensors[3]))
        return el_say(e, "there is a threshold or flip, expected none for a real weight");
    if (has_link != (ints[EL_LINK] != EL_LINK_NONE))
        return el_say(e, "link is %d, and the value that it reads %d", ints[EL_LINK], s->wires[1]);
    if (has_link && ints[EL_LINK_C] < 1) return el_say(e, "link channels is 0, expected at least 1");
    if (ints[EL_LINK] == EL_LINK_IDENTITY && ints[EL_LINK_C] != c_out)
        return el_say(e, "link channels is %d, expected %d for an identity", ints[EL_LINK_C], c_out);
    if (ints[EL_LINK] == EL_LINK_SQUEEZE && ints[EL_LINK_C] < c_out)
        return el_say(e, "link channels is %d, expected at least %d for a squeeze", ints[EL_LINK_C], c_out);
    if (expect_bytes(s, 0, stored_bytes(s), e) || expect_bytes(s, 1, rows * el_bytes_of_row(c_out), e))
        return EL_BAD_PLAN;
    return expect_bytes(s, 2, c_in * INT64_C(4), e) || expect_bytes(s, 3, c_in * INT64_C(4), e) ? EL_BAD_PLAN : EL_OK;
}

/* Copy the index of a CHANNELS step as spans: a file that changes later cannot make it wrong. */
static int take_channels(el_program_step *s, const el_error *e) {
    const int32_t *index = s->tensors[0];
    const int64_t n = s->bytes[0] / 4;
    if (s->bytes[0] % 4 || n < 1 || n > EL_MAX_CHANNELS)
        return el_say(e, "index has %lld bytes, expected 4 for each of 1 to %d channels", (long long)s->bytes[0],
                      EL_MAX_CHANNELS);
    s->spans = malloc((size_t)n * sizeof *s->spans);
    if (!s->spans) return el_say_no_memory(e);
    s->n_channels = (int)n;
    for (int i = 0; i < n; i++) {
        const int32_t channel = index[i];
        if (channel < 0 || channel >= EL_MAX_CHANNELS)
            return el_say(e, "index %d is %d, expected a channel", i, channel);
        if (channel > s->last_channel) s->last_channel = channel;
        el_span *last = i ? s->spans + s->n_spans - 1 : NULL;
        if (last && channel == last->from + last->count) last->count++;
        else s->spans[s->n_spans++] = (el_span){channel, 1};
    }
    return EL_OK;
}

static int check_const(const el_program_step *s, const el_error *e) {
    const int32_t *ints = s->record->ints;
    int64_t floats = 1;
    for (int i = 0; i < 4; i++) {
        floats *= ints[i];
        if (floats > EL_MAX_TENSOR_BYTES / 4)
            return el_say(e, "%d x %d x %d x %d numbers are too many", ints[0], ints[1], ints[2], ints[3]);
    }
    return expect_bytes(s, 0, 4 * floats, e);
}

int el_check_step(el_program_step *s, const el_tensor_record *tensors, const el_error *e) {
    if (check_wires(s, e) || check_tensors(s, tensors, e) || check_ints(s, e)) return EL_BAD_PLAN;
    switch (s->record->kind) {
        case EL_CONV:
            s->int8 = tensors[s->record->tensors[0]].dtype == EL_INT8;
            s->real = s->int8 || tensors[s->record->tensors[0]].dtype == EL_FLOAT32;
            return check_conv(s, e);
        case EL_POOL: return check_window(s->record->ints, EL_MAX_POOL, e);
        case EL_INPUT_SCALE: return check_window(s->record->ints, EL_MAX_TAPS, e);
        case EL_CHANNELS: return take_channels(s, e);
        case EL_CONST: return check_const(s, e);
    }
    return EL_OK;
}

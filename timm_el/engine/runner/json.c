/* As much of JSON as a program's metadata needs: finding a key, walking through an array, strings and numbers. Nothing
 * is believed: a text that is no JSON gives nothing, and nesting ends at a depth. */
#include "runner.h"

#include <stdlib.h>
#include <string.h>

#define MOST_DEPTH 64

static const char *skip_space(const char *p, const char *end) {
    while (p < end && (*p == ' ' || *p == '\t' || *p == '\n' || *p == '\r')) p++;
    return p;
}

static const char *skip_string(const char *p, const char *end) {
    for (p++; p < end; p++) {
        if (*p == '\\') p++;
        else if (*p == '"') return p + 1;
    }
    return NULL;
}

/* What follows a value; NULL if it does not end. */
static const char *skip_value(const char *p, const char *end) {
    int depth = 0;
    for (p = skip_space(p, end); p < end;) {
        if (*p == '"') {
            if (!(p = skip_string(p, end))) return NULL;
        } else if (*p == '{' || *p == '[') {
            if (++depth > MOST_DEPTH) return NULL;
            p++;
        } else if (*p == '}' || *p == ']') {
            if (--depth < 0) return p;
            p++;
        } else if (*p == ',' && depth == 0) {
            return p;
        } else {
            p++;
            continue;
        }
        if (depth == 0) return p;
    }
    return depth ? NULL : p;
}

static const json nothing = {NULL, NULL};

json json_get(json object, const char *key) {
    const char *p = object.at ? skip_space(object.at, object.end) : NULL;
    if (!p || p == object.end || *p++ != '{') return nothing;
    while ((p = skip_space(p, object.end)) < object.end && *p == '"') {
        const char *name = p + 1;
        if (!(p = skip_string(p, object.end))) return nothing;
        const int found = (size_t)(p - 1 - name) == strlen(key) && !memcmp(name, key, strlen(key));
        p = skip_space(p, object.end);
        if (p == object.end || *p++ != ':') return nothing;
        const char *value = skip_space(p, object.end);
        if (!(p = skip_value(value, object.end))) return nothing;
        if (found) return (json){value, p};
        p = skip_space(p, object.end);
        if (p == object.end || *p++ != ',') return nothing;
    }
    return nothing;
}

json json_next(json array, json previous) {
    const char *p = previous.at ? previous.end : array.at;
    if (!p) return nothing;
    p = skip_space(p, array.end);
    if (p == array.end || *p++ != (previous.at ? ',' : '[')) return nothing;
    p = skip_space(p, array.end);
    const char *after = skip_value(p, array.end);
    return after && after > p ? (json){p, after} : nothing;
}

static unsigned hex(const char *p, const char *end) {
    unsigned code = 0;
    for (int i = 0; i < 4; i++, p++) {
        const char c = p < end ? *p : '0';
        code = code << 4 | (unsigned)(c >= '0' && c <= '9'   ? c - '0'
                                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                             : 0);
    }
    return code;
}

static size_t utf8(unsigned code, char *to) {
    if (code < 0x80) return to[0] = (char)code, 1;
    if (code < 0x800) return to[0] = (char)(0xc0 | code >> 6), to[1] = (char)(0x80 | (code & 63)), 2;
    to[1] = (char)(0x80 | (code >> 6 & 63)), to[2] = (char)(0x80 | (code & 63));
    if (code < 0x10000) return to[0] = (char)(0xe0 | code >> 12), 3;
    to[3] = to[2], to[2] = to[1], to[1] = (char)(0x80 | (code >> 12 & 63)), to[0] = (char)(0xf0 | code >> 18);
    return 4;
}

/* The character at *p, as bytes of UTF-8. */
static size_t take_character(const char **p, const char *end, char *to) {
    const char *at = *p;
    if (*at != '\\' || at + 1 >= end) return *to = *at, *p = at + 1, 1;
    const char *const names = "nrtbf", *const meanings = "\n\r\t\b\f", *found = strchr(names, at[1]);
    *p = at + 2;
    if (at[1] != 'u') return *to = found && *found ? meanings[found - names] : at[1], 1;
    unsigned code = hex(at + 2, end);
    *p = end - at > 6 ? at + 6 : end;
    if (code >= 0xd800 && code < 0xdc00 && end - *p >= 6 && (*p)[0] == '\\' &&
        (*p)[1] == 'u') { /* the first of two halves */
        code = 0x10000 + ((code & 0x3ff) << 10) + (hex(*p + 2, end) & 0x3ff);
        *p += 6;
    }
    return utf8(code, to);
}

int json_text(json value, char *text, size_t bytes) {
    if (!value.at || value.end - value.at < 2 || *value.at != '"' || value.end[-1] != '"') return 0;
    const char *p = value.at + 1, *end = value.end - 1;
    size_t n = 0;
    while (p < end) {
        char character[4];
        const size_t more = take_character(&p, end, character);
        if (n + more + 1 > bytes) break;
        memcpy(text + n, character, more);
        n += more;
    }
    text[n] = 0;
    return 1;
}

int json_numbers(json array, double *numbers, int n) {
    int count = 0;
    for (json v = json_next(array, nothing); v.at && count < n; v = json_next(array, v)) {
        char text[40], *after;
        const size_t length = (size_t)(v.end - v.at) < sizeof text - 1 ? (size_t)(v.end - v.at) : sizeof text - 1;
        memcpy(text, v.at, length);
        text[length] = 0;
        numbers[count++] = strtod(text, &after);
        if (after == text) return 0;
    }
    return count;
}

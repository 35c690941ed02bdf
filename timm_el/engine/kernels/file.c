/* A program in a file: mapped into memory, its parts inside of it and undamaged. */
#include "program.h"

#include <stdlib.h>
#include <string.h>
#if defined(_WIN32)
#include <stdio.h>
#include <windows.h>
#define MOST_PATH 4096 /* characters */
#elif !defined(__wasm__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

/* zlib's CRC-32, eight bytes at a time: table t holds what a byte does t places before the last of them. */
static uint32_t crc_tables[8][256];

static void make_crc_tables(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
        crc_tables[0][i] = c;
    }
    for (int t = 1; t < 8; t++)
        for (int i = 0; i < 256; i++)
            crc_tables[t][i] = crc_tables[t - 1][i] >> 8 ^ crc_tables[0][crc_tables[t - 1][i] & 255];
}

uint32_t el_crc32(uint32_t crc, const void *data, size_t bytes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const unsigned char *p = data;
    pthread_once(&once, make_crc_tables);
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint32_t low, high;
        memcpy(&low, p, 4), memcpy(&high, p + 4, 4);
        low ^= crc;
        crc = 0;
        for (int i = 0; i < 4; i++)
            crc ^= crc_tables[7 - i][low >> 8 * i & 255] ^ crc_tables[3 - i][high >> 8 * i & 255];
    }
    for (; bytes; bytes--, p++) crc = crc >> 8 ^ crc_tables[0][(crc ^ *p) & 255];
    return ~crc;
}

/* ------------------------------------------------------------------------------------------------------------------ */

#if defined(_WIN32)
/* Open a file by its path in UTF-8, as Python gives it, or in the system's code page, as a program's arguments are. */
static FILE *open_to_read(const char *path) {
    wchar_t wide[MOST_PATH];
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, MOST_PATH)) return _wfopen(wide, L"rb");
    return fopen(path, "rb");
}

/* Windows has no mmap: the file is read as a whole. */
static void *map_file(const char *path, size_t *bytes) {
    FILE *f = open_to_read(path);
    void *data = NULL;
    if (!f) return NULL;
    const int64_t size = _fseeki64(f, 0, SEEK_END) ? -1 : _ftelli64(f);
    if (size > 0 && !_fseeki64(f, 0, SEEK_SET) && (data = el_aligned_alloc(64, (size_t)size)) &&
        fread(data, 1, (size_t)size, f) != (size_t)size) {
        el_aligned_free(data);
        data = NULL;
    }
    fclose(f);
    *bytes = (size_t)size;
    return data;
}

static void unmap_file(const void *data, size_t bytes) {
    (void)bytes;
    el_aligned_free((void *)(uintptr_t)data);
}
#elif defined(__wasm__)
/* A web page has no files, but their bytes: el_open_memory takes them. */
static void *map_file(const char *path, size_t *bytes) { return (void)path, (void)bytes, NULL; }

static void unmap_file(const void *data, size_t bytes) { (void)data, (void)bytes; }
#else
static void *map_file(const char *path, size_t *bytes) {
    struct stat about;
    const int f = open(path, O_RDONLY | O_CLOEXEC);
    if (f < 0) return NULL;
    void *data = MAP_FAILED;
    if (!fstat(f, &about) && S_ISREG(about.st_mode) && about.st_size > 0)
        data = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, f, 0);
    close(f);
    *bytes = data == MAP_FAILED ? 0 : (size_t)about.st_size;
    return data == MAP_FAILED ? NULL : data;
}

static void unmap_file(const void *data, size_t bytes) { munmap((void *)(uintptr_t)data, bytes); }
#endif

void el_unmap(el_program *p) {
    if (p->mapped) unmap_file(p->file, p->file_bytes);
}

/* ------------------------------------------------------------------------------------------------------------------ */

static int is_inside(uint64_t offset, uint64_t bytes, uint64_t size) {
    return bytes <= size && offset <= size - bytes;
}

static int check_table(const char *file, size_t bytes, el_header *h, const el_error *e) {
    if (bytes < sizeof *h)
        return el_say(e, "found a file of %zu bytes, expected a program of at least %zu", bytes, sizeof *h);
    memcpy(h, file, sizeof *h);
    if (memcmp(h->magic, EL_MAGIC, sizeof h->magic))
        return el_say(e, "this is no program: it does not begin with 'timm_el' and 1");
    if (h->version != EL_VERSION) return el_say(e, "the program has version %u, expected %d", h->version, EL_VERSION);
    if (h->file_bytes != bytes)
        return el_say(e, "found a file of %zu bytes, expected %llu: it is cut off or damaged", bytes,
                      (unsigned long long)h->file_bytes);
    if (h->table_bytes < sizeof *h || h->table_bytes > bytes)
        return el_say(e, "the table has %u bytes, of a file of %zu", h->table_bytes, bytes);
    el_header blank = *h;
    blank.table_crc = 0;
    const uint32_t crc =
        el_crc32(el_crc32(0, &blank, sizeof blank), file + sizeof blank, h->table_bytes - sizeof blank);
    if (crc != h->table_crc)
        return el_say(e, "the table's checksum is %08x, expected %08x: the file is damaged", crc, h->table_crc);
    return EL_OK;
}

static int check_metadata(const char *file, const el_header *h, const el_error *e) {
    if (!is_inside(h->meta_offset, h->meta_bytes, h->file_bytes))
        return el_say(e, "the metadata has %llu bytes at %llu, outside of the file", (unsigned long long)h->meta_bytes,
                      (unsigned long long)h->meta_offset);
    const uint32_t crc = el_crc32(0, file + h->meta_offset, h->meta_bytes);
    if (crc != h->meta_crc)
        return el_say(e, "the metadata's checksum is %08x, expected %08x: the file is damaged", crc, h->meta_crc);
    return EL_OK;
}

/* The addresses of all tensors, which lie in the file; to be freed. */
static const void **find_tensors(const char *file, const el_header *h, const el_error *e) {
    const uint64_t records = (uint64_t)h->n_tensors * sizeof(el_tensor_record);
    if (records > h->table_bytes) {
        el_say(e, "found %u tensors in a table of %u bytes", h->n_tensors, h->table_bytes);
        return NULL;
    }
    const void **tensors = malloc(((size_t)h->n_tensors + 1) * sizeof *tensors);
    if (!tensors) el_say_no_memory(e);
    for (uint32_t i = 0; tensors && i < h->n_tensors; i++) {
        el_tensor_record t;
        memcpy(&t, file + (h->table_bytes - records) + i * sizeof t, sizeof t);
        if (t.offset % 64 == 0 && is_inside(t.offset, t.bytes, h->file_bytes)) {
            tensors[i] = file + t.offset;
            continue;
        }
        el_say(e, "tensor %u has %llu bytes at %llu, expected a multiple of 64 inside of the file", i,
               (unsigned long long)t.bytes, (unsigned long long)t.offset);
        free(tensors);
        return NULL;
    }
    return tensors;
}

int el_verify(el_program *p, const el_error *e) {
    for (uint32_t i = 0; i < p->header.n_tensors; i++) {
        const el_tensor_record *t = p->tensors + i;
        const uint32_t crc = el_crc32(0, p->file + t->offset, t->bytes);
        if (crc != t->crc)
            return el_say(e, "the checksum of tensor %u is %08x, expected %08x: the file is damaged", i, crc, t->crc);
    }
    p->verified = 1;
    return EL_OK;
}

el_program *el_open_memory(const void *memory, size_t bytes, int verify, char *text, size_t text_bytes) {
    const el_error e = {text, text_bytes, -1, ""};
    const char *file = memory;
    el_header header;
    if ((uintptr_t)file % 64) {
        el_say(&e, "the file is at %p, expected a multiple of 64", memory);
        return NULL;
    }
    if (check_table(file, bytes, &header, &e) || check_metadata(file, &header, &e)) return NULL;
    const void **tensors = find_tensors(file, &header, &e);
    el_program *p = tensors ? el_program_new(file, header.table_bytes, tensors, text, text_bytes) : NULL;
    free(tensors);
    if (!p) return NULL;
    p->file = file, p->file_bytes = bytes;
    p->metadata = header.meta_bytes ? file + header.meta_offset : NULL;
    p->verified = 0;
    if (verify && el_verify(p, &e)) {
        el_close(p);
        return NULL;
    }
    return p;
}

el_program *el_open(const char *path, int verify, char *text, size_t text_bytes) {
    const el_error e = {text, text_bytes, -1, ""};
    size_t bytes = 0;
    void *file = map_file(path, &bytes);
    if (!file) {
        el_say(&e, "the file cannot be read, or is empty");
        return NULL;
    }
    el_program *p = el_open_memory(file, bytes, verify, text, text_bytes);
    if (p) p->mapped = 1;
    else unmap_file(file, bytes);
    return p;
}

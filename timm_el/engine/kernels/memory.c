/* Memory: aligned blocks, large pages, and what a thread keeps for its next call. */
#define _GNU_SOURCE
#include "engine.h"

#include <pthread.h>
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#elif defined(__linux__)
#include <sys/mman.h>
#endif

void *el_aligned_alloc(size_t align, size_t bytes) {
    const size_t size = (bytes + align - 1) / align * align;
#if defined(_WIN32)
    return _aligned_malloc(size, align);
#else
    return aligned_alloc(align, size);
#endif
}

void el_aligned_free(void *block) {
#if defined(_WIN32)
    _aligned_free(block);
#else
    free(block);
#endif
}

/* Large pages, where the system has them: with small ones a processor looks up more addresses than it remembers. */
void el_advise(const void *memory, size_t bytes) {
#if defined(__linux__)
    const uintptr_t from = ((uintptr_t)memory + EL_HUGE_PAGE - 1) / EL_HUGE_PAGE * EL_HUGE_PAGE;
    const uintptr_t to = ((uintptr_t)memory + bytes) / EL_HUGE_PAGE * EL_HUGE_PAGE;
    if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE); /* it is advice: nothing depends on it */
#else
    (void)memory;
    (void)bytes;
#endif
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t keys[EL_SLOTS];

static void make_keys(void) {
    for (int i = 0; i < EL_SLOTS; i++) pthread_key_create(&keys[i], el_aligned_free);
}

/* The size stands in front of the block, at a cache line of its own. */
void *el_scratch(int slot, size_t bytes) {
    if (bytes > SIZE_MAX / 2) return NULL; /* where addresses have 32 bits */
    pthread_once(&once, make_keys);
    char *block = pthread_getspecific(keys[slot]);
    if (block && *(size_t *)(void *)block >= bytes) return block + 64;
    el_aligned_free(block);
    pthread_setspecific(keys[slot], NULL);
    const size_t align = bytes < EL_HUGE_PAGE ? 64 : EL_HUGE_PAGE, size = (bytes + 64 + align - 1) / align * align;
    block = el_aligned_alloc(align, size);
    if (!block) return NULL;
    el_advise(block, size);
    *(size_t *)(void *)block = size - 64;
    pthread_setspecific(keys[slot], block);
    return block + 64;
}

/* Parallel regions, on torch's own team of threads where there is one, else on a small pool.
 *
 * Two teams would get in each other's way: OpenMP's threads spin for a while after each region, on the processors that
 * ours want. Every OpenMP runtime on Linux that torch may bring (libgomp, libiomp5, libomp) has GOMP_parallel, so regions
 * run there if the process has it; the library itself is not linked with any. In a forked child OpenMP's threads are
 * gone and its runtime waits for them for ever, so a child has the pool.
 *
 * Members of a team take work from a counter, because they may be fewer than asked for: in a region inside another one,
 * or under OMP_THREAD_LIMIT. No result depends on which thread computes it.
 *
 * The pool does one job at a time: a second thread that comes while it is busy does its job alone. After a fork the
 * child has no workers; it starts new ones when it first needs them. */
#define _GNU_SOURCE
#include "engine.h"

#if defined(__wasm__) /* one thread: those of a web page share memory only where its server says so */

void el_parallel(void (*run)(void *, int), void *context, int n, int threads) {
    (void)threads;
    for (int i = 0; i < n; i++) run(context, i);
}

#else

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <dlfcn.h>
#endif

#if defined(__x86_64__) || defined(__i386__)
#define EL_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define EL_PAUSE() __asm__ volatile("yield")
#else
#define EL_PAUSE() ((void)0)
#endif

#define MAX_THREADS 256
#define SPINS 4000 /* some tens of microseconds: the gap between two layers */

static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;  /* held by the thread whose job runs */
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int workers; /* started so far; guarded by in_use */
static atomic_uint turn; /* counts jobs */
static atomic_int sleepers, running;
static struct {
    void (*run)(void *, int);
    void *context;
    int n, threads;
    atomic_int next;
} job;

static void work(void) {
    for (;;) {
        int i = atomic_fetch_add_explicit(&job.next, 1, memory_order_relaxed);
        if (i >= job.n) return;
        job.run(job.context, i);
    }
}

static void *worker(void *argument) {
    int id = (int)(intptr_t)argument;
    unsigned seen = atomic_load(&turn) - 1; /* started in the middle of a turn, which it takes part in */
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&turn, memory_order_acquire) == seen) {
            if (spins++ < SPINS) {
                EL_PAUSE();
                continue;
            }
            pthread_mutex_lock(&sleeping);
            atomic_fetch_add(&sleepers, 1);
            while (atomic_load(&turn) == seen) pthread_cond_wait(&wake, &sleeping);
            atomic_fetch_sub(&sleepers, 1);
            pthread_mutex_unlock(&sleeping);
        }
        seen++;
        /* Every worker reports each turn, so that none is still looking at a job when the next is written. */
        if (id < job.threads) work();
        atomic_fetch_sub_explicit(&running, 1, memory_order_release);
    }
    return NULL;
}

static atomic_int forked; /* this process is the child of one that had the library */

#if !defined(_WIN32)
static void child_of_fork(void) {
    atomic_store(&forked, 1);
    pthread_mutex_init(&in_use, NULL);
    pthread_mutex_init(&sleeping, NULL);
    pthread_cond_init(&wake, NULL);
    workers = 0;
    atomic_store(&sleepers, 0);
    atomic_store(&running, 0);
}

/* When the library is loaded: a process may fork before the first region, and after torch's. */
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, child_of_fork); }
#endif


typedef void (*team)(void (*member)(void *), void *data, unsigned threads, unsigned flags);

/* OpenMP's parallel region, or NULL. It may be loaded later than this library, so it is looked for until it is there. */
static team find_team(void) {
#if defined(__linux__)
    static _Atomic(team) found;
    team region = atomic_load_explicit(&found, memory_order_relaxed);
    if (!region) {
        void *symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
        memcpy(&region, &symbol, sizeof region); /* C has no cast from an object to a function */
        atomic_store_explicit(&found, region, memory_order_relaxed);
    }
    return region;
#else
    return NULL;
#endif
}

/* What one region does; on the stack of its caller, so that several may run at once. */
typedef struct {
    void (*run)(void *, int);
    void *context;
    int n;
    atomic_int next;
} shared_work;

static void take_work(void *data) {
    shared_work *w = data;
    for (int i; (i = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed)) < w->n;) w->run(w->context, i);
}

void el_parallel(void (*run)(void *, int), void *context, int n, int threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > 1 && n > 1 && !atomic_load_explicit(&forked, memory_order_relaxed)) {
        const team region = find_team();
        if (region) { /* as many as torch has, even for less work: a smaller team ends the threads that it leaves out */
            shared_work work_of_team = {run, context, n, 0};
            region(take_work, &work_of_team, (unsigned)threads, 0);
            return;
        }
    }
    if (threads > n) threads = n;
    if (threads <= 1 || pthread_mutex_trylock(&in_use) != 0) {
        for (int i = 0; i < n; i++) run(context, i);
        return;
    }
    job.run = run;
    job.context = context;
    job.n = n;
    job.threads = threads;
    atomic_store_explicit(&job.next, 0, memory_order_relaxed);
    int fresh = 0;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    atomic_store(&running, workers);
    atomic_fetch_add(&turn, 1); /* in one order with `sleepers`: a worker sees the turn, or we see it asleep */
    while (workers < threads - 1) { /* a new worker starts in this turn; without memory for it we go on without */
        pthread_t thread;
        atomic_fetch_add(&running, 1);
        if (pthread_create(&thread, &attributes, worker, (void *)(intptr_t)(workers + 1)) != 0) {
            atomic_fetch_sub(&running, 1);
            break;
        }
        workers++;
        fresh++;
    }
    pthread_attr_destroy(&attributes);
    if (workers > fresh && atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&sleeping);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleeping);
    }
    work();
    for (int spins = 0; atomic_load_explicit(&running, memory_order_acquire) > 0; spins++) {
        if (spins < SPINS) EL_PAUSE();
        else sched_yield(); /* more threads than processors */
    }
    pthread_mutex_unlock(&in_use);
}

#endif

// Independent jobs over threads: OpenMP where the compiler has it, else threads made for the call.
#pragma once
#include "vectors.h"

typedef void (*job_t)(const void *context, int64_t index);

#if !defined(_OPENMP)
#include <pthread.h>
struct crew {
    job_t job;
    const void *context;
    int64_t jobs, next;
};
static void *work(void *argument) {
    struct crew *crew = argument;
    const uint64_t mode = flush_denormals();
    for (;;) {
        const int64_t i = __atomic_fetch_add(&crew->next, 1, __ATOMIC_RELAXED);
        if (i >= crew->jobs) break;
        crew->job(crew->context, i);
    }
    restore_denormals(mode);
    return NULL;
}
#endif

// Jobs begin in their order, so that one may wait for those before it.
static void parallel(job_t job, const void *context, int64_t jobs, int threads) {
    if (threads > jobs) threads = (int)jobs;
    if (threads <= 1) {  // no runtime is woken for one thread
        const uint64_t mode = flush_denormals();
        for (int64_t i = 0; i < jobs; i++) job(context, i);
        restore_denormals(mode);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    {
        const uint64_t mode = flush_denormals();
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t i = 0; i < jobs; i++) job(context, i);
        restore_denormals(mode);
    }
#else
    struct crew crew = {job, context, jobs, 0};
    pthread_t crowd[256];
    int made = 0;
    while (made < threads - 1 && made < 256 && !pthread_create(&crowd[made], NULL, work, &crew)) made++;
    work(&crew);
    while (made) pthread_join(crowd[--made], NULL);
#endif
}

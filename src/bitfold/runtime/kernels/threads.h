/* A range of independent tasks, shared evenly among threads that end before `in_threads` returns. No pool outlives a
 * call: nothing clashes with another library's OpenMP, and nothing is lost in a fork. */
#ifndef BITFOLD_THREADS_H
#define BITFOLD_THREADS_H

#include <pthread.h>
#include <stdint.h>

#define MOST_THREADS 256

/* thread: which of the threads runs it, from 0 on. */
typedef void (*work_t)(const void *job, int64_t thread, int64_t from, int64_t to);

typedef struct {
    work_t work;
    const void *job;
    int64_t thread, from, to;
} part_t;

static void *run_part(void *given) {
    part_t *part = given;
    part->work(part->job, part->thread, part->from, part->to);
    return 0;
}

static void in_threads(work_t work, const void *job, int64_t tasks, int64_t threads) {
    pthread_t started[MOST_THREADS];
    part_t parts[MOST_THREADS];
    int running[MOST_THREADS];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > tasks) threads = tasks;
    if (threads <= 1) {
        if (tasks > 0) work(job, 0, 0, tasks);
        return;
    }
    for (int64_t t = threads - 1; t >= 0; t--) {
        parts[t] = (part_t){work, job, t, tasks * t / threads, tasks * (t + 1) / threads};
        /* The last part is this thread's own; one that cannot be started is too. */
        running[t] = t > 0 && pthread_create(&started[t], 0, run_part, &parts[t]) == 0;
        if (!running[t]) run_part(&parts[t]);
    }
    for (int64_t t = 1; t < threads; t++)
        if (running[t]) pthread_join(started[t], 0);
}

/* What a library of these kernels is known by. */
int bitfold_probe(void) { return 1; }

#endif

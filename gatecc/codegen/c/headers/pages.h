// Advice about memory that is about to be written for the first time. The system hands out a large piece of memory
// empty and stops the writer at each 4-KB page of it: 4 MB took 3.0 ms that way, half of what a kernel takes to compute
// them; 1.7 ms when asked for in one call, and 0.55 ms as huge pages. It is advice: systems that do not know it refuse.
#pragma once
#include "vectors.h"

#if defined(__linux__)
#include <sys/mman.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif
#define PAGE 4096
#define HUGE (2 << 20)
#define MANY (1 << 16)  // bytes for which a system call is worth it

INLINE void advise(char *start, int64_t bytes, int64_t page, int what) {  // on the whole pages in between
    char *const first = start + (-(uintptr_t)start & (page - 1));
    const int64_t length = (start + bytes - first) & -page;
    if (length > 0) (void)madvise(first, (size_t)length, what);
}

static int present(const char *p) {
    unsigned char found = 0;
    return mincore((void *)((uintptr_t)p & -(uintptr_t)PAGE), PAGE, &found) || found & 1;
}

// A whole output, before it is divided into jobs. Below two huge pages too little of it is a whole one.
APART void expect(void *start, int64_t bytes) {
    if (start && bytes >= 2 * HUGE) advise(start, bytes, HUGE, MADV_HUGEPAGE);
}

// The part that a job will write, in the job's thread. Memory that is used again is here already: two looks tell.
APART void populate(void *start, int64_t bytes) {
    char *const p = start;
    if (bytes < MANY || (present(p + bytes / 2) && present(p + bytes - PAGE))) return;
    advise(p, bytes, PAGE, MADV_POPULATE_WRITE);
}
#else
static void expect(void *start, int64_t bytes) { (void)start, (void)bytes; }
static void populate(void *start, int64_t bytes) { (void)start, (void)bytes; }
#endif

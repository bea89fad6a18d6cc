/* SPDX-License-Identifier: MIT
 *
 * engine: what C does, for bench_engine.py to compare with. Each between two processes.
 *
 *     engine trip SIZE COUNT CAPACITY   round trips over two rings of ours, both sides spinning
 *     engine way SIZE COUNT CAPACITY    messages one way over a ring of ours
 *     engine futex GAP COUNT            round trips of one word, both asleep: GAP us between two
 *     engine memcpy SIZE COUNT          copies in one process
 *
 * Writes numbers of 8 bytes: the nanoseconds that COUNT took, then those of single round trips,
 * which for trip are made after the others. What COUNT round trips took is the median of PARTS,
 * since somebody else may have had the processor meanwhile.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"

enum { PARTS = 20, TIMED = 10000 /* round trips, one by one, at most */ };

static void fail(const char *what, int error) {
    fprintf(stderr, "engine: %s: %s\n", what, strerror(error));
    exit(1);
}

static long number(const char *text) {
    char *end;
    long value = strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < 0 || value > 1L << 30) {
        fprintf(stderr, "engine: not a number up to 2**30: '%s'\n", text);
        exit(2);
    }
    return value;
}

static void *shared(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap", errno);
    return memory;
}

static void *allocated(size_t size) {
    void *memory = malloc(size);
    if (memory == NULL)
        fail("malloc", ENOMEM);
    memset(memory, 'x', size);
    return memory;
}

static void print(const int64_t *numbers, size_t count) {
    if (fwrite(numbers, sizeof *numbers, count, stdout) < count)
        fail("stdout", errno);
}

static pid_t other_process(void) {
    pid_t pid = fork();
    if (pid < 0)
        fail("fork", errno);
    if (pid == 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL);
    return pid;
}

/* --- over a ring ------------------------------------------------------------------------------ */

static ik_ring ring_of(uint64_t capacity) {
    uint64_t size = IK_RING_HEADER + capacity;
    void *memory = shared(size);
    ik_ring ring;
    int rc = ik_ring_create(memory, size, 0, 0);
    if (rc == 0)
        rc = ik_ring_attach(&ring, memory, size);
    if (rc < 0)
        fail("ring", -rc);
    return ring;
}

static void send_one(ik_ring *ring, const void *data, uint64_t size) {
    ik_ring_progress progress = {0};
    int rc;
    while ((rc = ik_ring_send(ring, &progress, data, size, IK_FOREVER)) == -EINTR)
        continue;
    if (rc < 0)
        fail("send", -rc);
}

static void recv_one(ik_ring *ring, void *buffer, uint64_t size) {
    int64_t rc = ik_ring_recv(ring, buffer, size, IK_FOREVER);
    if (rc < 0)
        fail("recv", (int)-rc);
}

static void ask(ik_ring *there, ik_ring *back, void *data, uint64_t size) {
    send_one(there, data, size);
    recv_one(back, data, size);
}

static int compare(const void *one, const void *other) {
    int64_t a = *(const int64_t *)one, b = *(const int64_t *)other;
    return (a > b) - (a < b);
}

/* What a round trip takes, of PARTS times so many, by the median of the parts. */
static double in_parts(ik_ring *there, ik_ring *back, void *data, uint64_t size, long each) {
    int64_t parts[PARTS];
    for (int part = 0; part < PARTS; part++) {
        int64_t before = ik_wait_now();
        for (long i = 0; i < each; i++)
            ask(there, back, data, size);
        parts[part] = ik_wait_now() - before;
    }
    qsort(parts, PARTS, sizeof *parts, compare);
    return (double)parts[PARTS / 2] / (double)each;
}

static void trip(long size, long count, long capacity) {
    ik_ring there = ring_of((uint64_t)capacity), back = ring_of((uint64_t)capacity);
    long each = (count + PARTS - 1) / PARTS, timed = count < TIMED ? count : TIMED;
    int64_t *took = allocated(((size_t)timed + 1) * sizeof *took);
    void *data = allocated((size_t)size);
    if (other_process() == 0) {
        for (long i = 0; i < each * PARTS + timed; i++) {
            recv_one(&there, data, (uint64_t)size);
            send_one(&back, data, (uint64_t)size);
        }
        exit(0);
    }
    took[0] = (int64_t)(in_parts(&there, &back, data, (uint64_t)size, each) * (double)count);
    int64_t before = ik_wait_now();
    for (long i = 1; i <= timed; i++) {
        ask(&there, &back, data, (uint64_t)size);
        int64_t after = ik_wait_now();
        took[i] = after - before;
        before = after;
    }
    wait(NULL);
    print(took, (size_t)timed + 1);
}

static void way(long size, long count, long capacity) {
    ik_ring ring = ring_of((uint64_t)capacity);
    void *data = allocated((size_t)size);
    if (other_process() == 0) {
        for (long i = 0; i < count; i++)
            send_one(&ring, data, (uint64_t)size);
        exit(0);
    }
    int64_t before = ik_wait_now();
    for (long i = 0; i < count; i++)
        recv_one(&ring, data, (uint64_t)size);
    int64_t took = ik_wait_now() - before;
    wait(NULL);
    print(&took, 1);
}

/* --- the floors ---------------------------------------------------------------------------------
 */

static void tell(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    ik_wake_word(word, 1);
}

static void hear(uint32_t *word, uint32_t value) {
    uint32_t seen;
    while ((seen = __atomic_load_n(word, __ATOMIC_ACQUIRE)) != value)
        ik_wait_word(word, seen, IK_FOREVER);
}

static void futex(long gap, long count) {
    uint32_t *words = shared(4096), *there = &words[0], *back = &words[64];
    int64_t *took = allocated(((size_t)count + 1) * sizeof *took);
    if (other_process() == 0) {
        for (uint32_t i = 1; i <= count; i++) {
            hear(there, i);
            tell(back, i);
        }
        exit(0);
    }
    int64_t began = ik_wait_now();
    for (uint32_t i = 1; i <= count; i++) {
        usleep((useconds_t)gap);
        int64_t before = ik_wait_now();
        tell(there, i);
        hear(back, i);
        took[i] = ik_wait_now() - before;
    }
    took[0] = ik_wait_now() - began;
    wait(NULL);
    print(took, (size_t)count + 1);
}

static void copies(long size, long count) {
    void *source = allocated((size_t)size), *target = allocated((size_t)size);
    int64_t before = ik_wait_now();
    for (long i = 0; i < count; i++) {
        memcpy(target, source, (size_t)size);
        __asm__ volatile("" : : "r"(target) : "memory"); /* or it is optimized away */
    }
    int64_t took = ik_wait_now() - before;
    print(&took, 1);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (argc == 5 && strcmp(what, "trip") == 0)
        trip(number(argv[2]), number(argv[3]), number(argv[4]));
    else if (argc == 5 && strcmp(what, "way") == 0)
        way(number(argv[2]), number(argv[3]), number(argv[4]));
    else if (argc == 4 && strcmp(what, "futex") == 0)
        futex(number(argv[2]), number(argv[3]));
    else if (argc == 4 && strcmp(what, "memcpy") == 0)
        copies(number(argv[2]), number(argv[3]));
    else {
        fprintf(stderr, "usage: engine trip|way SIZE COUNT CAPACITY | futex GAP COUNT | "
                        "memcpy SIZE COUNT\n");
        return 2;
    }
    return 0;
}

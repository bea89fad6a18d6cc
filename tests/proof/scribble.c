/* SPDX-License-Identifier: MIT
 *
 * One process rewrites the whole segment of an unlocked ring at random while others, built with
 * AddressSanitizer, send to it and receive from it.
 *
 *     scribble [-t seconds] [-s seed]
 *
 * No report, no signal, and no call beyond a second, with a deadline of half of one.
 */
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"

enum { CAPACITY = 2048, LARGEST = 1 << 14, WORDS = (IK_RING_HEADER + CAPACITY) / 8 };
static const int64_t SECOND = 1000000000;

static struct world {
    _Alignas(128) unsigned char memory[IK_RING_HEADER + CAPACITY];
    long calls[2], good[2]; /* by side; of which the ring did not complain */
    int64_t longest;
    int too_long;
    uint64_t words;
} *world;

static uint64_t chance;

static uint64_t random_word(void) {
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance;
}

/* Of what belongs there, more often than not: an index, a record, the state of a long message. */
static uint64_t random_value(const uint64_t *word) {
    uint64_t some = random_word() >> 20;
    switch (random_word() >> 8 & 7) {
    case 0:
        return random_word();
    case 1:
        return *word + some % 256 * 8;
    case 2:
        return (1 + some % 5) << 40 | some % 600 | (some >> 8 & 3) << 48;
    case 3:
        return some % CAPACITY;
    case 4:
        return (some % 4) << (3 + 32) | (some >> 8 & 7) << 32;
    case 5:
        return ((const uint64_t *)world->memory)[some % WORDS];
    default:
        return some % 4096 * 8;
    }
}

/* Sometimes with a pause, so that the others get somewhere; now and then all is well for a while.
 */
static void scribble(void) {
    for (;;) {
        uint64_t *word = (uint64_t *)world->memory + random_word() % WORDS;
        __atomic_store_n(word, random_value(word), __ATOMIC_RELAXED);
        world->words++;
        if (random_word() % 16 == 0)
            usleep((unsigned)(random_word() % 50));
        if (random_word() % 512 == 0) {
            memset(world->memory, 0, sizeof world->memory);
            ik_ring_create(world->memory, sizeof world->memory, 0, 0);
        }
    }
}

/* What this process was not let run does not count: its processor time, and what it slept. */
static int64_t lived(const struct rusage *before, int64_t begun) {
    struct rusage now;
    getrusage(RUSAGE_SELF, &now);
    int64_t elapsed = ik_wait_now() - begun;
    return now.ru_nivcsw == before->ru_nivcsw ? elapsed : elapsed - SECOND / 10;
}

static int call(ik_ring *ring, int side, unsigned char *bytes) {
    int64_t deadline = ik_wait_now() + SECOND / 2;
    ik_ring_progress progress = {0};
    int64_t rc;
    if (side == IK_RING_RECV)
        return (int)ik_ring_recv(ring, bytes, LARGEST, deadline);
    uint64_t len = random_word() % 8 ? random_word() % 900 : random_word() % LARGEST;
    do
        rc = ik_ring_send(ring, &progress, bytes, len, deadline);
    while (rc == -4); /* EINTR */
    return (int)rc;
}

static void use(int side) {
    ik_ring ring = {0}, found;
    unsigned char *bytes = calloc(1, LARGEST);
    while (ik_ring_attach(&ring, world->memory, sizeof world->memory) < 0 || ring.flags)
        continue;
    for (;;) {
        struct rusage before;
        getrusage(RUSAGE_SELF, &before);
        int64_t begun = ik_wait_now();
        int rc = call(&ring, side, bytes);
        int64_t took = lived(&before, begun);
        world->calls[side]++;
        world->good[side] += rc >= 0;
        if (took > world->longest)
            world->longest = took;
        world->too_long += took > SECOND;
        ik_ring_listen(&ring, side);
        if (ik_ring_attach(&found, world->memory, sizeof world->memory) == 0 && !found.flags)
            ring = found;
    }
}

static pid_t start(void (*run)(int), int argument, uint64_t seed) {
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        chance = seed * 0x9e3779b97f4a7c15 + 1;
        run(argument);
    }
    return pid;
}

static void run_scribble(int argument) {
    (void)argument;
    scribble();
}

int main(int argc, char **argv) {
    int seconds = 5, option, failed = 0;
    uint64_t seed = 1;
    while ((option = getopt(argc, argv, "t:s:")) != -1) {
        if (option == 't')
            seconds = atoi(optarg);
        else
            seed = strtoull(optarg, NULL, 0);
    }
    world = mmap(NULL, sizeof *world, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ik_ring_create(world->memory, sizeof world->memory, 0, 0);
    pid_t users[2] = {start(use, IK_RING_SEND, seed), start(use, IK_RING_RECV, seed + 1)};
    pid_t scribbler = start(run_scribble, 0, seed + 2);
    sleep((unsigned)seconds);
    for (int side = 0; side < 2; side++) {
        failed += waitpid(users[side], NULL, WNOHANG) != 0;
        kill(users[side], SIGKILL);
    }
    kill(scribbler, SIGKILL);
    printf("scribble: %llu words written over %ld sends (%ld good) and %ld receives (%ld good): %d "
           "died, longest call %.0f ms, %d over a second\n",
           (unsigned long long)world->words, world->calls[0], world->good[0], world->calls[1],
           world->good[1], failed, (double)world->longest / 1e6, world->too_long);
    return failed || world->too_long || !world->good[0] || !world->good[1];
}

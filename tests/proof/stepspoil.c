/* SPDX-License-Identifier: MIT
 *
 * Spoil a word of an unlocked ring after n instructions of an operation, for every n: what a
 * hostile peer may do between a check and a use.
 *
 *     stepspoil [rounds]
 *
 * The ring and the buffer each end at a page that can't be touched, so a length that was read twice
 * ends in a signal. The operation must end, with a result that its arguments allow.
 */
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"

enum { PAGE = 4096, CAPACITY = 2048, SIZE = IK_RING_HEADER + CAPACITY };
enum { TAIL = 128, STREAM = 152, HEAD = 256 }; /* where the header has them */
enum { SHORT = 600, LONG = 1500, BUFFER = 1600 };
enum { AT = CAPACITY - SHORT - 8 }; /* a short message is there, and fills the ring to its end */

static unsigned char *memory, *buffer; /* the ring; and of BUFFER bytes */
static int64_t *result;
static ik_ring ring;

/* So many bytes, shared, that end where nothing is. */
static unsigned char *map_before_nothing(uint64_t size) {
    uint64_t pages = (size + PAGE - 1) / PAGE * PAGE;
    unsigned char *all =
        mmap(NULL, pages + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED || mprotect(all + pages, PAGE, PROT_NONE) < 0) {
        perror("stepspoil");
        exit(1);
    }
    return all + pages - size;
}

/* --- the operations -------------------------------------------------------------------------- */

static void receive(void) {
    *result = ik_ring_recv(&ring, buffer, BUFFER, IK_NOW);
}

static void look(void) {
    const void *data;
    uint64_t len;
    if (ik_ring_wait_message(&ring, IK_NOW) < 0)
        return;
    if (ik_ring_look(&ring, &data, &len) == 1 && len <= BUFFER)
        memcpy(buffer, data, len);
    ik_ring_leave(&ring, IK_RING_RECV);
}

static void send(uint64_t len) {
    ik_ring_progress progress = {0};
    *result = ik_ring_send(&ring, &progress, buffer, len, IK_NOW);
    ik_ring_give_up(&ring, IK_RING_SEND, &progress);
}

static void send_short(void) {
    send(SHORT);
}

static void send_long(void) {
    send(LONG);
}

static void attach(void) {
    *result = ik_ring_attach(&ring, memory, SIZE);
}

static const struct operation {
    const char *name;
    void (*run)(void);
    uint64_t there; /* the length of the message that is there before; 0: none */
} operations[] = {
    {"receive", receive, SHORT}, {"receive, in pieces", receive, LONG}, {"look", look, SHORT},
    {"send", send_short, 0},     {"send, in pieces", send_long, 0},     {"attach", attach, SHORT},
};

/* --- the spoils ------------------------------------------------------------------------------ */

static const uint64_t values[] = {
    0,
    CAPACITY + 8,
    (uint64_t)1 << 62,
    (uint64_t)1 << 40 | BUFFER,   /* a whole message, beyond the ring */
    (uint64_t)2 << 40 | 0xfffff8, /* a gap */
    (uint64_t)5 << 40 | 2040,     /* a last piece */
    ~(uint64_t)7,
};
static const int places[] = {8, 16, TAIL, HEAD, STREAM, IK_RING_HEADER, IK_RING_HEADER + AT};
enum { BEYOND = 3, RECORD_THERE = 6 }; /* of those: what a length that is read twice would meet */
enum { VALUES = sizeof values / sizeof *values, PLACES = sizeof places / sizeof *places };

static void prepare(const struct operation *op) {
    ik_ring_progress progress = {0};
    memset(memory, 0, SIZE);
    ik_ring_create(memory, SIZE, 0, 0);
    if (op->there == SHORT)
        *(uint64_t *)(memory + TAIL) = *(uint64_t *)(memory + HEAD) = AT;
    ik_ring_attach(&ring, memory, SIZE);
    if (op->there)
        ik_ring_send(&ring, &progress, buffer, op->there, IK_NOW);
}

static pid_t new_victim(void (*run)(void)) {
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGTRAP);
        run();
        raise(SIGUSR1); /* the end, to the tracer */
        _exit(0);
    }
    waitpid(pid, &status, 0);
    return pid;
}

/* True when it ended, by SIGUSR1; any other signal is what is looked for. */
static bool step(pid_t victim, long instructions, int *ret_signal) {
    int status = 0;
    for (long i = 0; i < instructions; i++) {
        ptrace(PTRACE_SINGLESTEP, victim, NULL, NULL);
        waitpid(victim, &status, 0);
        *ret_signal = WIFSTOPPED(status) ? WSTOPSIG(status) : SIGKILL;
        if (*ret_signal != SIGTRAP)
            return true;
    }
    return false;
}

static int run_on(pid_t victim) {
    int status;
    ptrace(PTRACE_CONT, victim, NULL, NULL);
    waitpid(victim, &status, 0);
    return WIFSTOPPED(status) ? WSTOPSIG(status) : SIGKILL;
}

/* True if the operation was over before. */
static bool point(const struct operation *op, long n, int place, uint64_t value) {
    int signum = 0;
    prepare(op);
    *result = 0;
    pid_t victim = new_victim(op->run);
    bool over = step(victim, n, &signum);
    if (!over) {
        memcpy(memory + place, &value, sizeof value);
        alarm(5); /* ends this program */
        signum = run_on(victim);
        alarm(0);
    }
    kill(victim, SIGKILL);
    waitpid(victim, NULL, 0);
    if (signum != SIGUSR1 || *result > BUFFER) {
        printf("stepspoil: FAILED: %s, instruction %ld, %llx at %d: signal %d, result %lld\n",
               op->name, n, (unsigned long long)value, place, signum, (long long)*result);
        exit(1);
    }
    return over;
}

/* The length of the record, at each point; in later rounds another spoil each, because all of them
 * at each point would take an hour. */
static long run(const struct operation *op, int round) {
    long n = 0;
    for (bool over = false; !over; n++) {
        long turn = n * 5 + round;
        int place = round ? turn % PLACES : RECORD_THERE;
        over = point(op, n, places[place], values[round ? turn / PLACES % VALUES : BEYOND]);
    }
    return n;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    long points = 0;
#if !defined(__x86_64__)
    puts("stepspoil: skipped, it was tried on x86-64 only");
    return 77;
#endif
    memory = map_before_nothing(SIZE);
    buffer = map_before_nothing(BUFFER);
    result = (int64_t *)map_before_nothing(sizeof *result);
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        for (int round = 0; round < rounds; round++)
            points += run(&operations[i], round);
    printf("stepspoil: %ld points, 0 signals, 0 hung\n", points);
    return 0;
}

/* SPDX-License-Identifier: MIT */
#include "wait.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int64_t ik_wait_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* What is left until the deadline, never below 0. */
static int64_t nanoseconds_left(int64_t deadline_ns) {
    int64_t left = deadline_ns == IK_NOW ? 0 : deadline_ns - ik_wait_now();
    return left < 0 ? 0 : left;
}

static struct timespec timespec_of(int64_t ns) {
    return (struct timespec){.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
}

/* What is left until the deadline, as ppoll wants it; NULL waits for ever. */
static const struct timespec *remaining(int64_t deadline_ns, struct timespec *ret_left) {
    if (deadline_ns == IK_FOREVER)
        return NULL;
    *ret_left = timespec_of(nanoseconds_left(deadline_ns));
    return ret_left;
}

int ik_wait_fd(int fd, int events, int64_t deadline_ns) {
    struct timespec left;
    struct pollfd one = {.fd = fd, .events = (short)events};
    int rc = ppoll(&one, 1, remaining(deadline_ns, &left), NULL);
    if (rc < 0)
        return -errno;
    if (rc == 0)
        return -ETIMEDOUT;
    return one.revents & POLLNVAL ? -EBADF : one.revents;
}

/* --- spinning -------------------------------------------------------------------------------- */

void ik_wait_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Who would change the word can't run beside us. */
static bool is_alone(void) {
    cpu_set_t own;
    return sched_getaffinity(0, sizeof own, &own) == 0 && CPU_COUNT(&own) == 1;
}

/* Threads may wait at one end at a time. What they learn from each other need not be exact. */
static void set_spin(ik_spin *spin, uint32_t ns) {
    __atomic_store_n(&spin->ns, ns, __ATOMIC_RELAXED);
}

/* Spinning that doesn't pay halves down to nothing. Then each sixteenth wait tries it at full
 * length: two who wake each other could else never find out that they are both awake. */
static uint32_t spin_budget(ik_spin *spin) {
    uint32_t turn = __atomic_load_n(&spin->waits, __ATOMIC_RELAXED);
    uint32_t ns = __atomic_load_n(&spin->ns, __ATOMIC_RELAXED);
    __atomic_store_n(&spin->waits, turn + 1, __ATOMIC_RELAXED);
    if (turn % 16)
        return ns;
    if (!is_alone())
        return IK_SPIN_LONGEST;
    set_spin(spin, 0);
    return 0;
}

static int look(const uint32_t *word, uint32_t seen, int times) {
    for (int i = 0; i < times; i++, ik_wait_relax())
        /* Relaxed: who sees the change reads the word anew, with acquire, before using it. */
        if (__atomic_load_n(word, __ATOMIC_RELAXED) != seen)
            return 1;
    return 0;
}

int ik_wait_glance(const uint32_t *word, uint32_t seen, const ik_spin *spin) {
    return __atomic_load_n(&spin->ns, __ATOMIC_RELAXED) && look(word, seen, 32);
}

int ik_wait_spin(const uint32_t *word, uint32_t seen, ik_spin *spin) {
    uint32_t before = __atomic_load_n(&spin->ns, __ATOMIC_RELAXED), budget = spin_budget(spin);
    if (budget == 0)
        return 0;
    int64_t end = ik_wait_now() + budget;
    do {
        if (look(word, seen, 32)) {
            set_spin(spin, IK_SPIN_LONGEST);
            return 1;
        }
    } while (ik_wait_now() < end);
    set_spin(spin, before / 2 < IK_SPIN_SHORTEST ? 0 : before / 2);
    return 0;
}

/* --- sleeping -------------------------------------------------------------------------------- */

int ik_wait_word_for(const uint32_t *word, uint32_t seen, int64_t deadline_ns, int64_t slice_ns) {
    int64_t left = deadline_ns == IK_FOREVER ? INT64_MAX : nanoseconds_left(deadline_ns);
    if (left == 0)
        return -ETIMEDOUT;
    struct timespec time = timespec_of(left < slice_ns ? left : slice_ns);
    if (syscall(SYS_futex, word, FUTEX_WAIT, seen, &time, NULL, 0) == 0 || errno == EAGAIN)
        return 0;
    if (errno == ETIMEDOUT && left <= slice_ns)
        return -ETIMEDOUT;
    return errno == ETIMEDOUT ? -EINTR : -errno;
}

int ik_wait_word(const uint32_t *word, uint32_t seen, int64_t deadline_ns) {
    return ik_wait_word_for(word, seen, deadline_ns, IK_SLICE);
}

int ik_wake_word(const uint32_t *word, int count) {
    long woken = syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
    return woken < 0 ? -errno : (int)woken;
}

/* --- who we are ------------------------------------------------------------------------------ */

static __thread int thread;

static void forget_thread(void) {
    thread = 0;
}

__attribute__((constructor)) static void forget_thread_in_children(void) {
    pthread_atfork(NULL, NULL, forget_thread);
}

int ik_wait_thread(void) {
    if (thread == 0)
        thread = (int)syscall(SYS_gettid);
    return thread;
}

int ik_wait_is_our_thread(int id) {
    return id > 0 && syscall(SYS_tgkill, getpid(), id, 0) == 0;
}

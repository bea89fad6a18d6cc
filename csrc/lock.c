/* SPDX-License-Identifier: MIT */
#include "lock.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdbool.h>
#include <time.h>

struct ik_lock {
    pthread_mutex_t mutex;
    uint32_t recoveries; /* written by the holder */
};
_Static_assert(sizeof(ik_lock) <= IK_LOCK_SIZE, "a lock fits its size");

int ik_lock_init(ik_lock *lock) {
    pthread_mutexattr_t attributes;
    int rc = pthread_mutexattr_init(&attributes);
    if (rc)
        return -rc;
    rc = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    if (rc == 0)
        rc = pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    if (rc == 0)
        rc = pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
    if (rc == 0)
        rc = pthread_mutex_init(&lock->mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    lock->recoveries = 0;
    return -rc;
}

/* The word of a robust mutex is the kernel's: thread id and two bits. See robust-futexes.rst. */
static uint32_t word(const ik_lock *lock) {
    return __atomic_load_n((const uint32_t *)&lock->mutex, __ATOMIC_RELAXED);
}

/* A slice at a time, because pthreads starts anew after a signal and would keep handlers waiting.
 */
static int take_slowly(ik_lock *lock, int64_t deadline_ns) {
    int64_t slice_end = ik_wait_now() + IK_SLICE;
    bool last = deadline_ns != IK_FOREVER && deadline_ns <= slice_end;
    int64_t end = last ? deadline_ns : slice_end;
    struct timespec until = {.tv_sec = end / 1000000000, .tv_nsec = end % 1000000000};
    int rc = pthread_mutex_clocklock(&lock->mutex, CLOCK_MONOTONIC, &until);
    return rc == ETIMEDOUT && !last ? EINTR : rc;
}

int ik_lock_take(ik_lock *lock, ik_spin *spin, int64_t deadline_ns) {
    int rc = pthread_mutex_trylock(&lock->mutex);
    if (rc == EBUSY) {
        if ((int)(word(lock) & FUTEX_TID_MASK) == ik_wait_thread())
            return -EDEADLK;
        if (deadline_ns == IK_NOW)
            return -ETIMEDOUT;
        if (ik_wait_spin((const uint32_t *)&lock->mutex, word(lock), spin))
            rc = pthread_mutex_trylock(&lock->mutex);
        if (rc == EBUSY)
            rc = take_slowly(lock, deadline_ns);
    }
    if (rc != EOWNERDEAD)
        return -rc;
    __atomic_fetch_add(&lock->recoveries, 1, __ATOMIC_RELAXED); /* who has no lock may read it */
    return 1;
}

void ik_lock_mended(ik_lock *lock) {
    pthread_mutex_consistent(&lock->mutex);
}

int ik_lock_release(ik_lock *lock) {
    return -pthread_mutex_unlock(&lock->mutex);
}

int ik_lock_holder(const ik_lock *lock) {
    return (int)(word(lock) & FUTEX_TID_MASK);
}

uint32_t ik_lock_recoveries(const ik_lock *lock) {
    return __atomic_load_n(&lock->recoveries, __ATOMIC_RELAXED);
}

/* SPDX-License-Identifier: MIT
 *
 * For the build with ThreadSanitizer only, which knows pthread_mutex_timedlock(3) but not the call
 * on another clock, and would take the lock for not taken.
 */
#include <pthread.h>
#include <time.h>

int pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
    struct timespec there, here;
    clock_gettime(clock, &there);
    clock_gettime(CLOCK_REALTIME, &here);
    long ns = here.tv_nsec + until->tv_nsec - there.tv_nsec; /* between -1 and 2 seconds */
    time_t carry = (ns + 1000000000) / 1000000000 - 1;
    struct timespec end = {.tv_sec = here.tv_sec + until->tv_sec - there.tv_sec + carry,
                           .tv_nsec = ns - carry * 1000000000};
    return pthread_mutex_timedlock(mutex, &end);
}

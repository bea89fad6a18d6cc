/* SPDX-License-Identifier: MIT */
#include "wait.h"

#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <time.h>

int64_t ik_wait_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* What is left until the deadline, as ppoll wants it; NULL waits for ever. */
static const struct timespec *remaining(int64_t deadline_ns, struct timespec *ret_left) {
    if (deadline_ns == IK_FOREVER)
        return NULL;
    int64_t left = deadline_ns == IK_NOW ? 0 : deadline_ns - ik_wait_now();
    if (left < 0)
        left = 0;
    ret_left->tv_sec = left / 1000000000;
    ret_left->tv_nsec = left % 1000000000;
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

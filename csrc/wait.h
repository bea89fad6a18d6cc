/* wait.h - deadlines on CLOCK_MONOTONIC and waiting for a descriptor.
 *
 * A deadline is absolute, in nanoseconds; IK_FOREVER never comes, IK_NOW has passed already.
 */
#pragma once
#include <stdint.h>

enum ik_deadline { IK_FOREVER = -1, IK_NOW = 0 };

/* Nanoseconds on CLOCK_MONOTONIC. */
int64_t ik_wait_now(void);

/* Wait until poll(2) reports one of events (POLLIN, POLLOUT, ...), an error or a hang-up on fd.
 * The events that poll reported (> 0), or -ETIMEDOUT, -EINTR, -EBADF. */
int ik_wait_fd(int fd, int events, int64_t deadline_ns);

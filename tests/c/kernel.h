/* SPDX-License-Identifier: MIT */
/* kernel.h - what a test needs of the kernel is tried out first: an emulator of user programs
 * (qemu-user) has its own answers to system calls, and no answer to some. A test says what it
 * needs:
 *
 *     if (has("robust futexes", robust_futexes()))
 *         a_writer_killed_frees_the_lock();
 */
#pragma once
#include <stdbool.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline bool has(const char *what, bool there) {
    if (!there)
        printf("left out: what needs %s; this kernel has none\n", what);
    fflush(stdout); /* or a child would say it again */
    return there;
}

/* That the kernel looks through a dead thread's locks. */
static inline bool robust_futexes(void) {
    void *list;
    size_t size;
    return syscall(SYS_get_robust_list, 0, &list, &size) == 0;
}

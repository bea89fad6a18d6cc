/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vectored.h"
#include "wait.h"

static ik_transfer whole(ik_iovec *iov, size_t count) {
    return (ik_transfer){.iov = iov, .count = count};
}

static void a_transfer_goes_on_after_a_timeout(void) {
    int fd[2];
    assert(pipe2(fd, O_NONBLOCK | O_CLOEXEC) == 0);
    char a[3], b[5];
    ik_iovec iov[] = {{a, sizeof a}, {NULL, 0}, {b, sizeof b}};
    ik_transfer t = whole(iov, 3);
    assert(write(fd[1], "abcd", 4) == 4);
    assert(ik_vectored_read_exact(fd[0], &t, ik_wait_now() + 1000000) == -ETIMEDOUT);
    assert(t.moved == 4 && t.next == 2);
    assert(write(fd[1], "efgh", 4) == 4);
    assert(ik_vectored_read_exact(fd[0], &t, IK_FOREVER) == 0);
    assert(memcmp(a, "abc", 3) == 0 && memcmp(b, "defgh", 5) == 0);
    close(fd[1]);
    t = whole(iov, 3);
    iov[0].len = 1;
    assert(ik_vectored_read_exact(fd[0], &t, IK_FOREVER) == -ENODATA);
    close(fd[0]);
}

static void more_buffers_than_iov_max(void) {
    enum { COUNT = 3 * IOV_MAX };
    static char out[COUNT], in[COUNT];
    static ik_iovec iov[COUNT];
    int fd[2];
    assert(pipe2(fd, O_CLOEXEC) == 0);
    for (int i = 0; i < COUNT; i++) {
        out[i] = (char)i;
        iov[i] = (ik_iovec){out + i, 1};
    }
    ik_transfer t = whole(iov, COUNT);
    assert(ik_vectored_write_all(fd[1], &t, IK_FOREVER) == 0 && t.moved == COUNT);
    for (int i = 0; i < COUNT; i++)
        iov[i] = (ik_iovec){in + i, 1};
    t = whole(iov, COUNT);
    assert(ik_vectored_read_exact(fd[0], &t, IK_FOREVER) == 0 && t.moved == COUNT);
    assert(memcmp(in, out, COUNT) == 0);
    close(fd[0]);
    close(fd[1]);
}

int main(void) {
    a_transfer_goes_on_after_a_timeout();
    more_buffers_than_iov_max();
    return 0;
}

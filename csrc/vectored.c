/* SPDX-License-Identifier: MIT */
#include "vectored.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <sys/uio.h>

#include "wait.h"

_Static_assert(sizeof(ik_iovec) == sizeof(struct iovec), "ik_iovec must be a struct iovec");
_Static_assert(offsetof(ik_iovec, base) == offsetof(struct iovec, iov_base), "iovec layout");
_Static_assert(offsetof(ik_iovec, len) == offsetof(struct iovec, iov_len), "iovec layout");

typedef ssize_t vectored_call(int fd, const struct iovec *iov, int count);

static int at_most_iov_max(size_t count) {
    return count < IOV_MAX ? (int)count : IOV_MAX;
}

/* Count n bytes as moved: step over the buffers they filled, shorten the one they stopped in. */
static void advance(ik_transfer *t, size_t n) {
    t->moved += n;
    while (t->next < t->count && n >= t->iov[t->next].len)
        n -= t->iov[t->next++].len;
    if (n > 0) {
        t->iov[t->next].base = (char *)t->iov[t->next].base + n;
        t->iov[t->next].len -= n;
    }
}

static int transfer_all(int fd, ik_transfer *t, int64_t deadline_ns, vectored_call *call,
                        int events) {
    advance(t, 0); /* leading empty buffers are done; a call of only empty ones must not look like
                      end of file */
    while (t->next < t->count) {
        const struct iovec *rest = (const struct iovec *)t->iov + t->next;
        ssize_t n = call(fd, rest, at_most_iov_max(t->count - t->next));
        if (n == 0)
            return -ENODATA;
        int rc = n > 0 ? 0 : errno == EAGAIN ? ik_wait_fd(fd, events, deadline_ns) : -errno;
        if (rc < 0)
            return rc;
        if (n > 0)
            advance(t, (size_t)n);
    }
    return 0;
}

int ik_vectored_read_exact(int fd, ik_transfer *transfer, int64_t deadline_ns) {
    return transfer_all(fd, transfer, deadline_ns, readv, POLLIN);
}

int ik_vectored_write_all(int fd, ik_transfer *transfer, int64_t deadline_ns) {
    return transfer_all(fd, transfer, deadline_ns, writev, POLLOUT);
}

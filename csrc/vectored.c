/* SPDX-License-Identifier: MIT */
#include "vectored.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "wait.h"

_Static_assert(sizeof(ik_iovec) == sizeof(struct iovec), "ik_iovec must be a struct iovec");
_Static_assert(offsetof(ik_iovec, base) == offsetof(struct iovec, iov_base), "iovec layout");
_Static_assert(offsetof(ik_iovec, len) == offsetof(struct iovec, iov_len), "iovec layout");

typedef int64_t vectored_call(int fd, const ik_iovec *iov, size_t count, int64_t offset, int flags);

static int at_most_iov_max(size_t count) {
    return count < IOV_MAX ? (int)count : IOV_MAX;
}

int64_t ik_vectored_read(int fd, const ik_iovec *iov, size_t count, int64_t offset, int flags) {
    const struct iovec *v = (const struct iovec *)iov;
    int n = at_most_iov_max(count);
    ssize_t rc =
        offset == -1 && flags == 0 ? readv(fd, v, n) : preadv2(fd, v, n, (off_t)offset, flags);
    return rc < 0 ? -errno : rc;
}

int64_t ik_vectored_write(int fd, const ik_iovec *iov, size_t count, int64_t offset, int flags) {
    const struct iovec *v = (const struct iovec *)iov;
    int n = at_most_iov_max(count);
    ssize_t rc =
        offset == -1 && flags == 0 ? writev(fd, v, n) : pwritev2(fd, v, n, (off_t)offset, flags);
    return rc < 0 ? -errno : rc;
}

int64_t ik_vectored_write_block(int fd, const char *data, size_t len) {
    ssize_t rc = write(fd, data, len);
    return rc < 0 ? -errno : rc;
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
        int64_t rc = call(fd, t->iov + t->next, t->count - t->next, -1, 0);
        if (rc == -EAGAIN) {
            rc = ik_wait_fd(fd, events, deadline_ns);
            if (rc < 0)
                return (int)rc;
            continue;
        }
        if (rc < 0)
            return (int)rc;
        if (rc == 0)
            return -ENODATA;
        advance(t, (size_t)rc);
    }
    return 0;
}

int ik_vectored_read_exact(int fd, ik_transfer *transfer, int64_t deadline_ns) {
    return transfer_all(fd, transfer, deadline_ns, ik_vectored_read, POLLIN);
}

int ik_vectored_write_all(int fd, ik_transfer *transfer, int64_t deadline_ns) {
    return transfer_all(fd, transfer, deadline_ns, ik_vectored_write, POLLOUT);
}

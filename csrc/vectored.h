/* vectored.h - scatter and gather: many buffers in one system call. See readv(2). */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* A struct iovec that cffi can read; vectored.c asserts that the two are laid out alike. */
typedef struct ik_iovec {
    void *base;
    size_t len;
} ik_iovec;

/* A transfer of many buffers. The calls below advance it in place, so that a call which ended
 * early (-EINTR, -ETIMEDOUT) can be made again and goes on where it stopped. */
typedef struct ik_transfer {
    ik_iovec *iov; /* count buffers; those before next are done */
    size_t count;
    size_t next;
    uint64_t moved; /* bytes so far */
} ik_transfer;

/* One readv, writev, preadv2 or pwritev2 (offset -1: at the file's own position); at most
 * IOV_MAX buffers are used. Bytes moved, or -errno. */
int64_t ik_vectored_read(int fd, const ik_iovec *iov, size_t count, int64_t offset, int flags);
int64_t ik_vectored_write(int fd, const ik_iovec *iov, size_t count, int64_t offset, int flags);

/* One write(2) of one block, for which no ik_iovec need be made. Bytes written, or -errno. */
int64_t ik_vectored_write_block(int fd, const char *data, size_t len);

/* Move the whole transfer, however many calls that takes; a non-blocking fd is waited for.
 * 0 when all is moved, or -EINTR, -ETIMEDOUT, another -errno; reading also -ENODATA: end of file.
 */
int ik_vectored_read_exact(int fd, ik_transfer *transfer, int64_t deadline_ns);
int ik_vectored_write_all(int fd, ik_transfer *transfer, int64_t deadline_ns);

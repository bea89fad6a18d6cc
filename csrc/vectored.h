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

/* Move the whole transfer, however many calls that takes; a non-blocking fd is waited for.
 * 0 when all is moved, or -EINTR, -ETIMEDOUT, another -errno; reading also -ENODATA: end of file.
 */
int ik_vectored_read_exact(int fd, ik_transfer *transfer, int64_t deadline_ns);
int ik_vectored_write_all(int fd, ik_transfer *transfer, int64_t deadline_ns);

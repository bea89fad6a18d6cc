/* sockets.h - send and receive with flags and a deadline, urgent data, descriptors, credentials.
 *
 * With IK_FOREVER the kernel itself blocks, with all that this means for MSG_WAITALL; a
 * non-blocking descriptor, and any other deadline, is waited for by poll(2). SIGPIPE is never
 * raised.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* SCM_MAX_FD of the kernel: descriptors in one message. */
enum ik_sockets_limit { IK_SOCKETS_MAX_FDS = 253 };

/* Descriptors that came with a message, close-on-exec; the caller owns them. */
typedef struct ik_sockets_fds {
    int count;
    int fd[IK_SOCKETS_MAX_FDS];
} ik_sockets_fds;

/* Who was at the other end when the connection was made. */
typedef struct ik_sockets_peer {
    int pid;
    uint32_t uid;
    uint32_t gid;
} ik_sockets_peer;

/* One send or recv. Bytes moved, or -EAGAIN (only for MSG_DONTWAIT), -ETIMEDOUT, -EINTR, another
 * -errno; receiving also -EMSGSIZE: a datagram was longer than size and its rest is lost. */
int64_t ik_sockets_send(int fd, const void *data, size_t size, int flags, int64_t deadline_ns);
int64_t ik_sockets_recv(int fd, void *ret_data, size_t size, int flags, int64_t deadline_ns);

/* Send data with count <= IK_SOCKETS_MAX_FDS descriptors. As ik_sockets_send; on a stream the
 * descriptors go with the first byte, even if the rest does not go. -EOPNOTSUPP if the socket is
 * not AF_UNIX, -EINVAL for a stream and no data. */
int64_t ik_sockets_send_fds(int fd, const void *data, size_t size, const int *fds, size_t count,
                            int64_t deadline_ns);

/* Receive data with at most max descriptors. As ik_sockets_recv; when something was cut off, all
 * that came is closed: -EMSGSIZE for more data or descriptors than asked for, -EMFILE when this
 * process could not open them all. */
int64_t ik_sockets_recv_fds(int fd, void *ret_data, size_t size, ik_sockets_fds *ret_fds, int max,
                            int64_t deadline_ns);

/* The same without waiting and without taking the message: whoever receives next gets it again,
 * with descriptors of its own. */
int64_t ik_sockets_peek_fds(int fd, void *ret_data, size_t size, ik_sockets_fds *ret_fds, int max);

/* 1 when the next byte to read is the one at the urgent mark, 0 when it is not, or -errno. */
int ik_sockets_at_mark(int fd);

/* SO_OOBINLINE: 1 when urgent bytes are read in the stream, 0 when they are not, or -errno. */
int ik_sockets_get_oobinline(int fd);
int ik_sockets_set_oobinline(int fd, int on);

/* 0, or -ENOTCONN when there is no peer on this machine to know. */
int ik_sockets_peer_credentials(int fd, ik_sockets_peer *ret_peer);

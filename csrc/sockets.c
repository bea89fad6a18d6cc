/* SPDX-License-Identifier: MIT */
#include "sockets.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "wait.h"

#ifndef SCM_PIDFD /* Linux 6.5, SO_PASSPIDFD */
#define SCM_PIDFD 0x04
#endif

/* What a socket's options may add to a message has room beside the descriptors, or it would take
 * theirs, and that would be told as descriptors that were cut off: SO_TIMESTAMP, SO_TIMESTAMPING,
 * SO_PASSCRED, SO_PASSSEC (a label, of 60 bytes or so) and SO_PASSPIDFD. */
enum {
    OPTIONS_ROOM = CMSG_SPACE(2 * sizeof(int64_t)) + CMSG_SPACE(6 * sizeof(int64_t)) +
        CMSG_SPACE(sizeof(struct ucred)) + CMSG_SPACE(256) + CMSG_SPACE(sizeof(int)),
    FDS_ROOM = CMSG_SPACE(IK_SOCKETS_MAX_FDS * sizeof(int)),
};

typedef union control {
    struct cmsghdr aligned;
    char room[OPTIONS_ROOM + FDS_ROOM];
} control;

static int dont_wait(int64_t deadline_ns) {
    return deadline_ns == IK_FOREVER ? 0 : MSG_DONTWAIT;
}

static int option(int fd, int name) {
    int value;
    socklen_t size = sizeof value;
    return getsockopt(fd, SOL_SOCKET, name, &value, &size) < 0 ? -errno : value;
}

static int64_t send_message(int fd, const struct msghdr *message, int flags, int64_t deadline_ns) {
    for (;;) {
        ssize_t n = sendmsg(fd, message, flags | dont_wait(deadline_ns) | MSG_NOSIGNAL);
        if (n >= 0)
            return n;
        if (errno != EAGAIN || flags & MSG_DONTWAIT)
            return -errno;
        int rc = ik_wait_fd(fd, POLLOUT, deadline_ns);
        if (rc < 0)
            return rc;
    }
}

/* The error queue never blocks by itself; and poll can't wait for it without returning at once for
 * ordinary data too. */
static int64_t recv_message(int fd, struct msghdr *message, int flags, int64_t deadline_ns) {
    int events = flags & MSG_OOB ? POLLPRI | POLLRDHUP : POLLIN;
    for (;;) {
        ssize_t n = recvmsg(fd, message, flags | dont_wait(deadline_ns));
        if (n >= 0)
            return n;
        if (errno != EAGAIN || flags & (MSG_DONTWAIT | MSG_ERRQUEUE))
            return -errno;
        int rc = ik_wait_fd(fd, events, deadline_ns);
        if (rc < 0)
            return rc;
    }
}

int64_t ik_sockets_send(int fd, const void *data, size_t size, int flags, int64_t deadline_ns) {
    struct iovec iov = {.iov_base = (void *)data, .iov_len = size};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    return send_message(fd, &message, flags, deadline_ns);
}

int64_t ik_sockets_recv(int fd, void *ret_data, size_t size, int flags, int64_t deadline_ns) {
    struct iovec iov = {.iov_base = ret_data, .iov_len = size};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    int64_t n = recv_message(fd, &message, flags, deadline_ns);
    int lost = message.msg_flags & MSG_TRUNC && !(flags & (MSG_TRUNC | MSG_PEEK));
    return n >= 0 && lost ? -EMSGSIZE : n;
}

/* Where descriptors can't travel the kernel drops them and reports success. */
static int carries_fds(int fd, size_t size) {
    int domain = option(fd, SO_DOMAIN);
    if (domain < 0)
        return domain;
    if (domain != AF_UNIX)
        return -EOPNOTSUPP;
    return size == 0 && option(fd, SO_TYPE) == SOCK_STREAM ? -EINVAL : 0;
}

int64_t ik_sockets_send_fds(int fd, const void *data, size_t size, const int *fds, size_t count,
                            int64_t deadline_ns) {
    int rc = carries_fds(fd, size);
    if (rc < 0)
        return rc;
    control c = {0};
    struct iovec iov = {.iov_base = (void *)data, .iov_len = size};
    struct msghdr message = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = &c,
                             .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(rights), fds, count * sizeof(int));
    return send_message(fd, &message, 0, deadline_ns);
}

/* A pidfd of the sender was not asked for; it is negative where there was none left. */
static void close_pidfd(const struct cmsghdr *c) {
    int pidfd;
    memcpy(&pidfd, CMSG_DATA(c), sizeof pidfd);
    if (pidfd >= 0)
        close(pidfd);
}

static void collect(struct msghdr *message, ik_sockets_fds *ret_fds) {
    ret_fds->count = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c != NULL; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level != SOL_SOCKET)
            continue;
        if (c->cmsg_type == SCM_PIDFD)
            close_pidfd(c);
        if (c->cmsg_type == SCM_RIGHTS) {
            ret_fds->count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(ret_fds->fd, CMSG_DATA(c), (size_t)ret_fds->count * sizeof(int));
        }
    }
}

/* 0, or the -errno of what was cut off. */
static int complete(int msg_flags, int count, int max) {
    if (msg_flags & MSG_TRUNC || count > max)
        return -EMSGSIZE;
    if (msg_flags & MSG_CTRUNC)
        return count == max ? -EMSGSIZE : -EMFILE;
    return 0;
}

static int64_t recv_fds(int fd, void *ret_data, size_t size, ik_sockets_fds *ret_fds, int max,
                        int flags, int64_t deadline_ns) {
    control c;
    struct iovec iov = {.iov_base = ret_data, .iov_len = size};
    struct msghdr message = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = &c,
                             .msg_controllen = OPTIONS_ROOM + CMSG_LEN(max * sizeof(int))};
    int64_t n = recv_message(fd, &message, flags | MSG_CMSG_CLOEXEC, deadline_ns);
    if (n < 0)
        return n;
    collect(&message, ret_fds);
    int rc = complete(message.msg_flags, ret_fds->count, max);
    if (rc == 0)
        return n;
    while (ret_fds->count > 0)
        close(ret_fds->fd[--ret_fds->count]);
    return rc;
}

int64_t ik_sockets_recv_fds(int fd, void *ret_data, size_t size, ik_sockets_fds *ret_fds, int max,
                            int64_t deadline_ns) {
    return recv_fds(fd, ret_data, size, ret_fds, max, 0, deadline_ns);
}

int64_t ik_sockets_peek_fds(int fd, void *ret_data, size_t size, ik_sockets_fds *ret_fds, int max) {
    return recv_fds(fd, ret_data, size, ret_fds, max, MSG_PEEK, IK_NOW);
}

int ik_sockets_at_mark(int fd) {
    int rc = sockatmark(fd);
    return rc < 0 ? -errno : rc;
}

int ik_sockets_get_oobinline(int fd) {
    return option(fd, SO_OOBINLINE);
}

int ik_sockets_set_oobinline(int fd, int on) {
    return setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &on, sizeof on) < 0 ? -errno : 0;
}

int ik_sockets_peer_credentials(int fd, ik_sockets_peer *ret_peer) {
    struct ucred peer;
    socklen_t size = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
        return -errno;
    if (peer.uid == (uid_t)-1) /* the kernel knows no peer, but does not call that an error */
        return -ENOTCONN;
    *ret_peer = (ik_sockets_peer){peer.pid, peer.uid, peer.gid};
    return 0;
}

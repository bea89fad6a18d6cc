/* SPDX-License-Identifier: MIT */
#include "echo.h"

#include <errno.h>
#include <limits.h>
#include <linux/sockios.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "process.h"
#include "wait.h"

/* A record of so many bytes is, as base64 with its head, no longer than PIPE_BUF. */
enum { RAW_PIECE = PIPE_BUF, RECORD_PIECE = 2880, LINGER_NS = 500000000 };

/* The idle time is cut into so many ticks. A limit on each receive and send (SO_RCVTIMEO) would
 * start and stop a timer of the kernel with each: 7 % of an echo. */
enum { TICKS = 4 };

static int stopping_socket;
static volatile sig_atomic_t stopping;
/* Since the last tick; or it is the log, not the client, that is waited for. */
static volatile sig_atomic_t moved;
static volatile sig_atomic_t quiet_ticks;
static volatile sig_atomic_t expired;

/* shutdown(2) is async-signal-safe, and ends a read that has begun as well as the next one: there
 * is no moment at which SIGTERM could be missed. What has come already is still read. */
static void stop(int signum) {
    (void)signum;
    int saved = errno;
    stopping = 1;
    shutdown(stopping_socket, SHUT_RD);
    errno = saved;
}

/* As stop(), when the client has been idle: both ways, because it may be a send that waits. */
static void tick(int signum) {
    (void)signum;
    int saved = errno;
    quiet_ticks = moved ? 0 : quiet_ticks + 1;
    moved = 0;
    if (quiet_ticks >= TICKS) {
        expired = 1;
        shutdown(stopping_socket, SHUT_RDWR);
    }
    errno = saved;
}

static void take_signals(int socket) {
    stopping_socket = socket;
    struct sigaction action = {.sa_handler = stop, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    action.sa_handler = tick;
    sigaction(SIGALRM, &action, NULL);
    signal(SIGINT, SIG_IGN); /* a terminal's Ctrl-C is for the server, which then sends SIGTERM */
    signal(SIGPIPE, SIG_IGN);
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGALRM);
    ik_process_unblock();
    sigprocmask(SIG_UNBLOCK, &ours, NULL); /* the server itself may take them through a signalfd */
}

static void start_ticks(int64_t idle_ns) {
    int64_t us = (idle_ns / TICKS + 999) / 1000;
    struct timeval each = {us / 1000000, us % 1000000};
    struct itimerval timer = {each, each};
    if (idle_ns > 0)
        setitimer(ITIMER_REAL, &timer, NULL);
}

static ssize_t receive(int socket, char *block, size_t most) {
    ssize_t n;
    do
        n = recv(socket, block, most, 0);
    while (n < 0 && errno == EINTR);
    return n;
}

static int log_piece(ik_echo *echo, const char *piece, size_t len) {
    char line[PIPE_BUF + 512];
    ik_append append = {.data = piece, .len = len};
    if (echo->log->format == IK_LOG_RECORD) {
        append.len = ik_log_format_record(line, piece, len, echo->peer, echo->connection);
        append.data = line;
    }
    int rc;
    do {
        moved = 1; /* it is not the client that we wait for */
        rc = ik_log_append(echo->log, &append, IK_FOREVER);
    } while (rc == -EINTR);
    return rc;
}

static int send_back(int socket, const char *piece, size_t len) {
    while (len > 0) {
        ssize_t n = send(socket, piece, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return expired ? IK_ECHO_NOT_READ : IK_ECHO_RESET;
        if (n > 0) {
            moved = 1;
            piece += n;
            len -= (size_t)n;
        }
    }
    return IK_ECHO_DONE;
}

static int serve(ik_echo *echo) {
    char block[RAW_PIECE];
    size_t most = echo->log && echo->log->format == IK_LOG_RECORD ? RECORD_PIECE : RAW_PIECE;
    for (;;) {
        ssize_t n = receive(echo->socket, block, most);
        if (n <= 0)
            return expired ? IK_ECHO_IDLE : n == 0 ? IK_ECHO_DONE : IK_ECHO_RESET;
        if (echo->log && log_piece(echo, block, (size_t)n) < 0)
            return IK_ECHO_LOG_FAILED;
        int end = send_back(echo->socket, block, (size_t)n);
        if (end != IK_ECHO_DONE)
            return end;
        __atomic_fetch_add(&echo->counters->echoes, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&echo->counters->bytes, (uint64_t)n, __ATOMIC_RELAXED);
    }
}

/* Closing a socket with unread input sends a reset, which may overtake our last answer. So when we
 * stop before the client did: no more answers, drop what still comes, until the client has all. */
static void linger(int socket) {
    char dropped[4096];
    int unsent = 1;
    shutdown(socket, SHUT_WR);
    for (int64_t end = ik_wait_now() + LINGER_NS; unsent > 0 && ik_wait_now() < end;) {
        while (recv(socket, dropped, sizeof dropped, MSG_DONTWAIT) > 0)
            ;
        if (ioctl(socket, SIOCOUTQ, &unsent) < 0)
            return;
        if (unsent > 0)
            ik_wait_fd(-1, 0, ik_wait_now() + 1000000);
    }
}

int ik_echo_run(void *argument) {
    ik_echo *echo = argument;
    take_signals(echo->socket);
    start_ticks(echo->idle_ns);
    int end = serve(echo);
    if (stopping)
        linger(echo->socket);
    close(echo->socket);
    return end;
}

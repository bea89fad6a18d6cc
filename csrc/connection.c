/* SPDX-License-Identifier: MIT */
#include "connection.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#include "process.h"
#include "wait.h"

/* A record of so many bytes is, as base64 with its head, no longer than PIPE_BUF. */
enum { RAW_PIECE = PIPE_BUF, RECORD_PIECE = 2880 };
enum { LINGER_NS = 500000000, LOG_SLICE_NS = 500000000 };
enum { MOMENT_NS = 1000000, LONGEST_MOMENT_NS = 64000000, DROPS = 64 };
/* A client that is not given up reads 8 KiB/s, and its system takes so much ahead of it: 16 s. */
enum { AHEAD = 128 << 10 };
static const int64_t NS_OF_A_BYTE = 1000000000 / (8 << 10);
enum {
    THREAD_STACK = 256 << 10
}; /* a step needs two pages, the C library keeps small ones for reuse */
_Static_assert(sizeof((ik_server_counters *)0)->ends / sizeof(uint64_t) == IK_ENDS, "one for each");
_Static_assert((int)RAW_PIECE == (int)IK_PIECE, "a piece of a raw log is one atomic write");

enum state { READING, LOGGING, ANSWERING, SENDING, LINGERING };

static void count(uint64_t *counter, uint64_t n) {
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* Words that a signal handler or another thread sets. */
static int get(const int *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void set(int *word, int value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

/* A word that the ticks read. */
static int64_t get64(const int64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void set64(int64_t *word, int64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

/* --- who it is ---------------------------------------------------------------------------------*/

static void name_unix_peer(ik_connection *c) {
    struct ucred who;
    socklen_t len = sizeof who;
    if (getsockopt(c->socket, SOL_SOCKET, SO_PEERCRED, &who, &len) < 0)
        who = (struct ucred){0};
    snprintf(c->peer, sizeof c->peer, "pid %d uid %u", who.pid, who.uid);
}

static void name_peer(ik_connection *c, const struct sockaddr_storage *address) {
    char host[INET6_ADDRSTRLEN];
    const struct sockaddr_in *in = (const struct sockaddr_in *)address;
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)address;
    if (address->ss_family == AF_INET) {
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
        snprintf(c->peer, sizeof c->peer, "%s:%u", host, ntohs(in->sin_port));
    } else if (address->ss_family == AF_INET6) {
        inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof host);
        snprintf(c->peer, sizeof c->peer, "[%s]:%u", host, ntohs(in6->sin6_port));
    } else
        name_unix_peer(c);
}

int ik_connection_accept(ik_connection *c, int listener) {
    struct sockaddr_storage address;
    socklen_t len = sizeof address;
    c->socket = accept4(listener, (struct sockaddr *)&address, &len, SOCK_CLOEXEC);
    if (c->socket < 0)
        return -errno;
    name_peer(c, &address);
    c->end = IK_END_OPEN;
    c->began_ns = c->quiet_since_ns = ik_wait_now();
    c->number = __atomic_add_fetch(&c->counters->accepted, 1, __ATOMIC_RELAXED);
    return 0;
}

/* --- a piece -----------------------------------------------------------------------------------*/

int ik_connection_abort(ik_connection *c, int end) {
    c->end = end;
    return IK_STEP_ENDED;
}

int ik_connection_lost(ik_connection *c) {
    return ik_connection_abort(c, get(&c->expired) ? get(&c->expired) : IK_END_RESET);
}

int ik_connection_finish(ik_connection *c) {
    c->end = get(&c->expired) ? get(&c->expired) : IK_END_DONE;
    /* Closing a socket with unread input sends a reset, which may overtake our last answer. */
    if (c->end != IK_END_DONE || !(get(&c->stopping) || c->closing))
        return IK_STEP_ENDED;
    set(&c->state, LINGERING);
    return IK_STEP_LINGER;
}

size_t ik_connection_most(const ik_connection *c) {
    return c->log && c->log->format == IK_LOG_RECORD ? RECORD_PIECE : RAW_PIECE;
}

static void begin_piece(ik_connection *c, const char *piece, size_t len) {
    set(&c->moved, 1);
    c->data = piece;
    c->piece_len = c->len = len;
    c->sent = 0;
    c->append = (ik_append){0};
    set(&c->state, len > 0 && c->log ? LOGGING : ANSWERING);
}

/* One that never pauses would be answered without end, and then cut with answers on the way. */
static int has_had_its_time(ik_connection *c) {
    int64_t now = ik_wait_now();
    if (c->answer_until_ns == 0)
        c->answer_until_ns = now + LINGER_NS;
    return now >= c->answer_until_ns;
}

/* Bytes that have come; 0 at the end of the stream or, told to stop, when no more is here; -errno:
 * -EAGAIN if it does not block. Whether it was told is looked at first: what was here by then is
 * received. If it is told meanwhile, the socket does not block any more, and recv (restarted
 * after the handler, or not begun yet) comes back for another look. */
static ssize_t receive_some(ik_connection *c, char *block, size_t most) {
    for (;;) {
        int stopping = get(&c->stopping);
        if (stopping && has_had_its_time(c))
            return 0;
        int flags = c->blocking && !stopping ? 0 : MSG_DONTWAIT;
        ssize_t n = recv(c->socket, block, most, flags);
        if (n >= 0)
            return n;
        if (errno == EAGAIN && stopping)
            return 0;
        if (errno != EINTR && (errno != EAGAIN || !c->blocking))
            return -errno;
    }
}

int ik_connection_is_drained(ik_connection *c) {
    char first;
    return get(&c->stopping) &&
           (has_had_its_time(c) ||
            (recv(c->socket, &first, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN));
}

static int receive(ik_connection *c, char *block) {
    ssize_t n = receive_some(c, block, ik_connection_most(c));
    if (n == -EAGAIN)
        return IK_STEP_READ;
    if (n < 0)
        return ik_connection_lost(c);
    if (n == 0 && (c->echoes || get(&c->expired)))
        return ik_connection_finish(c);
    begin_piece(c, block, (size_t)n);
    return -EAGAIN; /* that is, go on */
}

/* Have the rest of the data survive this step, in which the block or the answer ends. */
static int keep(ik_connection *c, int wanted) {
    if (c->data != c->kept) {
        char *room = malloc(c->len - c->sent);
        if (room == NULL)
            return ik_connection_abort(c, IK_END_NO_MEMORY);
        memcpy(room, c->data + c->sent, c->len - c->sent);
        c->data = c->kept = room;
        c->len -= c->sent;
        c->sent = 0;
    }
    return wanted;
}

/* In slices, because nothing interrupts a thread that is to end while the log is full. */
static int waits_on(const ik_connection *c, int rc) {
    return (rc == -EINTR || (rc == -ETIMEDOUT && c->blocking)) && !get(&c->expired);
}

static int append(ik_connection *c) {
    char line[PIPE_BUF + 512];
    c->append.data = c->data;
    c->append.len = c->len;
    if (c->log->format == IK_LOG_RECORD && !c->append.asked) {
        c->append.len = ik_log_format_record(line, c->data, c->len, c->peer, c->number);
        c->append.data = line;
    }
    int rc;
    do {
        set(&c->moved, 1); /* it is not the client that we wait for */
        rc = ik_log_append(c->log, &c->append, c->blocking ? ik_wait_now() + LOG_SLICE_NS : IK_NOW);
    } while (waits_on(c, rc));
    return rc;
}

static int log_piece(ik_connection *c) {
    int rc = append(c), expired = get(&c->expired);
    if (rc == -ETIMEDOUT && !c->blocking && !expired)
        return c->append.full ? IK_STEP_LOG : IK_STEP_ACK;
    if (rc < 0) {
        return ik_connection_abort(c, expired ? expired : IK_END_LOG_FAILED);
    }
    set(&c->state, ANSWERING);
    return -EAGAIN;
}

static void forget_kept(ik_connection *c) {
    free(c->kept); /* never in a blocking connection, whose child may have no heap */
    c->kept = NULL;
}

static int send_some(ik_connection *c) {
    while (c->sent < c->len) {
        ssize_t n = send(c->socket, c->data + c->sent, c->len - c->sent,
                         MSG_NOSIGNAL | (c->blocking ? 0 : MSG_DONTWAIT));
        if (n < 0 && errno == EAGAIN && !c->blocking)
            return keep(c, IK_STEP_WRITE);
        if (n < 0 && errno == EAGAIN) /* told to stop, it does not block any more */
            ik_wait_fd(c->socket, POLLOUT, IK_FOREVER);
        else if (n < 0 && errno != EINTR)
            return ik_connection_lost(c);
        if (n > 0) {
            set(&c->moved, 1);
            c->sent += (size_t)n;
            set64(&c->given, c->given + n);
            count(&c->counters->bytes, (uint64_t)n);
        }
    }
    count(&c->counters->echoes, 1);
    return IK_STEP_READ;
}

static int answer(ik_connection *c) {
    int wanted = send_some(c);
    if (wanted != IK_STEP_READ)
        return wanted;
    if (c->kept)
        forget_kept(c);
    set(&c->state, READING);
    return c->closing ? ik_connection_finish(c) : IK_STEP_READ;
}

int ik_connection_step(ik_connection *c, char *block) {
    if (c->state == READING) {
        int wanted = receive(c, block);
        if (wanted != -EAGAIN)
            return wanted;
    }
    if (c->state == LOGGING) {
        int wanted = log_piece(c);
        if (wanted != -EAGAIN)
            return wanted == IK_STEP_ENDED ? wanted : keep(c, wanted);
    }
    if (c->state == LINGERING)
        return IK_STEP_LINGER;
    if (c->state == ANSWERING && !c->echoes) {
        if (c->kept) {
            memcpy(block, c->kept, c->piece_len);
            forget_kept(c);
        }
        return c->piece_len ? IK_STEP_PIECE : IK_STEP_LAST;
    }
    set(&c->state, SENDING);
    return answer(c);
}

int ik_connection_answer(ik_connection *c, const char *data, size_t len, int closing) {
    if (len > c->max_output)
        return ik_connection_abort(c, IK_END_TOO_MUCH);
    c->closing = closing;
    c->data = data;
    c->len = len;
    c->sent = 0;
    set(&c->state, SENDING);
    if (len > 0)
        return answer(c);
    set(&c->state, READING);
    return closing ? ik_connection_finish(c) : IK_STEP_READ;
}

/* --- who receives and sends by itself ----------------------------------------------------------*/

int ik_connection_take(ik_connection *c, const char *piece, size_t len) {
    if (c->state != LOGGING)
        begin_piece(c, piece, len);
    c->data = piece;
    if (c->state == LOGGING) {
        int wanted = log_piece(c);
        if (wanted != -EAGAIN)
            return wanted;
    }
    set(&c->state, READING);
    if (c->echoes)
        ik_connection_answered(c, len, 0);
    return IK_STEP_PIECE;
}

int ik_connection_answered(ik_connection *c, size_t len, int closing) {
    if (len > c->max_output)
        return ik_connection_abort(c, IK_END_TOO_MUCH);
    if (len > 0) {
        set64(&c->given, c->given + (int64_t)len);
        count(&c->counters->bytes, len);
        count(&c->counters->echoes, 1);
    }
    c->closing = closing;
    return closing ? ik_connection_finish(c) : IK_STEP_READ;
}

/* --- deadlines and the end ---------------------------------------------------------------------*/

static void expire(ik_connection *c, int why) {
    set(&c->expired, why);
    shutdown(c->socket, SHUT_RDWR); /* both ways, because it may be a send that waits */
}

int64_t ik_connection_tick_ns(int64_t idle_ns, int64_t total_ns) {
    int64_t shorter = idle_ns && (!total_ns || idle_ns < total_ns) ? idle_ns : total_ns;
    return (shorter + IK_TICKS - 1) / IK_TICKS;
}

/* Bytes of the answers that the client's system has not taken (TCP: not acknowledged), or the
 * client itself (a Unix socket: the memory that they occupy). See SIOCOUTQ in tcp(7). */
static int64_t untaken(const ik_connection *c) {
    int unsent;
    return c->held + (ioctl(c->socket, SIOCOUTQ, &unsent) < 0 ? 0 : unsent);
}

/* Whether the client has taken more than at the last tick. What it was given is no measure: a send
 * succeeds when a third of some megabytes of buffer is free. What its system took is one, but with
 * gaps: a buffer that was full takes nothing until most of it has been read. Hence a slow client
 * gets the time to read what its system took last. */
static int has_taken(ik_connection *c, int64_t left, int64_t now_ns) {
    int64_t before = c->taken, more;
    c->taken = get64(&c->given) - left;
    more = c->taken - before;
    if (more <= 0)
        return 0;
    int64_t from = c->reads_until_ns > now_ns ? c->reads_until_ns : now_ns;
    int64_t until = from + (more < AHEAD ? more : AHEAD) * NS_OF_A_BYTE;
    int64_t latest = now_ns + AHEAD * NS_OF_A_BYTE;
    c->reads_until_ns = until < latest ? until : latest;
    return 1;
}

static int has_moved(ik_connection *c, int64_t left, int64_t now_ns) {
    int moved = get(&c->moved);
    set(&c->moved, 0);
    return has_taken(c, left, now_ns) || moved || get(&c->state) == LOGGING;
}

void ik_connection_tick(ik_connection *c, int64_t now_ns) {
    int64_t left = untaken(c);
    if (has_moved(c, left, now_ns))
        c->quiet_since_ns = now_ns;
    int is_reading = left > 0 && now_ns < c->reads_until_ns;
    if (c->idle_ns && now_ns - c->quiet_since_ns >= c->idle_ns && !is_reading)
        expire(c, left > 0 ? IK_END_NOT_READ : IK_END_IDLE);
    if (c->total_ns && now_ns - c->began_ns >= c->total_ns)
        expire(c, IK_END_EXPIRED);
}

void ik_connection_cut(ik_connection *c) {
    expire(c, IK_END_CUT);
}

/* Not by shutdown(SHUT_RD), which ends a recv too: after our end of file the kernel would then
 * answer whatever the client still sends by a reset, and drop the answers on their way. In place of
 * it: a recv that has not begun finds the flag of the socket; one that has is interrupted, and
 * finds it when it is restarted. These calls are async-signal-safe, and no echo pays for them, as
 * it would for a poll of the socket and something else before each recv (a fifth more processor
 * time). */
void ik_connection_stop(ik_connection *c) {
    set(&c->stopping, 1);
    fcntl(c->socket, F_SETFL, fcntl(c->socket, F_GETFL) | O_NONBLOCK);
    int thread = get(&c->thread);
    if (thread)
        syscall(SYS_tgkill, getpid(), thread, SIGURG);
}

/* 1: the client has ended its side too, or the connection has broken. */
static int drop_input(ik_connection *c) {
    char dropped[4096];
    ssize_t n = -1;
    errno = EAGAIN;
    for (int i = 0; i < DROPS && (n = recv(c->socket, dropped, sizeof dropped, MSG_DONTWAIT)) > 0;
         i++)
        c->sends_on = 1;
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        c->end = IK_END_RESET;
    return n == 0 || c->end == IK_END_RESET;
}

/* It has all of its answer. What it sends after we have closed is answered by a reset, so one that
 * is at it gets the time to see that this is the end. */
static int sees_the_end(ik_connection *c) {
    int64_t now = ik_wait_now();
    if (c->linger_until_ns == 0)
        c->linger_until_ns = now + LINGER_NS;
    return !c->sends_on || now >= c->linger_until_ns;
}

int ik_connection_flushed(ik_connection *c) {
    int expired = get(&c->expired);
    shutdown(c->socket, SHUT_WR);
    if (expired && untaken(c) > 0)
        c->end = expired;
    return expired || drop_input(c) || (untaken(c) == 0 && sees_the_end(c));
}

void ik_connection_close(ik_connection *c) {
    if (c->kept)
        forget_kept(c);
    if (c->end >= 0 && c->end < IK_ENDS)
        count(&c->counters->ends[c->end], 1);
    close(c->socket);
    c->socket = -1;
}

static void linger(ik_connection *c) {
    int64_t moment = MOMENT_NS;
    while (c->state == LINGERING && !ik_connection_flushed(c)) {
        ik_wait_fd(c->socket, POLLIN, ik_wait_now() + moment);
        if (moment < LONGEST_MOMENT_NS) /* nothing tells when the answer is taken */
            moment *= 2;
    }
}

static void step_until_end(ik_connection *c) {
    char block[IK_PIECE];
    int wanted;
    c->blocking = 1;
    do
        wanted = ik_connection_step(c, block);
    while (wanted == IK_STEP_READ);
}

int ik_connection_run(ik_connection *c) {
    step_until_end(c);
    linger(c);
    ik_connection_close(c);
    return c->end;
}

/* --- a thread of its own -----------------------------------------------------------------------*/

static void do_nothing(int signum) {
    (void)signum;
}

static struct sigaction former;
static int claimed;

void ik_connection_claim_signal(void) {
    const struct sigaction ours = {.sa_handler = do_nothing, .sa_flags = SA_RESTART};
    if (sigaction(SIGURG, NULL, &former) == 0 && !(former.sa_flags & SA_SIGINFO) &&
        (former.sa_handler == SIG_DFL || former.sa_handler == SIG_IGN))
        claimed = sigaction(SIGURG, &ours, NULL) == 0;
}

void ik_connection_release_signal(void) {
    if (claimed)
        sigaction(SIGURG, &former, NULL);
    claimed = 0;
}

void ik_connection_enter(ik_connection *c) {
    sigset_t wake;
    sigemptyset(&wake);
    sigaddset(&wake, SIGURG);
    pthread_sigmask(SIG_UNBLOCK, &wake, NULL);
    /* Who stops it and does not see this yet has made the socket non-blocking before. */
    set(&c->thread, (int)syscall(SYS_gettid));
}

void ik_connection_hang_up(ik_connection *c) {
    linger(c);
    shutdown(c->socket, SHUT_RDWR);
}

static void *serve(void *argument) {
    ik_connection_thread *thread = argument;
    ik_connection_enter(thread->connection);
    step_until_end(thread->connection);
    ik_connection_hang_up(thread->connection);
    uint64_t number = thread->connection->number;
    ssize_t n;
    do
        n = write(thread->told, &number, sizeof number);
    while (n < 0 && errno == EINTR);
    return NULL;
}

static int create(ik_connection_thread *thread) {
    pthread_t handle;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, THREAD_STACK);
    int rc = pthread_create(&handle, &attributes, serve, thread);
    pthread_attr_destroy(&attributes);
    thread->handle = (uint64_t)handle;
    return -rc;
}

int ik_connection_start_thread(ik_connection_thread *thread) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all,
                    &before); /* a handler belongs into the interpreter's thread */
    int rc = create(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

void ik_connection_join(ik_connection_thread *thread) {
    pthread_join((pthread_t)thread->handle, NULL);
}

/* --- a child of its own ------------------------------------------------------------------------*/

static ik_connection *guarded;
static int guard; /* the process */

/* A child that the service forks has these handlers too, and the connection is not its own: there
 * the signal has its default action from now on, and comes once more when the handler returns. */
static int is_for_us(int signum) {
    if (getpid() == guard)
        return 1;
    signal(signum, SIG_DFL);
    raise(signum);
    return 0;
}

static void on_stop(int signum) {
    int saved = errno;
    if (is_for_us(signum))
        ik_connection_stop(guarded);
    errno = saved;
}

/* A limit on each receive and send (SO_RCVTIMEO) would start and stop a timer of the kernel with
 * each: 7 % of an echo. */
static void on_tick(int signum) {
    (void)signum;
    int saved = errno;
    ik_connection_tick(guarded, ik_wait_now());
    errno = saved;
}

/* A terminal's Ctrl-C is for the server, which then sends SIGTERM; the others are its too. They are
 * not ignored, unless they were before: programs that a service starts would inherit that. */
static void on_not_ours(int signum) {
    int saved = errno;
    is_for_us(signum);
    errno = saved;
}

static void leave_to_server(int signum) {
    struct sigaction ours = {.sa_handler = on_not_ours, .sa_flags = SA_RESTART}, now;
    if (sigaction(signum, NULL, &now) == 0 && now.sa_handler != SIG_IGN)
        sigaction(signum, &ours, NULL);
}

static void start_ticks(int64_t period_ns) {
    int64_t us = (period_ns + 999) / 1000;
    struct timeval each = {us / 1000000, us % 1000000};
    struct itimerval timer = {each, each};
    if (period_ns > 0)
        setitimer(ITIMER_REAL, &timer, NULL);
}

void ik_connection_guard(ik_connection *c) {
    guarded = c;
    guard = getpid();
    struct sigaction action = {.sa_handler = on_stop, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    action.sa_handler = on_tick;
    sigaction(SIGALRM, &action, NULL);
    const int not_ours[] = {SIGINT, SIGHUP, SIGUSR1};
    sigset_t handled;
    sigemptyset(&handled);
    sigaddset(&handled, SIGTERM);
    sigaddset(&handled, SIGALRM);
    for (size_t i = 0; i < sizeof not_ours / sizeof *not_ours; i++) {
        leave_to_server(not_ours[i]);
        sigaddset(&handled, not_ours[i]);
    }
    signal(SIGPIPE, SIG_IGN); /* as Python has it; subprocess undoes that */
    start_ticks(ik_connection_tick_ns(c->idle_ns, c->total_ns));
    ik_process_unblock();
    sigprocmask(SIG_UNBLOCK, &handled, NULL); /* blocked for the fork, or by the server's caller */
}

int ik_connection_child(void *argument) {
    ik_connection *c = argument;
    ik_connection_guard(c);
    return ik_connection_run(c);
}

void ik_counters_read(const ik_server_counters *counters, ik_server_counters *ret_counters) {
    const uint64_t *from = (const uint64_t *)counters;
    uint64_t *to = (uint64_t *)ret_counters;
    for (size_t i = 0; i < sizeof *counters / sizeof *from; i++)
        to[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
}

/* SPDX-License-Identifier: MIT */
#include "messagelog.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/sockios.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#include "messagelog_impl.h"

size_t ik_log_shared_size(void) {
    return sizeof(ik_log_shared);
}

ik_log_shared *ik_log_map(int memory) {
    void *at = mmap(NULL, sizeof(ik_log_shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    return at == MAP_FAILED ? NULL : at;
}

void ik_log_unmap(ik_log_shared *shared) {
    munmap(shared, sizeof *shared);
}

/* --- the record line ---------------------------------------------------------------------------*/

static const char HEX[] = "0123456789abcdef";
static const char BASE64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
static const char ESCAPES[32] = {
    ['\b'] = 'b', ['\t'] = 't', ['\n'] = 'n', ['\f'] = 'f', ['\r'] = 'r'};

static size_t base64_length(size_t len) {
    return (len + 2) / 3 * 4;
}

static char *put_base64(char *to, const unsigned char *data, size_t len) {
    for (size_t i = 0; i < len; i += 3) {
        size_t left = len - i;
        uint32_t three = (uint32_t)data[i] << 16 | (left > 1 ? (uint32_t)data[i + 1] << 8 : 0) |
                         (left > 2 ? data[i + 2] : 0);
        *to++ = BASE64[three >> 18];
        *to++ = BASE64[three >> 12 & 63];
        *to++ = left > 1 ? BASE64[three >> 6 & 63] : '=';
        *to++ = left > 2 ? BASE64[three & 63] : '=';
    }
    return to;
}

/* Bytes of the UTF-8 character that starts here (RFC 3629), or 0 if none does. */
static size_t utf8_length(const unsigned char *s, size_t left) {
    unsigned char c = s[0];
    size_t n = c < 0x80                ? 1
               : c >= 0xc2 && c < 0xe0 ? 2
               : c >= 0xe0 && c < 0xf0 ? 3
               : c >= 0xf0 && c < 0xf5 ? 4
                                       : 0;
    if (n == 0 || n > left)
        return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    if ((c == 0xe0 && s[1] < 0xa0) || (c == 0xed && s[1] > 0x9f) || (c == 0xf0 && s[1] < 0x90) ||
        (c == 0xf4 && s[1] > 0x8f))
        return 0;
    return n;
}

static char *put_escaped(char *to, unsigned char c) {
    to = stpcpy(to, "\\u00");
    *to++ = HEX[c >> 4];
    *to++ = HEX[c & 15];
    return to;
}

static char *put_ascii(char *to, unsigned char c) {
    char letter = c == '"' || c == '\\' ? (char)c : c < 0x20 ? ESCAPES[c] : 0;
    if (!letter && (c < 0x20 || c == 0x7f)) /* DEL too: a log is looked at on terminals */
        return put_escaped(to, c);
    if (letter)
        *to++ = '\\';
    *to++ = letter ? letter : (char)c;
    return to;
}

/* U+0080 to U+009F steer some terminals as ESC does. */
static int is_c1_control(const unsigned char *s, size_t n) {
    return n == 2 && s[0] == 0xc2 && s[1] < 0xa0;
}

/* The message as JSON text up to limit, or NULL if it is no UTF-8 text or longer. */
static char *put_text(char *to, const char *limit, const unsigned char *data, size_t len) {
    for (size_t i = 0, n; i < len; i += n) {
        n = utf8_length(data + i, len - i);
        if (n == 0 || to + 6 > limit)
            return NULL;
        if (n == 1)
            to = put_ascii(to, data[i]);
        else if (is_c1_control(data + i, n))
            to = put_escaped(to, data[i + 1]);
        else {
            memcpy(to, data + i, n);
            to += n;
        }
    }
    return to;
}

enum { FIXED = 160 }; /* all of a line but the peer and the message */

size_t ik_log_record_bound(size_t len, const char *peer) {
    size_t body = base64_length(len);
    size_t room = FIXED + 6 * strlen(peer);
    /* Text may take what is left of PIPE_BUF, and some room to notice that it takes more. */
    return room + (body > PIPE_BUF ? body : PIPE_BUF) + 8;
}

/* Decimal, at least so many digits. Not printf: what it needs of the locale lies in the memory of
 * the interpreter, which a child forked lean does not have. */
static char *put_number(char *to, uint64_t number, int digits) {
    char reversed[20];
    int n = 0;
    for (; number > 0 || n < digits; number /= 10)
        reversed[n++] = (char)('0' + number % 10);
    while (n > 0)
        *to++ = reversed[--n];
    return to;
}

static char *put_head(char *to, size_t len, const char *peer, uint64_t connection) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    to = put_number(stpcpy(to, "{\"time\":"), (uint64_t)now.tv_sec, 1);
    to = put_number(stpcpy(to, "."), (uint64_t)now.tv_nsec / 1000, 6);
    if (connection)
        to = put_number(stpcpy(to, ",\"connection\":"), connection, 1);
    to = stpcpy(to, ",\"peer\":\"");
    for (; *peer; peer++)
        to = put_ascii(to, (unsigned char)*peer < 0x80 ? (unsigned char)*peer : '?');
    to = put_number(stpcpy(to, "\",\"length\":"), len, 1);
    return stpcpy(to, ",");
}

size_t ik_log_format_record(char *line, const void *data, size_t len, const char *peer,
                            uint64_t connection) {
    char *body = put_head(line, len, peer, connection);
    /* Text when it fits into an atomic write or is no longer than base64 would be. */
    size_t head = (size_t)(body - line), tail = sizeof "\"text\":\"\"}\n" - 1;
    size_t most = head + tail < PIPE_BUF ? PIPE_BUF - head - tail : 0;
    if (most < base64_length(len))
        most = base64_length(len);
    char *text = stpcpy(body, "\"text\":\"");
    char *end = put_text(text, text + most, data, len);
    if (end == NULL)
        end = put_base64(stpcpy(body, "\"base64\":\""), data, len);
    memcpy(end, "\"}\n", 3);
    return (size_t)(end + 3 - line);
}

/* --- writers -----------------------------------------------------------------------------------*/

/* Ask to be rung; then look once more, because it may have happened just before. */
static int watch(const ik_log *log) {
    if (log->acked < 0)
        return 0;
    atomic_store_explicit(&log->shared->awaits_done, 1, memory_order_relaxed);
    /* The request must be seen before that look, as ring_whom's change before its look. */
    atomic_thread_fence(memory_order_seq_cst);
    return 1;
}

static int reader_is_gone(const ik_log *log) {
    return ik_wait_fd(log->writer, 0, IK_NOW) > 0; /* POLLERR, asked for or not */
}

/* Sleep until done reaches the ticket. A slice at the most: the logger that wakes us may be killed
 * between its store and its wake. */
static int await_ticket(ik_log *log, uint32_t ticket, int64_t deadline_ns) {
    ik_log_shared *shared = log->shared;
    for (;;) {
        /* Acquire: with done, all that the logger stored before it is seen. */
        uint32_t done = atomic_load_explicit(&shared->done, memory_order_acquire);
        if ((int32_t)(done - ticket) >= 0)
            return 0;
        int64_t now = ik_wait_now(), until = earlier(deadline_ns, now + SLICE_NS);
        if (until <= now)
            return -ETIMEDOUT;
        struct timespec left = {0, until - now};
        if (syscall(SYS_futex, &shared->done, FUTEX_WAIT, done, &left, NULL, 0) < 0) {
            if (errno == EINTR)
                return -EINTR;
            if (errno == ETIMEDOUT && reader_is_gone(log))
                return -EPIPE;
        }
    }
}

/* Until the logger has acknowledged the ticket; -ETIMEDOUT when the time is up, unless it came in
 * the last moment. Only a loop wants to be rung. */
static int await_done(ik_log *log, uint32_t ticket, int64_t deadline_ns) {
    int rc = await_ticket(log, ticket, deadline_ns);
    if (rc != -ETIMEDOUT)
        return rc;
    if (reader_is_gone(log))
        return -EPIPE;
    return deadline_ns == IK_NOW && watch(log) ? await_ticket(log, ticket, IK_NOW) : -ETIMEDOUT;
}

static int ask(ik_log *log, ik_append *append) {
    /* Release: a logger that reads this value finds our bytes in the pipe, or past it. */
    append->ticket = atomic_fetch_add_explicit(&log->shared->asked, 1, memory_order_release) + 1;
    uint64_t one = 1;
    return write(log->wake, &one, sizeof one) < 0 && errno != EAGAIN ? -errno : 0;
}

/* Whether a long message that came before us is not moved yet: the kernel's count of what lies in
 * the socket, which is right whoever is killed. No call where all messages are short. */
static int is_behind(const ik_log *log) {
    int queued;
    /* Relaxed: if its append() returned before ours began, that has been seen to by whatever told.
     */
    return atomic_load_explicit(&log->shared->handed, memory_order_relaxed) != 0 &&
           ioctl(log->hand, SIOCOUTQ, &queued) == 0 && queued > 0;
}

/* Long and short messages come by two ways, so what comes after a long one waits until that has
 * been moved: one sender's messages stay in order, and of long ones few lie in memory. */
static int let_long_pass(ik_log *log, ik_append *append, int64_t deadline_ns) {
    if (!append->behind) {
        if (append->passed || !is_behind(log))
            return 0;
        int rc = ask(log, append);
        if (rc < 0)
            return rc;
        append->behind = 1;
    }
    int rc = await_done(log, append->ticket, deadline_ns);
    if (rc == 0) {
        append->behind = 0;
        append->passed = 1; /* or others could hold us up for ever */
    }
    return rc;
}

/* 0, 1 and 2 may be closed, but others write there all the same. */
static int above_standard(int fd) {
    if (fd < 0 || fd > 2)
        return fd < 0 ? -errno : fd;
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, 3), rc = moved < 0 ? -errno : moved;
    close(fd);
    return rc;
}

static int fill(int file, const char *data, size_t len) {
    for (size_t done = 0; done < len;) {
        ssize_t n = pwrite(file, data + done, len - done, (off_t)done);
        if (n < 0 && errno != EINTR)
            return -errno;
        done += n < 0 ? 0 : (size_t)n;
    }
    return 0;
}

/* A message longer than PIPE_BUF goes in one packet, or not at all, and not piece by piece. */
static int hand_over(ik_log *log, const ik_append *append) {
    int file = above_standard(memfd_create("ipckit-message", MFD_CLOEXEC));
    if (file < 0)
        return file;
    int64_t rc = fill(file, append->data, append->len);
    if (rc == 0) {
        /* Release, and before it is sent: who finds the packet finds the number too. */
        atomic_fetch_add_explicit(&log->shared->handed, 1, memory_order_release);
        rc = ik_sockets_send_fds(log->hand, ".", 1, &file, 1, IK_NOW);
    }
    close(file);
    if (rc == -ECONNRESET) /* what was in the socket is lost with its last reader */
        rc = -EPIPE;
    return rc == -ETIMEDOUT ? -EAGAIN : rc < 0 ? (int)rc : 0;
}

/* One attempt. Of what is not longer than PIPE_BUF the kernel takes all or nothing. */
static int put(ik_log *log, ik_append *append) {
    ik_log_shared *shared = log->shared;
    /* Before: if the file changes meanwhile, we blame our message on the old one, whose fdatasync
     * may have failed, and do not praise it for the new one. */
    append->file = high(atomic_load_explicit(&shared->turn, memory_order_acquire));
    if (append->len > PIPE_BUF) {
        int rc = hand_over(log, append);
        if (rc < 0)
            return rc;
    } else if (write(log->writer, append->data, append->len) < 0)
        return -errno;
    append->appended = 1;
    atomic_fetch_add_explicit(&shared->messages, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&shared->bytes, append->len, memory_order_relaxed);
    return 0;
}

static int put_whole(ik_log *log, ik_append *append, int64_t deadline_ns) {
    for (;;) {
        append->full = 0;
        int rc = let_long_pass(log, append, deadline_ns);
        if (rc == 0)
            rc = put(log, append);
        if (rc != -EAGAIN)
            return rc;
        append->full = append->len <= PIPE_BUF;
        append->passed = append->full; /* a long one: others are in its way again */
        rc = append->full ? ik_wait_fd(log->writer, POLLOUT, deadline_ns) : 0;
        if (rc < 0)
            return rc;
    }
}

/* -errno if the promise about the file that our message went to can't be kept. */
static int sync_failed(const ik_log *log, const ik_append *append) {
    uint64_t unsynced = atomic_load_explicit(&log->shared->unsynced, memory_order_relaxed);
    return unsynced && (int32_t)(append->file - high(unsynced)) <= 0 ? -(int)low(unsynced) : 0;
}

int ik_log_append(ik_log *log, ik_append *append, int64_t deadline_ns) {
    int rc = append->appended ? 0 : put_whole(log, append, deadline_ns);
    if (rc < 0 || log->durability == IK_LOG_NONE)
        return rc;
    if (!append->asked) {
        rc = ask(log, append);
        if (rc < 0)
            return rc;
        append->asked = 1;
    }
    append->full = 0;
    rc = sync_failed(log, append);
    if (rc == 0)
        rc = await_done(log, append->ticket, deadline_ns);
    return rc == 0 ? sync_failed(log, append) : rc;
}

void ik_log_read_counters(const ik_log *log, ik_log_counters *ret_counters) {
    const ik_log_shared *shared = log->shared;
    *ret_counters = (ik_log_counters){
        .messages = atomic_load_explicit(&shared->messages, memory_order_relaxed),
        .bytes = atomic_load_explicit(&shared->bytes, memory_order_relaxed),
        .error = atomic_load_explicit(&shared->error, memory_order_relaxed),
        .sync_error = sync_error(shared),
        .split = atomic_load_explicit(&shared->split, memory_order_relaxed),
    };
}

/* --- the supervisor ----------------------------------------------------------------------------*/

/* The pipe is asked, as a count of the writers' would lack what those did not count that were
 * killed. Its mutex is never held over a disk; that of the second one is, so that is counted. */
int64_t ik_log_backlog(const ik_log *log) {
    char mark;
    int64_t queued = queued_in(log->reader);
    int file = peek_file(log->handed, &mark, sizeof mark);
    if (file >= 0) {
        queued += rest_of(file);
        close(file);
    }
    return queued < 0 ? queued
                      : queued + atomic_load_explicit(&log->shared->staged, memory_order_relaxed);
}

int ik_log_park(ik_log *log, int file) {
    packet first = {0};
    return send_file(log->park, &first, file);
}

int ik_log_offer(ik_log *log, int file, int64_t until_ns) {
    ik_log_shared *shared = log->shared;
    uint32_t in_use = ik_log_withdraw(log);
    packet one;
    memset(&one, 0, sizeof one); /* the padding too */
    one.until_ns = until_ns;
    while (one.number == 0) /* a number of its own, so that a late logger can't mistake it */
        one.number = atomic_fetch_add_explicit(&shared->offers, 1, memory_order_relaxed) + 1;
    atomic_store_explicit(&shared->turn, pair(in_use, one.number), memory_order_relaxed);
    return send_file(log->tell, &one, file);
}

uint32_t ik_log_withdraw(ik_log *log) {
    _Atomic uint64_t *turn = &log->shared->turn;
    uint64_t now = atomic_load_explicit(turn, memory_order_relaxed);
    while (low(now) != 0 &&
           !atomic_compare_exchange_weak_explicit(turn, &now, pair(high(now), 0),
                                                  memory_order_relaxed, memory_order_relaxed))
        ;
    return ik_log_in_use(log);
}

uint32_t ik_log_in_use(ik_log *log) {
    char answer;
    while (log->tell >= 0 && ik_sockets_recv(log->tell, &answer, sizeof answer, 0, IK_NOW) > 0)
        ;
    /* After that: an answer that is gone is of a switch that is seen. Acquire: with all before it.
     */
    return high(atomic_load_explicit(&log->shared->turn, memory_order_acquire));
}

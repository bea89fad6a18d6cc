/* SPDX-License-Identifier: MIT */
#include "messagelog.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "process.h"
#include "sockets.h"
#include "wait.h"

/* No internal wait is longer than this before it looks again whether it still makes sense. */
enum { SLICE_NS = 100000000, MOVE_MAX = 1 << 20, SMALL_MOVE = 1 << 15, MOMENT_NS = 1000000 };

struct ik_log_shared {
    pthread_mutex_t lock; /* robust, process-shared: one message at a time */
    /* Under the lock; in_message says that a message longer than PIPE_BUF is partly in the pipe. */
    _Atomic uint32_t in_message;
    _Atomic uint32_t torn;
    _Atomic uint64_t messages;
    _Atomic uint64_t bytes;
    /* Acknowledgements: writers count asked up after their write, the logger sets done to the value
     * of asked that it read before it emptied the pipe. */
    _Atomic uint32_t asked;
    _Atomic uint32_t done;
    /* An event loop wants acked to be rung when done changes, when the lock is free. */
    _Atomic uint32_t awaits_done;
    _Atomic uint32_t awaits_lock;
    /* How many files came after the first, and the number of the open offer of one, or 0: one word,
     * because a file is taken if and only if its offer is still open. */
    _Atomic uint64_t turn;
    _Atomic uint32_t offers;
    _Atomic uint32_t split;
    /* The logger's. */
    _Atomic uint64_t moved;
    _Atomic int error;
    /* The last file of which fdatasync failed, and its errno; 0: it never did. */
    _Atomic uint64_t unsynced;
};

/* What comes with an offered file. */
typedef struct offer {
    uint32_t number;
    int64_t until_ns;
} offer;

/* Two numbers in one word. */
static uint64_t pair(uint32_t high, uint32_t low) {
    return (uint64_t)high << 32 | low;
}

static uint32_t high(uint64_t word) {
    return (uint32_t)(word >> 32);
}

static uint32_t low(uint64_t word) {
    return (uint32_t)word;
}

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

int ik_log_shared_init(ik_log_shared *shared) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    int rc = pthread_mutex_init(&shared->lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
    return -rc;
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

static int64_t earlier(int64_t deadline_ns, int64_t other_ns) {
    return deadline_ns == IK_FOREVER || deadline_ns > other_ns ? other_ns : deadline_ns;
}

/* -EINTR after a slice, so that the caller's signal handlers get their turn. */
static int lock(ik_log_shared *shared, int64_t deadline_ns) {
    int rc = pthread_mutex_trylock(&shared->lock);
    if (rc == EBUSY) {
        int64_t now = ik_wait_now();
        int64_t until = earlier(deadline_ns, now + SLICE_NS);
        if (until < now)
            return -ETIMEDOUT;
        struct timespec at = {until / 1000000000, until % 1000000000};
        rc = pthread_mutex_clocklock(&shared->lock, CLOCK_MONOTONIC, &at);
        if (rc == ETIMEDOUT)
            return until == deadline_ns ? -ETIMEDOUT : -EINTR;
    }
    if (rc == EOWNERDEAD) /* in_message says whether the dead one left something to mend */
        rc = pthread_mutex_consistent(&shared->lock);
    return -rc;
}

static void ring(const ik_log *log) {
    uint64_t one = 1;
    ssize_t ignored = log->acked < 0 ? 0 : write(log->acked, &one, sizeof one);
    (void)ignored; /* EAGAIN: it is readable as it is */
}

/* Ask to be rung; then look once more, because it may have happened just before. */
static int watch(const ik_log *log, _Atomic uint32_t *awaits) {
    if (log->acked < 0)
        return 0;
    atomic_store_explicit(awaits, 1, memory_order_relaxed);
    /* The request must be seen before that look, as ring_whom's change before its look. */
    atomic_thread_fence(memory_order_seq_cst);
    return 1;
}

static void ring_whom(const ik_log *log, _Atomic uint32_t *awaits) {
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(awaits, memory_order_relaxed) && log->acked >= 0 &&
        atomic_exchange_explicit(awaits, 0, memory_order_relaxed))
        ring(log);
}

static void unlock(const ik_log *log) {
    pthread_mutex_unlock(&log->shared->lock);
    ring_whom(log, &log->shared->awaits_lock);
}

/* End the torn message that a dead writer left, so that the next line starts on a line of its own.
 */
static int mend(ik_log *log) {
    ik_log_shared *shared = log->shared;
    if (!atomic_load_explicit(&shared->in_message, memory_order_relaxed))
        return 0;
    if (log->format == IK_LOG_RECORD && write(log->writer, "\n", 1) < 0)
        return -errno;
    atomic_fetch_add_explicit(&shared->torn, 1, memory_order_relaxed);
    atomic_store_explicit(&shared->in_message, 0, memory_order_relaxed);
    return 0;
}

/* Under the lock: no locked instruction is needed, only that a reader sees no half of it. */
static void add(_Atomic uint64_t *counter, uint64_t n) {
    uint64_t now = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, now + n, memory_order_relaxed);
}

/* One attempt, lock held: what can be written now is. 0 when the message is whole in the pipe. */
static int write_some(ik_log *log, ik_append *append) {
    ik_log_shared *shared = log->shared;
    if (append->sent == 0) {
        int rc = mend(log);
        if (rc < 0)
            return rc;
        /* The lock orders it: our bytes go into this file, unless the switch is a split one. */
        append->file = high(atomic_load_explicit(&shared->turn, memory_order_relaxed));
    }
    if (append->len > PIPE_BUF)
        atomic_store_explicit(&shared->in_message, 1, memory_order_relaxed);
    while (append->sent < append->len) {
        ssize_t n = write(log->writer, (const char *)append->data + append->sent,
                          append->len - append->sent);
        if (n < 0) {
            if (append->sent == 0)
                atomic_store_explicit(&shared->in_message, 0, memory_order_relaxed);
            return -errno;
        }
        append->sent += (size_t)n;
    }
    atomic_store_explicit(&shared->in_message, 0, memory_order_relaxed);
    add(&shared->messages, 1);
    add(&shared->bytes, append->len);
    return 0;
}

/* A logger that is about to change the file needs the lock once. Those who ask for it all the time
 * would let it wait for long, because the kernel wakes in turn and the logger can't stay in line.
 */
static void let_logger_go_first(const ik_log *log) {
    const struct timespec moment = {0, MOMENT_NS};
    if (low(atomic_load_explicit(&log->shared->turn, memory_order_relaxed)))
        nanosleep(&moment, NULL);
}

static int lock_for(ik_log *log, ik_append *append, int64_t deadline_ns) {
    if (deadline_ns != IK_NOW)
        let_logger_go_first(log);
    int rc = lock(log->shared, deadline_ns);
    if (rc == -ETIMEDOUT && deadline_ns == IK_NOW && watch(log, &log->shared->awaits_lock))
        rc = lock(log->shared, IK_NOW);
    append->locked = rc == 0;
    return rc;
}

static void unlock_for(ik_log *log, ik_append *append) {
    append->locked = 0;
    unlock(log);
}

/* Bring the message into the pipe. The lock is kept between calls only in the middle of a message.
 */
static int write_whole(ik_log *log, ik_append *append, int64_t deadline_ns) {
    for (;;) {
        append->full = 0;
        int rc = append->locked ? 0 : lock_for(log, append, deadline_ns);
        if (rc < 0)
            return rc;
        rc = write_some(log, append);
        if (append->sent == 0 || append->sent == append->len)
            unlock_for(log, append);
        if (rc != -EAGAIN)
            return rc;
        append->full = 1;
        rc = ik_wait_fd(log->writer, POLLOUT, deadline_ns);
        if (rc < 0)
            return rc;
    }
}

static void futex_wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int reader_is_gone(const ik_log *log) {
    return ik_wait_fd(log->writer, 0, IK_NOW) > 0; /* POLLERR, asked for or not */
}

/* 1 if our bytes are as durable as promised, 0 if not yet, or -errno. */
static int is_done(const ik_log *log, const ik_append *append, uint32_t *ret_done) {
    /* Acquire: with done, all that the logger stored before it is seen. */
    *ret_done = atomic_load_explicit(&log->shared->done, memory_order_acquire);
    uint64_t unsynced = atomic_load_explicit(&log->shared->unsynced, memory_order_relaxed);
    if (unsynced && (int32_t)(append->file - high(unsynced)) <= 0)
        return -(int)low(unsynced);
    return (int32_t)(*ret_done - append->ticket) >= 0;
}

/* Sleep until done reaches our ticket. A slice at the most: the logger that wakes us may be killed
 * between its store and its wake. */
static int await_done(ik_log *log, const ik_append *append, int64_t deadline_ns) {
    ik_log_shared *shared = log->shared;
    for (uint32_t done;;) {
        int rc = is_done(log, append, &done);
        if (rc != 0)
            return rc < 0 ? rc : 0;
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

/* The time is up: -ETIMEDOUT, or what came in the last moment. Only a loop wants to be rung. */
static int give_time_up(ik_log *log, const ik_append *append, int64_t deadline_ns) {
    if (reader_is_gone(log))
        return -EPIPE;
    if (deadline_ns == IK_NOW && watch(log, &log->shared->awaits_done))
        return await_done(log, append, IK_NOW);
    return -ETIMEDOUT;
}

int ik_log_append(ik_log *log, ik_append *append, int64_t deadline_ns) {
    if (!append->asked) {
        int rc = write_whole(log, append, deadline_ns);
        if (rc < 0 || log->durability == IK_LOG_NONE)
            return rc;
        /* Release: a logger that reads this value finds our bytes in the pipe, or past it. */
        append->ticket =
            atomic_fetch_add_explicit(&log->shared->asked, 1, memory_order_release) + 1;
        append->asked = 1;
        uint64_t one = 1;
        if (write(log->wake, &one, sizeof one) < 0 && errno != EAGAIN)
            return -errno;
    }
    append->full = 0;
    int rc = await_done(log, append, deadline_ns);
    return rc == -ETIMEDOUT ? give_time_up(log, append, deadline_ns) : rc;
}

void ik_log_abandon(ik_log *log, ik_append *append) {
    if (append->locked)
        unlock_for(log, append); /* in_message stays set: the next writer mends */
}

/* Of the file in use: with another one the disk has another chance. */
static int sync_error(const ik_log_shared *shared) {
    uint64_t unsynced = atomic_load_explicit(&shared->unsynced, memory_order_relaxed);
    uint64_t turn = atomic_load_explicit(&shared->turn, memory_order_relaxed);
    return high(unsynced) == high(turn) ? (int)low(unsynced) : 0;
}

void ik_log_read_counters(const ik_log *log, ik_log_counters *ret_counters) {
    const ik_log_shared *shared = log->shared;
    *ret_counters = (ik_log_counters){
        .messages = atomic_load_explicit(&shared->messages, memory_order_relaxed),
        .bytes = atomic_load_explicit(&shared->bytes, memory_order_relaxed),
        .moved = atomic_load_explicit(&shared->moved, memory_order_relaxed),
        .torn = atomic_load_explicit(&shared->torn, memory_order_relaxed),
        .error = atomic_load_explicit(&shared->error, memory_order_relaxed),
        .sync_error = sync_error(shared),
        .files = high(atomic_load_explicit(&shared->turn, memory_order_relaxed)),
        .split = atomic_load_explicit(&shared->split, memory_order_relaxed),
    };
}

int64_t ik_log_backlog(const ik_log *log) {
    int queued;
    return ioctl(log->reader, FIONREAD, &queued) < 0 ? -errno : queued;
}

/* --- the supervisor ----------------------------------------------------------------------------*/

/* What an earlier offer left in the socket, because its logger was killed. */
static void drop_stale(const ik_log *log) {
    offer stale;
    ik_sockets_fds came;
    char answer;
    while (ik_sockets_recv_fds(log->told, &stale, sizeof stale, &came, 1, IK_NOW) > 0)
        while (came.count > 0)
            close(came.fd[--came.count]);
    while (ik_sockets_recv(log->tell, &answer, sizeof answer, 0, IK_NOW) > 0)
        ;
}

int ik_log_offer(ik_log *log, int file, int64_t until_ns) {
    ik_log_shared *shared = log->shared;
    uint32_t files = ik_log_withdraw(log);
    drop_stale(log);
    offer one = {.until_ns = until_ns};
    while (one.number == 0) /* a number of its own, so that a late logger can't mistake it */
        one.number = atomic_fetch_add_explicit(&shared->offers, 1, memory_order_relaxed) + 1;
    atomic_store_explicit(&shared->turn, pair(files, one.number), memory_order_relaxed);
    int64_t n = ik_sockets_send_fds(log->tell, &one, sizeof one, &file, 1, IK_NOW);
    return n < 0 ? (int)n : 0;
}

uint32_t ik_log_withdraw(ik_log *log) {
    _Atomic uint64_t *turn = &log->shared->turn;
    /* Acquire: who learns of the switch sees what went before it. */
    uint64_t now = atomic_load_explicit(turn, memory_order_acquire);
    while (low(now) != 0 &&
           !atomic_compare_exchange_weak_explicit(turn, &now, pair(high(now), 0),
                                                  memory_order_acquire, memory_order_acquire))
        ;
    return high(now);
}

/* --- the logger --------------------------------------------------------------------------------*/

/* The file system can't splice. */
static int copying;

/* Full disk, quota, file size limit, I/O error: wait and try again; the pipe keeps the rest and
 * makes the writers wait. */
static void pause_for(ik_log *log, int error, int64_t until_ns) {
    atomic_store_explicit(&log->shared->error, error, memory_order_relaxed);
    int64_t now = ik_wait_now(), left = earlier(until_ns, now + SLICE_NS) - now;
    struct timespec slice = {0, left > 0 ? left : 0};
    nanosleep(&slice, NULL);
}

/* Where the file system can't splice, bytes pass through here, and a kill between the read and the
 * write loses them. */
static int64_t copy_some(ik_log *log, size_t most) {
    char block[65536];
    ssize_t n = read(log->reader, block, most < sizeof block ? most : sizeof block);
    for (ssize_t done = 0; done < n;) {
        ssize_t w = write(log->file, block + done, (size_t)(n - done));
        if (w < 0)
            pause_for(log, errno, IK_FOREVER);
        else
            done += w;
    }
    return n < 0 ? -errno : n;
}

/* Move up to most bytes to the end of the file: bytes moved, 0 at end of file, or -errno. */
static int64_t move_some(ik_log *log, size_t most) {
    /* The end, each time: somebody may have truncated the file to rotate it. */
    if (lseek(log->file, 0, SEEK_END) < 0)
        return -errno;
    int64_t n = copying ? copy_some(log, most)
                        : splice(log->reader, NULL, log->file, NULL, most, SPLICE_F_MOVE);
    if (n < 0 && !copying && errno == EINVAL) {
        copying = 1;
        return move_some(log, most);
    }
    if (n < 0)
        return copying ? n : -errno;
    if (n > 0) {
        atomic_fetch_add_explicit(&log->shared->moved, (uint64_t)n, memory_order_relaxed);
        atomic_store_explicit(&log->shared->error, 0, memory_order_relaxed);
    }
    return n;
}

static void sync_file(ik_log *log) {
    /* EINVAL: such a file has nothing to sync. */
    if (fdatasync(log->file) == 0 || errno == EINVAL)
        return;
    /* The kernel may have dropped the dirty pages and would say "fine" next time: the first failure
     * is the last word on this file. */
    uint32_t file = high(atomic_load_explicit(&log->shared->turn, memory_order_relaxed));
    if (!sync_error(log->shared))
        atomic_store_explicit(&log->shared->unsynced, pair(file, (uint32_t)errno),
                              memory_order_relaxed);
}

/* --- the logger goes over to another file ------------------------------------------------------*/

static int is_open(const ik_log *log, const offer *offered) {
    return low(atomic_load_explicit(&log->shared->turn, memory_order_relaxed)) == offered->number;
}

static int is_over(int64_t deadline_ns) {
    return deadline_ns != IK_FOREVER && ik_wait_now() >= deadline_ns;
}

/* Move what is queued, if anything; if that can't be, pause. */
static void move_queued(ik_log *log, int64_t until_ns) {
    int64_t n = ik_log_backlog(log) > 0 ? move_some(log, MOVE_MAX) : 0;
    if (n < 0 && n != -EAGAIN && n != -EINTR)
        pause_for(log, (int)-n, until_ns);
}

/* Keep writers out. Who is in the middle of a long message needs room in the pipe to leave it. */
static int shut_out_writers(ik_log *log, const offer *offered) {
    while (lock(log->shared, earlier(offered->until_ns, ik_wait_now() + MOMENT_NS)) < 0) {
        if (is_over(offered->until_ns) || !is_open(log, offered))
            return 0;
        move_queued(log, offered->until_ns);
    }
    return 1;
}

/* The last message's writer was killed in its middle: end the line here, not in the next file. */
static void mend_file(ik_log *log) {
    ik_log_shared *shared = log->shared;
    if (!atomic_load_explicit(&shared->in_message, memory_order_relaxed))
        return;
    if (log->format == IK_LOG_RECORD &&
        (lseek(log->file, 0, SEEK_END) < 0 || write(log->file, "\n", 1) != 1))
        return; /* the next writer mends */
    atomic_fetch_add_explicit(&shared->torn, 1, memory_order_relaxed);
    atomic_store_explicit(&shared->in_message, 0, memory_order_relaxed);
}

/* Between two messages: writers are out, the pipe is empty. 0 if the time or the offer is over. */
static int reach_boundary(ik_log *log, const offer *offered) {
    if (!shut_out_writers(log, offered))
        return 0;
    while (ik_log_backlog(log) > 0) {
        if (is_over(offered->until_ns) || !is_open(log, offered)) {
            unlock(log);
            return 0;
        }
        move_queued(log, offered->until_ns);
    }
    mend_file(log);
    return 1;
}

/* The offer is taken in one instant, under the lock and with the old file finished. A logger killed
 * before leaves the old one in use, one killed after it the new one, and no byte is between. */
static int take(ik_log *log, const offer *offered) {
    uint64_t now = atomic_load_explicit(&log->shared->turn, memory_order_relaxed);
    return low(now) == offered->number &&
           atomic_compare_exchange_strong_explicit(&log->shared->turn, &now, pair(high(now) + 1, 0),
                                                   memory_order_release, memory_order_relaxed);
}

static void switch_file(ik_log *log, int file, const offer *offered) {
    int locked = reach_boundary(log, offered);
    if (log->durability == IK_LOG_SYNCED)
        sync_file(log); /* whose bytes are here may ask only when the next file is in use */
    if (take(log, offered)) {
        dup3(file, log->file, O_CLOEXEC);
        copying = 0;
        atomic_store_explicit(&log->shared->error, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&log->shared->split, !locked, memory_order_relaxed);
    }
    if (locked)
        unlock(log);
}

/* Look whether a file is offered; end of file: the supervisor is gone. */
static void look_for_offer(ik_log *log) {
    offer offered;
    ik_sockets_fds came = {0};
    if (log->told < 0)
        return;
    int64_t n = ik_sockets_recv_fds(log->told, &offered, sizeof offered, &came, 1, IK_NOW);
    if (n == 0) {
        log->told = -1;
        ik_log_withdraw(log); /* one that was opened and not sent */
    }
    if (n == sizeof offered && came.count == 1) {
        switch_file(log, came.fd[0], &offered);
        ik_sockets_send(log->told, ".", 1, 0, IK_NOW);
    }
    while (came.count > 0)
        close(came.fd[--came.count]);
}

/* --- the logger's work -------------------------------------------------------------------------*/

/* Move. 0 at end of file; negative when there is nothing now, or nothing can be written now. */
static int64_t move(ik_log *log, size_t most) {
    int64_t n = move_some(log, most);
    if (n >= 0 || n == -EAGAIN || n == -EINTR)
        return n;
    pause_for(log, (int)-n, IK_FOREVER);
    return n;
}

static int somebody_asked(ik_log *log) {
    return atomic_load_explicit(&log->shared->asked, memory_order_acquire) !=
           atomic_load_explicit(&log->shared->done, memory_order_relaxed);
}

/* Acknowledge: all that was in the pipe when asked was read is moved, then done says so. */
static void acknowledge(ik_log *log) {
    /* Acquire: the bytes of every writer counted in asked are in the pipe already. */
    uint32_t asked = atomic_load_explicit(&log->shared->asked, memory_order_acquire);
    for (int64_t queued = ik_log_backlog(log), n; queued > 0; queued -= n) {
        n = move(log, (size_t)queued);
        if (n == 0)
            break;
        if (n < 0) {
            look_for_offer(log); /* of a file on a disk that is not full; may move some */
            int64_t left = ik_log_backlog(log);
            n = left < queued ? queued - left : 0;
        }
    }
    if (log->durability == IK_LOG_SYNCED)
        sync_file(log);
    /* Release: whoever sees done sees sync_error too. */
    atomic_store_explicit(&log->shared->done, asked, memory_order_release);
    futex_wake_all(&log->shared->done);
    ring_whom(log, &log->shared->awaits_done);
}

/* Wait for bytes, the end of the last writer, somebody who asks or an offer, which is seen to: what
 * poll says of the pipe. */
static int await_work(ik_log *log) {
    struct pollfd all[] = {{.fd = log->reader, .events = POLLIN},
                           {.fd = log->wake, .events = POLLIN},
                           {.fd = log->told, .events = POLLIN}};
    uint64_t drained;
    if (poll(all, 3, -1) < 0)
        return 0;
    if (all[2].revents) {
        look_for_offer(log); /* and the pipe may be empty now */
        return 0;
    }
    /* Drained before asked is read again, so a later asker makes it readable again. */
    if (all[1].revents && read(log->wake, &drained, sizeof drained) < 0)
        return 0;
    return all[0].revents;
}

/* Never sleeps but in await_work: an asker whose bytes are moved already sends no more of them.
 * But where nobody asks, it waits a moment after a small move for more to come: to be woken for
 * each message would cost the writers' processor more than the writes do. */
static void run(ik_log *log) {
    const struct timespec moment = {0, MOMENT_NS};
    for (;;) {
        if (somebody_asked(log))
            acknowledge(log);
        int ready = await_work(log);
        int64_t n = ready & POLLIN ? move(log, MOVE_MAX) : 0;
        if (log->durability == IK_LOG_NONE && n > 0 && n < SMALL_MOVE)
            nanosleep(&moment, NULL);
        if (!(ready & POLLIN) && ready & POLLHUP)
            return;
    }
}

static void ignore_what_is_meant_for_others(void) {
    /* A terminal's Ctrl-C and a group's SIGTERM reach the logger too, but it is the last to leave:
     * it ends when the last writer has gone. */
    const int ignored[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGXFSZ, SIGUSR1, SIGUSR2};
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        signal(ignored[i], SIG_IGN);
}

int ik_log_run(void *argument) {
    ik_log *log = argument;
    ignore_what_is_meant_for_others();
    ik_process_unblock();
    ring(log); /* the one before may have been killed before it could */
    run(log);
    sync_file(log);
    return sync_error(log->shared);
}

/* SPDX-License-Identifier: MIT */
#include "pipes.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "wait.h"

enum { MAGIC = 0x6b69, CHUNK = PIPE_BUF < 4096 ? PIPE_BUF : 4096, HEADER = 24 };
enum { PAYLOAD = CHUNK - HEADER };
_Static_assert(sizeof(ik_pipes_chunk) == HEADER, "the header has no holes");

uint32_t ik_pipes_payload(void) {
    return PAYLOAD;
}

/* --- SIGPIPE: only where it would end the process is it held back and taken ---------------- */

typedef struct quiet {
    bool held;
    sigset_t before;
} quiet;

static sigset_t only_sigpipe(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    return set;
}

static quiet hold_sigpipe(void) {
    quiet q = {.held = false};
    struct sigaction now;
    sigset_t pending, set = only_sigpipe();
    if (sigaction(SIGPIPE, NULL, &now) < 0 || now.sa_handler != SIG_DFL)
        return q;
    /* One that is pending already is blocked, so a second changes nothing; and it isn't ours. */
    if (sigpending(&pending) < 0 || sigismember(&pending, SIGPIPE))
        return q;
    q.held = pthread_sigmask(SIG_BLOCK, &set, &q.before) == 0;
    return q;
}

static int64_t release_sigpipe(const quiet *q, int64_t rc) {
    if (!q->held)
        return rc;
    if (rc == -EPIPE) {
        sigset_t set = only_sigpipe();
        int taken;
        sigwait(&set, &taken);
    }
    pthread_sigmask(SIG_SETMASK, &q->before, NULL);
    return rc;
}

/* --- sending -------------------------------------------------------------------------------- */

/* All or nothing, because it is at most PIPE_BUF bytes. */
static int write_whole(int fd, const struct iovec *iov, int count, int64_t deadline_ns) {
    while (writev(fd, iov, count) < 0) {
        if (errno != EAGAIN)
            return -errno;
        int rc = deadline_ns == IK_NOW ? -ETIMEDOUT : ik_wait_fd(fd, POLLOUT, deadline_ns);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int write_chunk(int fd, const ik_pipes_chunk *head, const char *data, int64_t deadline_ns) {
    struct iovec iov[] = {{(void *)head, sizeof *head}, {(void *)data, head->length}};
    return write_whole(fd, iov, 2, deadline_ns);
}

static ik_pipes_chunk whole(uint32_t len) {
    return (ik_pipes_chunk){.magic = MAGIC, .length = (uint16_t)len, .total = len};
}

static int send_part(int fd, const char *data, ik_pipes_part *part, int64_t deadline_ns) {
    ik_pipes_chunk head = {.magic = MAGIC,
                           .total = part->total,
                           .pid = part->pid,
                           .pidns = part->pidns,
                           .lane = part->lane};
    while (part->moved < part->total) {
        uint32_t rest = part->total - part->moved;
        head.offset = part->moved;
        head.length = (uint16_t)(rest < PAYLOAD ? rest : PAYLOAD);
        int rc = write_chunk(fd, &head, data + part->moved, deadline_ns);
        if (rc < 0)
            return rc;
        part->moved += head.length;
    }
    return 0;
}

static void count(ik_pipes_writer *writer, uint64_t messages, uint64_t bytes) {
    __atomic_fetch_add(&writer->messages, messages, __ATOMIC_RELAXED);
    __atomic_fetch_add(&writer->bytes, bytes, __ATOMIC_RELAXED);
}

int ik_pipes_send(ik_pipes_writer *writer, const char *data, size_t len, ik_pipes_part *part,
                  int64_t deadline_ns) {
    quiet q = hold_sigpipe();
    ik_pipes_chunk head = whole((uint32_t)len);
    int rc = part ? send_part(writer->fd, data, part, deadline_ns)
                  : write_chunk(writer->fd, &head, data, deadline_ns);
    if (rc == 0)
        count(writer, 1, len);
    return (int)release_sigpipe(&q, rc);
}

/* Put chunks into out until the next doesn't fit; how many. */
static size_t pack(const ik_pipes_batch *batch, char *out, size_t *ret_size, size_t *ret_bytes) {
    size_t i = batch->next, bytes = 0, size = 0;
    for (; i < batch->count && size + HEADER + batch->lengths[i] <= CHUNK; i++) {
        ik_pipes_chunk head = whole(batch->lengths[i]);
        memcpy(out + size, &head, HEADER);
        memcpy(out + size + HEADER, batch->data + bytes, head.length);
        size += HEADER + head.length;
        bytes += head.length;
    }
    *ret_size = size;
    *ret_bytes = bytes;
    return i - batch->next;
}

static int send_batch(ik_pipes_writer *writer, ik_pipes_batch *batch, int64_t deadline_ns) {
    char out[CHUNK];
    while (batch->next < batch->count) {
        size_t size, bytes, packed = pack(batch, out, &size, &bytes);
        struct iovec iov = {out, size};
        int rc = write_whole(writer->fd, &iov, 1, deadline_ns);
        if (rc < 0)
            return rc;
        batch->next += packed;
        batch->data += bytes;
        count(writer, packed, bytes);
    }
    return 0;
}

int ik_pipes_send_many(ik_pipes_writer *writer, ik_pipes_batch *batch, int64_t deadline_ns) {
    quiet q = hold_sigpipe();
    return (int)release_sigpipe(&q, send_batch(writer, batch, deadline_ns));
}

/* --- receiving ------------------------------------------------------------------------------ */

static bool valid(const ik_pipes_chunk *head) {
    if (head->magic != MAGIC || head->length > PAYLOAD)
        return false;
    if (head->length == head->total)
        return head->offset == 0 && head->pid == 0 && head->pidns == 0 && head->lane == 0;
    return head->length > 0 && head->offset < head->total &&
           head->length <= head->total - head->offset;
}

/* Is this the next chunk of the message being put together? */
static bool continues(const ik_pipes_part *part, const ik_pipes_chunk *head) {
    return part && part->pid == head->pid && part->pidns == head->pidns &&
           part->lane == head->lane && part->total == head->total && part->moved == head->offset;
}

enum { SPIN = 50000, WORTHWHILE = 100000, LEAST = 1000 }; /* nanoseconds */

/* Wait for data. An answer often comes sooner than a sleeper can be woken, so first look for a
 * short while, giving the processor away each time; but only as long as that has lately paid. */
static int wait_for_data(ik_pipes_reader *r, int64_t deadline_ns) {
    int64_t start = ik_wait_now();
    int rc = -ETIMEDOUT;
    while (rc == -ETIMEDOUT && ik_wait_now() - start < r->spin) {
        sched_yield();
        rc = ik_wait_fd(r->fd, POLLIN, IK_NOW);
    }
    if (rc != -ETIMEDOUT) {
        r->spin = SPIN;
        return rc;
    }
    rc = ik_wait_fd(r->fd, POLLIN, deadline_ns);
    bool soon = ik_wait_now() - start < WORTHWHILE;
    r->spin = r->spin > LEAST ? r->spin / 2 : soon ? SPIN : 0;
    return rc;
}

static int64_t read_now(ik_pipes_reader *r, const struct iovec *iov, int64_t deadline_ns) {
    for (;;) {
        /* read(2) is the cheaper one, and most often enough */
        ssize_t n =
            iov[0].iov_len ? readv(r->fd, iov, 2) : read(r->fd, iov[1].iov_base, iov[1].iov_len);
        if (n > 0)
            return n;
        if (n == 0)
            return -ENODATA;
        if (errno != EAGAIN)
            return -errno;
        int rc = deadline_ns == IK_NOW ? -ETIMEDOUT : wait_for_data(r, deadline_ns);
        if (rc < 0)
            return rc;
    }
}

static size_t most(size_t a, size_t b) {
    return a > b ? a : b;
}

/* How far buffer may be filled when `have` bytes of chunks are there and `wanted` messages may be
 * taken: as many bytes as those have at least, or what the chunk that was begun still needs. */
static size_t fill_to(const ik_pipes_reader *r, size_t have, size_t wanted) {
    size_t need = wanted > 0 ? HEADER : 0;
    if (have >= HEADER && r->left == 0)
        need += r->head.length;
    return most(need, wanted * HEADER);
}

/* The bytes, headers included, that the message has after its current chunk. */
static size_t rest(const ik_pipes_reader *r) {
    size_t payload = r->part->total - r->part->moved - r->left;
    return payload + (payload + PAYLOAD - 1) / PAYLOAD * HEADER;
}

/* Read once: first what part still wants of its chunk, the rest into buffer. */
static int fetch(ik_pipes_reader *r, uint32_t wanted, int64_t deadline_ns) {
    size_t have = r->end - r->start;
    memmove(r->buffer, r->buffer + r->start, have);
    r->start = 0;
    r->end = have;
    struct iovec iov[2] = {{NULL, 0}, {NULL, 0}};
    size_t goal = 0;
    if (r->left > 0) {
        iov[0] = (struct iovec){r->part->into + r->part->moved, r->left};
        goal = fill_to(r, have, wanted - (rest(r) == 0));
        if (r->ahead)
            goal = most(goal, rest(r));
    } else {
        goal = fill_to(r, have, wanted);
    }
    goal = goal < r->size ? goal : r->size;
    iov[1] = (struct iovec){r->buffer + have, goal - have};
    int64_t n = read_now(r, iov, deadline_ns);
    if (n < 0)
        return (int)n;
    uint32_t direct = n < (int64_t)r->left ? (uint32_t)n : r->left;
    if (r->left > 0)
        r->part->moved += direct;
    r->left -= direct;
    r->end += (size_t)n - direct;
    r->position += (uint64_t)n;
    return 0;
}

/* Move to part what was read of its chunk already. */
static void move_to_part(ik_pipes_reader *r) {
    size_t have = r->end - r->start;
    uint32_t n = have < r->left ? (uint32_t)have : r->left;
    memcpy(r->part->into + r->part->moved, r->buffer + r->start, n);
    r->part->moved += n;
    r->left -= n;
    r->start += n;
}

static int delivered(ik_pipes_reader *r, size_t len, int came) {
    r->messages++;
    r->bytes += len;
    return came;
}

/* Look at the header at start: one of ik_pipes_came, -EBADMSG, -EMSGSIZE; 0: read more. */
static int look(ik_pipes_reader *r) {
    memcpy(&r->head, r->buffer + r->start, HEADER);
    if (!valid(&r->head))
        return -EBADMSG;
    if (r->head.total > r->largest)
        return -EMSGSIZE;
    if (r->head.length < r->head.total) {
        if (!continues(r->part, &r->head))
            return IK_PIPES_LANE;
        r->start += HEADER;
        r->left = r->head.length;
        return 0;
    }
    size_t len = r->head.length;
    if (r->end - r->start < HEADER + len)
        return 0;
    r->at = r->start + HEADER;
    r->length = len;
    r->start += HEADER + len;
    return delivered(r, len, IK_PIPES_WHOLE);
}

int ik_pipes_next(ik_pipes_reader *r, uint32_t wanted, int64_t deadline_ns) {
    for (;;) {
        if (r->left > 0)
            move_to_part(r);
        if (r->left == 0 && r->part && r->part->moved == r->part->total)
            return delivered(r, r->part->total, IK_PIPES_PART);
        if (r->left == 0 && r->end - r->start >= HEADER) {
            int came = look(r);
            if (came != 0)
                return came;
            if (r->left > 0)
                continue;
        }
        if (wanted == 0)
            return -EAGAIN;
        int rc = fetch(r, wanted, deadline_ns);
        if (rc < 0)
            return rc;
    }
}

int ik_pipes_enter(ik_pipes_reader *r, ik_pipes_part *part) {
    if (!continues(part, &r->head))
        return -EBADMSG;
    r->part = part;
    return 0;
}

void ik_pipes_begin(ik_pipes_reader *r, ik_pipes_part *part, const char *into) {
    *part =
        (ik_pipes_part){.pid = r->head.pid,
                        .pidns = r->head.pidns,
                        .lane = r->head.lane,
                        .total = r->head.total,
                        .into = (char *)into}; /* const, so that cffi passes bytes as they are */
    r->part = part;
}

/* --- raw bytes ------------------------------------------------------------------------------ */

int64_t ik_pipes_write(int fd, const char *data, size_t len) {
    quiet q = hold_sigpipe();
    ssize_t n = write(fd, data, len);
    return release_sigpipe(&q, n < 0 ? -errno : n);
}

#ifdef __linux__
int64_t ik_pipes_splice(int source, int64_t source_offset, int target, int64_t target_offset,
                        size_t len, unsigned flags) {
    off64_t from = source_offset, to = target_offset;
    quiet q = hold_sigpipe();
    ssize_t n = splice(source, source_offset < 0 ? NULL : &from, target,
                       target_offset < 0 ? NULL : &to, len, flags);
    return release_sigpipe(&q, n < 0 ? -errno : n);
}

int64_t ik_pipes_tee(int source, int target, size_t len, unsigned flags) {
    quiet q = hold_sigpipe();
    ssize_t n = tee(source, target, len, flags);
    return release_sigpipe(&q, n < 0 ? -errno : n);
}
#else
int64_t ik_pipes_splice(int source, int64_t source_offset, int target, int64_t target_offset,
                        size_t len, unsigned flags) {
    (void)source, (void)source_offset, (void)target, (void)target_offset, (void)len, (void)flags;
    return -ENOSYS;
}

int64_t ik_pipes_tee(int source, int target, size_t len, unsigned flags) {
    (void)source, (void)target, (void)len, (void)flags;
    return -ENOSYS;
}
#endif

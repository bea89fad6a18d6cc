/* SPDX-License-Identifier: MIT */
#include "ring.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "killpoint_impl.h"

/* --- what the memory holds ------------------------------------------------------------------- */

static const uint64_t MAGIC = 0x0001676e69726b69; /* "ikring", version 1 */
static const uint64_t LARGEST_CAPACITY = (uint64_t)1 << 34;

/* Written by its side, under the lock if there is one; in 128 bytes, because processors fetch cache
 * lines in pairs. */
typedef struct line {
    _Alignas(128) uint64_t index; /* bytes since the beginning; the commit */
    uint64_t counts[2];           /* messages, high half, up to the index / 8 of the low half */
    uint32_t stream;              /* of the senders: id and state of the newest long message */
    uint32_t waiting; /* somebody of the other side SLEEPS on this, for the index, or LISTENS */
} line;

struct ik_ring_shared {
    uint64_t magic; /* stored last */
    uint64_t capacity;
    uint32_t flags;
    uint32_t max_messages;
    _Alignas(64) uint32_t closed[2]; /* apart: each send reads it and no send writes it */
    uint32_t users[2];               /* processes that joined the side and have not parted */
    line lines[2];
    _Alignas(64) unsigned char locks[2][IK_LOCK_SIZE];
};
_Static_assert(sizeof(ik_ring_shared) <= IK_RING_HEADER, "the data begins behind the header");

enum waiting { SLEEPS = 1, LISTENS = 2 };

/* A record: the low 40 bits of its header are the length of the payload. */
enum kind { WHOLE = 1, GAP, FIRST, MORE, LAST };
enum { RECORD = 8, LENGTH_BITS = 40, KIND_BITS = 8 };

/* The state of a long message, below its id of 16 bits. The sender goes from IDLE to SENDING, and
 * back when all of it is in the ring, and not a byte of it received. A receiver that must make room
 * for the rest, and so can't leave it to the next one any more, says TAKEN: then the sender stays,
 * to send it again if that receiver asks so (REWIND) or dies. FINISHED: it has everything, and the
 * sender can't give up any more; the index behind the last piece is the commit. */
enum stream { IDLE = 0, SENDING, TAKEN, FINISHED, REWIND, STATE_BITS = 3 };

static uint64_t record_size(uint64_t len) {
    return RECORD + ((len + 7) & ~(uint64_t)7);
}

static uint64_t header_of(enum kind kind, uint32_t id, uint64_t len) {
    return len | (uint64_t)kind << LENGTH_BITS | (uint64_t)id << (LENGTH_BITS + KIND_BITS);
}

static uint64_t load(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

/* --- counting messages ----------------------------------------------------------------------- */

/* Two counts, so that the one that belongs to the committed index stays while the next is written:
 * a death in between leaves the right one. */
static uint32_t count_at(const line *line, uint64_t index) {
    uint64_t one = load(&line->counts[0]), other = load(&line->counts[1]);
    return (uint32_t)((uint32_t)one == (uint32_t)(index / 8) ? one >> 32 : other >> 32);
}

static void count(line *line, uint64_t before, uint64_t after, uint32_t messages) {
    bool first = (uint32_t)load(&line->counts[0]) == (uint32_t)(before / 8);
    uint64_t total = count_at(line, before) + messages;
    __atomic_store_n(&line->counts[first], total << 32 | (uint32_t)(after / 8), __ATOMIC_RELAXED);
}

/* --- making and attaching -------------------------------------------------------------------- */

int ik_ring_create(void *memory, uint64_t size, uint32_t flags, uint32_t max_messages) {
    ik_ring_shared *shared = memory;
    if (size < IK_RING_HEADER + IK_RING_LEAST)
        return -EINVAL;
    uint64_t capacity = LARGEST_CAPACITY;
    while (capacity > size - IK_RING_HEADER)
        capacity /= 2;
    shared->capacity = capacity;
    shared->flags = flags;
    shared->max_messages = max_messages;
    for (int side = 0; side < 2; side++) {
        int rc = ik_lock_init((ik_lock *)shared->locks[side]);
        if (rc < 0)
            return rc;
    }
    /* Release: who sees the magic sees all of the above. */
    __atomic_store_n(&shared->magic, MAGIC, __ATOMIC_RELEASE);
    return 0;
}

static bool are_sound(const line *lines, uint64_t capacity) {
    /* Acquire: each is loaded after the one before it. */
    uint64_t tail = __atomic_load_n(&lines[IK_RING_SEND].index, __ATOMIC_ACQUIRE);
    uint64_t head = __atomic_load_n(&lines[IK_RING_RECV].index, __ATOMIC_ACQUIRE);
    if (load(&lines[IK_RING_SEND].index) != tail)
        return true; /* it is in use; whoever uses it checks */
    return head % 8 == 0 && tail % 8 == 0 && tail - head <= capacity;
}

static bool is_sound(const ik_ring *ring, uint64_t size) {
    uint64_t capacity = ring->capacity;
    return capacity >= IK_RING_LEAST && capacity <= LARGEST_CAPACITY &&
           (capacity & (capacity - 1)) == 0 && capacity <= size - IK_RING_HEADER &&
           ring->flags <= (IK_RING_MANY_SENDERS | IK_RING_MANY_RECEIVERS) &&
           are_sound(ring->shared->lines, capacity);
}

int ik_ring_attach(ik_ring *ring, void *memory, uint64_t size) {
    ik_ring_shared *shared = memory;
    if (size < IK_RING_HEADER + IK_RING_LEAST || (uintptr_t)memory % IK_RING_ALIGNMENT)
        return -EBADMSG;
    /* Acquire: after the magic, all that was stored before it is seen. */
    uint64_t magic = __atomic_load_n(&shared->magic, __ATOMIC_ACQUIRE);
    if (magic != MAGIC)
        return magic == 0 ? -EAGAIN : -EBADMSG;
    ik_ring found = {.shared = shared, .life = -1};
    found.data = (unsigned char *)memory + IK_RING_HEADER;
    found.capacity = load(&shared->capacity);
    found.largest = found.capacity / 2 - RECORD;
    found.flags = __atomic_load_n(&shared->flags, __ATOMIC_RELAXED);
    found.max_messages = __atomic_load_n(&shared->max_messages, __ATOMIC_RELAXED);
    for (int side = 0; side < 2; side++) {
        found.ends[side].bell = -1;
        /* Behind or equal to what each end looks for, wherever in 2**64 the indices are. */
        found.ends[side].seen = load(&shared->lines[IK_RING_RECV].index);
    }
    if (!is_sound(&found, size))
        return -EBADMSG;
    *ring = found;
    return 0;
}

/* --- waking and sleeping --------------------------------------------------------------------- */

/* The half of an index that changes, as the word of a futex. */
static const uint32_t *word_of(const line *line) {
    return (const uint32_t *)&line->index + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
}

static bool is_locked(const ik_ring *ring, int side) {
    return ring->flags & (side == IK_RING_SEND ? IK_RING_MANY_SENDERS : IK_RING_MANY_RECEIVERS);
}

/* The bells of a channel are sockets, because a hostile peer can make an eventfd that it shares
 * block; of what does not come or go at once nothing is wanted. */
static void ring_bell(int bell) {
    uint64_t one = 1;
    if (bell < 0 || send(bell, &one, sizeof one, MSG_DONTWAIT | MSG_NOSIGNAL) > 0)
        return;
    if (errno == ENOTSOCK && write(bell, &one, sizeof one) < 0)
        return; /* it rings already, or its listener is gone */
}

/* Wake who waits at the side for the other's index: one sleeper, who passes it on, or all. */
static void wake(ik_ring *ring, int side, int sleepers) {
    line *other = &ring->shared->lines[!side];
    uint32_t waiting = __atomic_exchange_n(&other->waiting, 0, __ATOMIC_RELAXED);
    IK_KILLPOINT("ring.waking");
    if (waiting & SLEEPS)
        ik_wake_word(&other->waiting, sleepers);
    if (waiting & LISTENS)
        ring_bell(ring->ends[side].bell);
}

void ik_ring_wake(ik_ring *ring, int side) {
    __atomic_fetch_or(&ring->shared->lines[!side].waiting, SLEEPS | LISTENS, __ATOMIC_RELAXED);
    wake(ring, side, INT_MAX);
}

/* Of many sleepers one was woken; if it left something, the next is woken by it. */
static void pass_on(ik_ring *ring, int side) {
    line *other = &ring->shared->lines[!side];
    if (!(__atomic_load_n(&other->waiting, __ATOMIC_RELAXED) & SLEEPS))
        return;
    uint64_t used = load(&ring->shared->lines[IK_RING_SEND].index) -
                    load(&ring->shared->lines[IK_RING_RECV].index);
    if (side == IK_RING_RECV ? used != 0 : used <= ring->capacity / 2)
        wake(ring, side, 1);
}

/* Until nothing rings; but not for ever: the other may go on ringing. */
static void silence(int bell) {
    char rung[512];
    for (int i = 0; i < 512; i++) {
        ssize_t len = recv(bell, rung, sizeof rung, MSG_DONTWAIT);
        bool is_socket = len >= 0 || errno != ENOTSOCK;
        if (!is_socket)
            len = read(bell, rung, sizeof rung);
        if (len < (is_socket ? 0 : (ssize_t)sizeof rung))
            return;
    }
}

/* Sleep in poll, on the bell, the peer's life, and another bell if there is one. A peer whose life
 * has ended may have done something before. */
static int sleep_in_poll(const ik_ring *ring, int side, int other_bell, int64_t deadline_ns,
                         int64_t slice_ns) {
    int64_t left = deadline_ns == IK_FOREVER ? INT64_MAX : deadline_ns - ik_wait_now();
    if (left <= 0)
        return -ETIMEDOUT;
    struct timespec time = {.tv_nsec = left < slice_ns ? left : slice_ns};
    struct pollfd all[3] = {{.fd = ring->ends[side].bell, .events = POLLIN},
                            {.fd = ring->life, .events = POLLRDHUP},
                            {.fd = other_bell, .events = POLLIN}};
    int rc = ppoll(all, 3, &time, NULL);
    if (rc < 0)
        return -errno;
    if (all[0].revents)
        silence(all[0].fd);
    if (all[1].revents)
        return -ECONNRESET;
    return rc > 0 ? 0 : left <= slice_ns ? -ETIMEDOUT : -EINTR;
}

static bool is_closed(const ik_ring *ring, int side) {
    /* Acquire: what was sent before the closing is seen after it. */
    return __atomic_load_n(&ring->shared->closed[side], __ATOMIC_ACQUIRE) != 0;
}

/* Announce that the side waits for the other's index. 0 if that is not what was seen any more, else
 * the word to sleep on: who is slow to look for sleepers after an earlier commit may take the
 * announcement back, and then one must not fall asleep. */
static uint32_t announce(ik_ring *ring, int side, enum waiting how, uint32_t seen) {
    line *other = &ring->shared->lines[!side];
    uint32_t waiting = __atomic_fetch_or(&other->waiting, how, __ATOMIC_RELAXED) | how;
    /* Our store of waiting must be seen before our load of the index; in commit() the store of the
     * index before the load of waiting. So one of the two sees the other's. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    bool waits = __atomic_load_n(word_of(other), __ATOMIC_RELAXED) == seen;
    return waits && !is_closed(ring, !side) ? waiting : 0;
}

/* A sleeper whose waker was killed has mostly just fallen asleep; one that has slept long is idle,
 * and should cost little. Half a slice, a slice, and then two. */
static int64_t next_slice(ik_ring_end *end) {
    uint32_t naps = __atomic_load_n(&end->naps, __ATOMIC_RELAXED);
    __atomic_store_n(&end->naps, naps + 1, __ATOMIC_RELAXED);
    return naps < 2 ? (int64_t)IK_SLICE / 2 << naps : 2 * (int64_t)IK_SLICE;
}

/* Wait until the other's index is not what was seen. 0, or -ETIMEDOUT, -EINTR, -ECONNRESET. */
static int wait_for_other(ik_ring *ring, int side, uint32_t seen, int64_t deadline_ns) {
    line *other = &ring->shared->lines[!side];
    if (deadline_ns == IK_NOW || deadline_ns == IK_RING_STEP)
        return deadline_ns == IK_NOW ? -ETIMEDOUT : -EINTR;
    if (ik_wait_spin(word_of(other), seen, &ring->ends[side].other))
        return 0;
    bool in_poll = ring->life >= 0;
    uint32_t waiting = announce(ring, side, in_poll ? LISTENS : SLEEPS, seen);
    if (!waiting)
        return 0;
    IK_KILLPOINT("ring.asleep");
    int64_t slice = next_slice(&ring->ends[side]);
    int rc = in_poll ? sleep_in_poll(ring, side, -1, deadline_ns, slice)
                     : ik_wait_word_for(&other->waiting, waiting, deadline_ns, slice);
    if (rc == 0)
        __atomic_store_n(&ring->ends[side].naps, 0, __ATOMIC_RELAXED);
    if (rc == 0 && is_locked(ring, side)) /* woken alone: the others may still be asleep */
        __atomic_fetch_or(&other->waiting, SLEEPS, __ATOMIC_RELAXED);
    bool did_more =
        __atomic_load_n(word_of(other), __ATOMIC_RELAXED) != seen || is_closed(ring, !side);
    return rc == -ECONNRESET && did_more ? 0 : rc;
}

/* A peer that goes on changing its index could keep us looking at it for ever: every so many turns,
 * what the waiting comes to. 0: go on. */
static int after_turn(uint32_t turn, int64_t deadline_ns) {
    if (turn % 1024)
        return 0;
    return deadline_ns > IK_NOW && ik_wait_now() >= deadline_ns ? -ETIMEDOUT : -EINTR;
}

/* --- entering an end ------------------------------------------------------------------------- */

static ik_lock *lock_of(const ik_ring *ring, int side) {
    return (ik_lock *)ring->shared->locks[side];
}

/* The turns of the threads of one process: the id of the one inside, and the top bit if another
 * waits. */
static const uint32_t CONTENDED = (uint32_t)1 << 31;

/* No thread is inside, but the end is entered: see ik_ring_park(). */
static const uint32_t PARKED = 0x7fffffff;

/* A thread of the parent's that was inside at a fork is not in this process, and never leaves. */
static bool is_left_behind(uint32_t busy) {
    int tid = (int)(busy & ~CONTENDED);
    return tid && (uint32_t)tid != PARKED && syscall(SYS_tgkill, getpid(), tid, 0) < 0 &&
           errno == ESRCH;
}

static int wait_for_turn(ik_ring_end *end, int64_t deadline_ns) {
    uint32_t me = (uint32_t)ik_wait_thread();
    for (;;) {
        uint32_t found = __atomic_load_n(&end->busy, __ATOMIC_RELAXED);
        uint32_t next = found == 0 || is_left_behind(found) ? me : found;
        if ((found & ~CONTENDED) == me)
            return -EDEADLK;
        /* Acquire: after the release of the last one inside. */
        if (!__atomic_compare_exchange_n(&end->busy, &found, next | CONTENDED, false,
                                         __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            continue;
        if (next == me)
            return 0;
        int rc = ik_wait_word(&end->busy, next | CONTENDED, deadline_ns);
        if (rc < 0)
            return rc;
    }
}

static int take_turn(ik_ring_end *end, int64_t deadline_ns) {
    uint32_t nobody = 0;
    if (__atomic_compare_exchange_n(&end->busy, &nobody, (uint32_t)ik_wait_thread(), false,
                                    __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return 0;
    return wait_for_turn(end, deadline_ns);
}

static void end_turn(ik_ring_end *end) {
    /* Release: the next one inside sees what this one did. */
    if (__atomic_exchange_n(&end->busy, 0, __ATOMIC_RELEASE) & CONTENDED)
        ik_wake_word(&end->busy, 1);
}

/* --- the state of a long message ------------------------------------------------------------- */

static uint32_t *stream_of(const ik_ring *ring) {
    return &ring->shared->lines[IK_RING_SEND].stream;
}

/* Acquire: what was committed before the state was set is seen. */
static uint32_t load_stream(const ik_ring *ring) {
    return __atomic_load_n(stream_of(ring), __ATOMIC_ACQUIRE);
}

static enum stream state_of(uint32_t stream) {
    return stream & ((1 << STATE_BITS) - 1);
}

/* Release: who sees the state sees what was committed before. */
static bool change_stream(ik_ring *ring, uint32_t id, enum stream from, enum stream to) {
    uint32_t expected = id << STATE_BITS | from;
    return __atomic_compare_exchange_n(stream_of(ring), &expected, id << STATE_BITS | to, false,
                                       __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* The sender is gone: who receives the rest must know. */
static void drop_stream(ik_ring *ring) {
    uint32_t stream = load_stream(ring);
    if (state_of(stream) != IDLE)
        __atomic_store_n(stream_of(ring), stream >> STATE_BITS << STATE_BITS, __ATOMIC_RELEASE);
}

/* Part of it was received by who won't finish: ask the sender for all of it again, if it still is
 * in there. What nobody has TAKEN is all there, and a second time would be once too often. */
static bool rewind_stream(ik_ring *ring, uint32_t id) {
    return change_stream(ring, id, TAKEN, REWIND) || change_stream(ring, id, FINISHED, REWIND);
}

/* Nothing is half done: the index is the truth. The dead may have owed somebody the waking. */
static void mend(ik_ring *ring, int side) {
    if (side == IK_RING_SEND)
        drop_stream(ring);
    ik_ring_wake(ring, !side);
    IK_KILLPOINT("ring.mended");
    ik_lock_mended(lock_of(ring, side));
}

int ik_ring_enter(ik_ring *ring, int side, int64_t deadline_ns) {
    ik_ring_end *end = &ring->ends[side];
    int64_t until = deadline_ns == IK_RING_STEP ? IK_NOW : deadline_ns;
    int rc = is_locked(ring, side) ? ik_lock_take(lock_of(ring, side), &end->turn, until)
                                   : take_turn(end, until);
    if (rc < 0)
        return rc == -ETIMEDOUT && deadline_ns == IK_RING_STEP ? -EINTR : rc;
    IK_KILLPOINT("ring.entered");
    if (rc == 1)
        mend(ring, side);
    else if (side == IK_RING_SEND)
        drop_stream(ring);
    end->at = load(&ring->shared->lines[side].index);
    end->staged = 0;
    if (end->at % 8 == 0)
        return 0;
    ik_ring_leave(ring, side);
    return -EBADMSG;
}

void ik_ring_leave(ik_ring *ring, int side) {
    if (!is_locked(ring, side)) {
        end_turn(&ring->ends[side]);
        return;
    }
    ik_lock_release(lock_of(ring, side));
    IK_KILLPOINT("ring.left");
    pass_on(ring, side);
}

/* --- committing ------------------------------------------------------------------------------ */

/* Then the one to be woken is who sleeps inside the other end, and not just any sleeper. */
static bool is_streaming(const ik_ring *ring) {
    return state_of(load_stream(ring)) != IDLE;
}

void ik_ring_commit(ik_ring *ring, int side) {
    ik_ring_end *end = &ring->ends[side];
    line *own = &ring->shared->lines[side];
    count(own, load(&own->index), end->at, end->staged);
    IK_KILLPOINT("ring.commit");
    /* Release: who sees the index sees the records before it (of the head: that they were read). */
    __atomic_store_n(&own->index, end->at, __ATOMIC_RELEASE);
    IK_KILLPOINT("ring.committed");
    end->staged = 0;
    /* See announce(). */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(&own->waiting, __ATOMIC_RELAXED))
        wake(ring, !side, is_locked(ring, !side) && !is_streaming(ring) ? 1 : INT_MAX);
}

/* --- sending --------------------------------------------------------------------------------- */

/* There is room for a message more, beside its bytes. The index of the receivers moves on while it
 * is looked at, then its count may be gone, and is taken anew. */
static bool is_below_limit(ik_ring *ring) {
    ik_ring_end *end = &ring->ends[IK_RING_SEND];
    const line *heads = &ring->shared->lines[IK_RING_RECV];
    const line *tails = &ring->shared->lines[IK_RING_SEND];
    uint32_t sent = count_at(tails, load(&tails->index)) + end->staged, received;
    for (int tries = 0; tries < 3; tries++) {
        /* Acquire: the count was stored before the index. */
        end->seen = __atomic_load_n(&heads->index, __ATOMIC_ACQUIRE);
        received = count_at(heads, end->seen);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (load(&heads->index) == end->seen)
            break;
    }
    return sent - received < ring->max_messages;
}

/* 0, -EAGAIN or -EBADMSG. */
static int find_room(ik_ring *ring, uint64_t need) {
    ik_ring_end *end = &ring->ends[IK_RING_SEND];
    if (end->at - end->seen > ring->capacity - need) {
        /* Acquire: the receivers have read what we write over now. */
        end->seen = __atomic_load_n(&ring->shared->lines[IK_RING_RECV].index, __ATOMIC_ACQUIRE);
        if (end->at - end->seen > ring->capacity)
            return -EBADMSG;
        if (end->at - end->seen > ring->capacity - need)
            return -EAGAIN;
    }
    return ring->max_messages == 0 || is_below_limit(ring) ? 0 : -EAGAIN;
}

void *ik_ring_reserve(ik_ring *ring, uint64_t len, int *ret_error) {
    ik_ring_end *end = &ring->ends[IK_RING_SEND];
    uint64_t offset = end->at & (ring->capacity - 1), to_the_end = ring->capacity - offset;
    bool closed = is_closed(ring, IK_RING_RECV) || is_closed(ring, IK_RING_SEND);
    int rc = len > ring->largest ? -EMSGSIZE : closed ? -EPIPE : 0;
    if (rc == 0) {
        end->gap = record_size(len) > to_the_end ? to_the_end : 0;
        rc = find_room(ring, end->gap + record_size(len));
    }
    if (rc < 0) {
        *ret_error = rc;
        return NULL;
    }
    return ring->data + (end->gap ? 0 : offset) + RECORD;
}

static void stage(ik_ring *ring, uint64_t header, uint64_t len) {
    ik_ring_end *end = &ring->ends[IK_RING_SEND];
    uint64_t mask = ring->capacity - 1;
    if (end->gap) {
        uint64_t gap = header_of(GAP, 0, end->gap - RECORD);
        memcpy(ring->data + (end->at & mask), &gap, RECORD);
        end->at += end->gap;
        end->gap = 0;
    }
    memcpy(ring->data + (end->at & mask), &header, RECORD);
    IK_KILLPOINT("ring.staged");
    end->at += record_size(len);
}

void ik_ring_stage(ik_ring *ring, uint64_t len) {
    stage(ring, header_of(WHOLE, 0, len), len);
    ring->ends[IK_RING_SEND].staged++;
}

int ik_ring_wait_room(ik_ring *ring, uint64_t len, int64_t deadline_ns) {
    for (uint32_t turn = 1;; turn++) {
        int rc = ik_ring_enter(ring, IK_RING_SEND, deadline_ns);
        if (rc < 0)
            return rc;
        if (ik_ring_reserve(ring, len, &rc))
            return 0;
        uint32_t seen = (uint32_t)ring->ends[IK_RING_SEND].seen;
        ik_ring_leave(ring, IK_RING_SEND);
        if (rc == -EAGAIN)
            rc = wait_for_other(ring, IK_RING_SEND, seen, deadline_ns);
        if (rc < 0 || (rc = after_turn(turn, deadline_ns)) < 0)
            return rc;
    }
}

/* --- sending a long message: pieces that fit, with an id; the first says how long it is --------
 */

static void begin_stream(ik_ring *ring, ik_ring_progress *progress) {
    uint32_t id = ((load_stream(ring) >> STATE_BITS) + 1) & 0xffff;
    *progress = (ik_ring_progress){.stream = id, .inside = SENDING};
    /* Seen before the first piece, which the release of the index sees to. */
    __atomic_store_n(stream_of(ring), id << STATE_BITS | SENDING, __ATOMIC_RELAXED);
    IK_KILLPOINT("ring.stream");
}

/* After a piece that did not wait: with a busy peer they might go on for long, with a hostile one
 * for ever. 0: go on; -ETIMEDOUT, -EINTR. */
static int after_piece(uint32_t pieces, int64_t deadline_ns) {
    if (deadline_ns == IK_NOW)
        return pieces % 65536 ? 0 : -ETIMEDOUT;
    if (deadline_ns > IK_NOW && ik_wait_now() >= deadline_ns)
        return -ETIMEDOUT;
    return pieces % 256 ? 0 : -EINTR;
}

static uint64_t piece_limit(const ik_ring *ring) {
    uint64_t quarter = ring->capacity / 4, limit = 128 << 10;
    return quarter < limit ? quarter : limit;
}

static int send_piece(ik_ring *ring, ik_ring_progress *progress, const void *data, uint64_t len) {
    uint64_t extra = progress->done ? 0 : sizeof len, left = len - progress->done;
    uint64_t most = piece_limit(ring) - extra, piece = left < most ? left : most;
    int rc = 0;
    unsigned char *room = ik_ring_reserve(ring, extra + piece, &rc);
    if (!room)
        return rc;
    memcpy(room, &len, extra);
    memcpy(room + extra, (const char *)data + progress->done, piece);
    enum kind kind = extra ? FIRST : piece == left ? LAST : MORE;
    stage(ring, header_of(kind, progress->stream, extra + piece), extra + piece);
    ring->ends[IK_RING_SEND].staged = kind == LAST;
    ik_ring_commit(ring, IK_RING_SEND);
    IK_KILLPOINT("ring.piece");
    progress->done += piece;
    return 0;
}

static void begin_again_if_asked(ik_ring *ring, ik_ring_progress *progress) {
    if (state_of(load_stream(ring)) == REWIND)
        begin_stream(ring, progress);
}

/* What is larger than the ring could never go through for who doesn't wait at all: so a moment for
 * each further piece. */
static int64_t piece_deadline(const ik_ring_progress *progress, int64_t deadline_ns) {
    bool at_once = deadline_ns == IK_NOW && progress->done > 0;
    return at_once ? ik_wait_now() + IK_RING_MOMENT : deadline_ns;
}

/* If whoever was inside the end died, the kernel gives us its lock. */
static void look_after(ik_ring *ring, int side) {
    if (is_locked(ring, side) && ik_ring_enter(ring, side, IK_NOW) == 0)
        ik_ring_leave(ring, side);
}

/* The receivers are behind the last piece. */
static bool is_received(ik_ring *ring, uint64_t *ret_head) {
    /* Acquire: as find_room(). */
    *ret_head = __atomic_load_n(&ring->shared->lines[IK_RING_RECV].index, __ATOMIC_ACQUIRE);
    return *ret_head == ring->ends[IK_RING_SEND].at;
}

/* Everything is in the ring, and may be received at any moment. 0: it is sent; 1: a receiver wants
 * it again; -EAGAIN: one is in the middle of it; -EBADMSG. */
static int try_finish(ik_ring *ring, const ik_ring_progress *progress, uint64_t *ret_head) {
    IK_KILLPOINT("ring.finish");
    if (change_stream(ring, progress->stream, SENDING, IDLE))
        return 0;
    /* Before the index, which is set before the state. After REWIND it says nothing: the pieces are
     * skipped then. */
    enum stream state = state_of(load_stream(ring));
    if (is_received(ring, ret_head) && state != REWIND)
        return 0;
    return state == REWIND ? 1 : state == TAKEN || state == FINISHED ? -EAGAIN : -EBADMSG;
}

/* Out of time, or of patience. True if the message is not received, nor will be. What a receiver
 * has FINISHED is committed in a moment, unless it dies. */
static bool take_back(ik_ring *ring, const ik_ring_progress *progress) {
    uint64_t head;
    for (int tries = 0; tries < 10; tries++) {
        if (change_stream(ring, progress->stream, TAKEN, IDLE))
            return true;
        int rc = try_finish(ring, progress, &head);
        if (rc != -EAGAIN)
            return rc != 0;
        look_after(ring, IK_RING_RECV);
        ik_wait_word(word_of(&ring->shared->lines[IK_RING_RECV]), (uint32_t)head,
                     ik_wait_now() + IK_SLICE / 10);
    }
    return true; /* stopped just there, or hostile */
}

/* 0: it is sent; 1: all of it again; or as ik_ring_send(). */
static int finish_stream(ik_ring *ring, ik_ring_progress *progress, int64_t deadline_ns) {
    uint64_t head;
    int rc;
    progress->inside = FINISHED;
    while ((rc = try_finish(ring, progress, &head)) == -EAGAIN) {
        if (is_closed(ring, IK_RING_RECV))
            return -EPIPE;
        rc = wait_for_other(ring, IK_RING_SEND, (uint32_t)head,
                            piece_deadline(progress, deadline_ns));
        IK_KILLPOINT("ring.awaiting");
        if (rc == -EINTR)
            look_after(ring, IK_RING_RECV);
        if (rc < 0)
            return rc;
    }
    return rc;
}

/* Until everything is in the ring. */
static int send_pieces(ik_ring *ring, ik_ring_progress *progress, const void *data, uint64_t len,
                       uint32_t *pieces, int64_t deadline_ns) {
    while (progress->done < len) {
        begin_again_if_asked(ring, progress);
        int rc = send_piece(ring, progress, data, len);
        if (rc == -EAGAIN)
            rc = wait_for_other(ring, IK_RING_SEND, (uint32_t)ring->ends[IK_RING_SEND].seen,
                                piece_deadline(progress, deadline_ns));
        else if (rc == 0 && progress->done < len)
            rc = after_piece(++*pieces, deadline_ns);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static int send_stream(ik_ring *ring, ik_ring_progress *progress, const void *data, uint64_t len,
                       int64_t deadline_ns) {
    int rc;
    if (!progress->inside) {
        rc = ik_ring_enter(ring, IK_RING_SEND, deadline_ns);
        if (rc < 0)
            return rc;
        begin_stream(ring, progress);
    }
    uint32_t pieces = 0;
    do {
        rc = send_pieces(ring, progress, data, len, &pieces, deadline_ns);
        if (rc == 0)
            rc = finish_stream(ring, progress, deadline_ns);
        if (rc == 1)
            begin_stream(ring, progress);
    } while (rc == 1);
    if (rc == -EINTR)
        return rc;
    if (rc < 0)
        return ik_ring_give_up(ring, IK_RING_SEND, progress) ? 0 : rc;
    progress->inside = 0;
    drop_stream(ring);
    ik_ring_leave(ring, IK_RING_SEND);
    return 0;
}

/* Entered, and there was room: copy into it, and leave. The end may have been shut meanwhile. */
static int put(ik_ring *ring, const void *data, uint64_t len) {
    int rc = 0;
    void *room = ik_ring_reserve(ring, len, &rc);
    if (room) {
        memcpy(room, data, len);
        ik_ring_stage(ring, len);
        ik_ring_commit(ring, IK_RING_SEND);
    }
    ik_ring_leave(ring, IK_RING_SEND);
    return rc;
}

int ik_ring_send(ik_ring *ring, ik_ring_progress *progress, const void *data, uint64_t len,
                 int64_t deadline_ns) {
    if (len > ring->largest)
        return send_stream(ring, progress, data, len, deadline_ns);
    int rc;
    do {
        rc = ik_ring_wait_room(ring, len, deadline_ns);
        if (rc == 0)
            rc = put(ring, data, len);
    } while (rc == -EAGAIN);
    return rc;
}

/* --- receiving ------------------------------------------------------------------------------- */

/* The header at our index, read once: its kind and length. The payload is all within what was
 * committed and within the ring, and a gap goes to its end, or it is -EBADMSG. */
static int read_header(const ik_ring *ring, uint64_t *ret_len, uint32_t *ret_id) {
    const ik_ring_end *end = &ring->ends[IK_RING_RECV];
    uint64_t offset = end->at & (ring->capacity - 1);
    uint64_t header = load((const uint64_t *)(ring->data + offset));
    uint64_t len = header & (((uint64_t)1 << LENGTH_BITS) - 1), size = record_size(len);
    int kind = header >> LENGTH_BITS & ((1 << KIND_BITS) - 1);
    if (size > end->seen - end->at || size > ring->capacity - offset)
        return -EBADMSG;
    if (kind == GAP && size != ring->capacity - offset)
        return -EBADMSG;
    *ret_len = len;
    *ret_id = (uint32_t)(header >> (LENGTH_BITS + KIND_BITS));
    return kind >= WHOLE && kind <= LAST ? kind : -EBADMSG;
}

static const unsigned char *payload(const ik_ring *ring) {
    return ring->data + (ring->ends[IK_RING_RECV].at & (ring->capacity - 1)) + RECORD;
}

/* 0 if there are records; -EAGAIN, -ENODATA, -EBADMSG. */
static int find_records(ik_ring *ring) {
    ik_ring_end *end = &ring->ends[IK_RING_RECV];
    /* Also `at` was read from the memory: a distance that can't be is not believed. */
    if (end->seen - end->at - 1 < ring->capacity)
        return 0;
    bool closed = is_closed(ring, IK_RING_SEND);
    /* Acquire: the records up to the index are seen. */
    uint64_t tail = __atomic_load_n(&ring->shared->lines[IK_RING_SEND].index, __ATOMIC_ACQUIRE);
    if (tail - end->at > ring->capacity || tail % 8)
        return -EBADMSG;
    end->seen = tail;
    return tail != end->at ? 0 : closed ? -ENODATA : -EAGAIN;
}

static void skip(ik_ring *ring, uint64_t len) {
    ring->ends[IK_RING_RECV].at += record_size(len);
}

/* A piece whose beginning went with a receiver that died or gave up. */
static void skip_orphan(ik_ring *ring, int kind, uint64_t len, uint32_t id) {
    bool alone = ring->ends[IK_RING_RECV].staged == 0;
    rewind_stream(ring, id);
    IK_KILLPOINT("ring.rewound");
    skip(ring, len);
    ring->ends[IK_RING_RECV].staged += kind == LAST;
    if (alone) /* else the caller has not yet said that what it staged is done */
        ik_ring_commit(ring, IK_RING_RECV);
}

int ik_ring_look(ik_ring *ring, const void **ret_data, uint64_t *ret_len) {
    uint64_t len;
    uint32_t id;
    /* Each turn goes forward in the ring; the index of the senders is read anew at most once per
     * record, so a hostile one can't keep us here. */
    for (int rc = find_records(ring);; rc = find_records(ring)) {
        int kind = rc < 0 ? rc : read_header(ring, &len, &id);
        if (kind < 0)
            return kind;
        if (kind == GAP) {
            skip(ring, len);
            if (ring->ends[IK_RING_RECV].at == ring->ends[IK_RING_RECV].seen)
                return -EBADMSG; /* a gap is committed with the record behind it */
        } else if (kind == WHOLE) {
            *ret_data = payload(ring);
            *ret_len = len;
            return 1;
        } else if (kind == FIRST) {
            if (len <= sizeof *ret_len)
                return -EBADMSG;
            /* Who took it has died before it made room. */
            change_stream(ring, id, TAKEN, SENDING);
            *ret_len = load((const uint64_t *)payload(ring));
            return *ret_len > ring->largest ? 0 : -EBADMSG;
        } else {
            skip_orphan(ring, kind, len, id);
            if (ring->ends[IK_RING_RECV].at == ring->ends[IK_RING_RECV].seen)
                return -EAGAIN;
        }
    }
}

void ik_ring_step(ik_ring *ring, uint64_t len) {
    skip(ring, len);
    ring->ends[IK_RING_RECV].staged++;
}

int ik_ring_wait_message(ik_ring *ring, int64_t deadline_ns) {
    for (uint32_t turn = 1;; turn++) {
        const void *data;
        uint64_t len;
        int rc = ik_ring_enter(ring, IK_RING_RECV, deadline_ns);
        if (rc < 0)
            return rc;
        if ((rc = ik_ring_look(ring, &data, &len)) >= 0)
            return 0;
        uint32_t seen = (uint32_t)ring->ends[IK_RING_RECV].seen;
        ik_ring_leave(ring, IK_RING_RECV);
        if (rc == -EAGAIN)
            rc = wait_for_other(ring, IK_RING_RECV, seen, deadline_ns);
        if (rc < 0 || (rc = after_turn(turn, deadline_ns)) < 0)
            return rc;
    }
}

/* --- receiving a long message ---------------------------------------------------------------- */

/* To make room for the rest of it: from now on it is this receiver's or, if that fails, sent again.
 * 0, or -EAGAIN: its sender is not in there any more. */
static int take_stream(ik_ring *ring, ik_ring_progress *progress) {
    if (progress->inside == TAKEN)
        return 0;
    if (!change_stream(ring, progress->stream, SENDING, TAKEN))
        return -EAGAIN;
    IK_KILLPOINT("ring.taking");
    progress->inside = TAKEN;
    ik_ring_commit(ring, IK_RING_RECV);
    IK_KILLPOINT("ring.taken");
    return 0;
}

/* The last piece was copied. 0, or -ECONNABORTED: the sender has given up before. */
static int receive_last(ik_ring *ring, ik_ring_progress *progress) {
    bool taken = progress->inside == TAKEN;
    ring->ends[IK_RING_RECV].staged++;
    if (taken && !change_stream(ring, progress->stream, TAKEN, FINISHED))
        return -ECONNABORTED;
    IK_KILLPOINT("ring.took");
    ik_ring_commit(ring, IK_RING_RECV);
    if (taken)
        change_stream(ring, progress->stream, FINISHED, IDLE);
    return 1;
}

/* A piece was copied. Its room is needed now only if the message is larger than the ring. */
static int receive_more(ik_ring *ring, ik_ring_progress *progress, uint64_t len) {
    if (progress->inside == TAKEN)
        ik_ring_commit(ring, IK_RING_RECV);
    else if (len >= ring->capacity)
        take_stream(ring, progress);
    return 0;
}

/* 1: that was the last; 0: there are more; -EAGAIN; -ECONNABORTED; -EBADMSG. */
static int recv_piece(ik_ring *ring, ik_ring_progress *progress, void *buffer, uint64_t len) {
    uint64_t size, total = len;
    uint32_t id;
    int rc = find_records(ring), kind = rc < 0 ? rc : read_header(ring, &size, &id);
    if (kind == GAP) {
        skip(ring, size);
        rc = find_records(ring);
        kind = rc < 0 ? -EBADMSG : read_header(ring, &size, &id);
    }
    if (kind < 0)
        return kind == -ENODATA ? -ECONNABORTED : kind;
    uint64_t extra = progress->inside ? 0 : sizeof total, left = len - progress->done;
    uint64_t most = piece_limit(ring) - extra, piece = left < most ? left : most;
    if (progress->inside && ((kind != MORE && kind != LAST) || id != progress->stream))
        return -ECONNABORTED; /* something else came: its sender gave up */
    if ((!progress->inside && kind != FIRST) || size < extra)
        return -EBADMSG;
    memcpy(&total, payload(ring), extra);
    if (total != len || size - extra != piece || (kind == LAST) != (piece == left))
        return -EBADMSG; /* also smaller pieces, of which there could be any number */
    memcpy((char *)buffer + progress->done, payload(ring) + extra, piece);
    int inside = progress->inside == TAKEN ? TAKEN : SENDING;
    *progress = (ik_ring_progress){progress->done + piece, id, inside};
    skip(ring, size);
    return kind == LAST ? receive_last(ring, progress) : receive_more(ring, progress, len);
}

static bool is_being_sent(ik_ring *ring, const ik_ring_progress *progress) {
    return load_stream(ring) == (progress->stream << STATE_BITS | TAKEN);
}

/* For the next piece. 0: look again; -EINTR, -ETIMEDOUT, -ECONNRESET, -ECONNABORTED. */
static int wait_for_piece(ik_ring *ring, ik_ring_progress *progress, int64_t deadline_ns) {
    ik_ring_end *end = &ring->ends[IK_RING_RECV];
    if (take_stream(ring, progress) < 0 || !is_being_sent(ring, progress))
        return load(&ring->shared->lines[IK_RING_SEND].index) == end->seen ? -ECONNABORTED : 0;
    int rc = wait_for_other(ring, IK_RING_RECV, (uint32_t)end->seen,
                            piece_deadline(progress, deadline_ns));
    if (rc == -EINTR)
        look_after(ring, IK_RING_SEND);
    if (rc < 0 && !is_being_sent(ring, progress))
        return 0; /* it is all there, or there will be no more */
    return rc;
}

int ik_ring_recv_stream(ik_ring *ring, ik_ring_progress *progress, void *buffer, uint64_t len,
                        int64_t deadline_ns) {
    for (uint32_t pieces = 1;; pieces++) {
        int rc = recv_piece(ring, progress, buffer, len);
        if (rc == -EAGAIN)
            rc = wait_for_piece(ring, progress, deadline_ns);
        else if (rc == 0 && progress->inside == TAKEN)
            rc = after_piece(pieces, deadline_ns);
        if (rc == -ETIMEDOUT && progress->inside == TAKEN && !rewind_stream(ring, progress->stream))
            rc = 0;
        if (rc == -EINTR)
            return rc;
        if (rc != 0) {
            progress->inside = 0;
            if (rc == -ECONNABORTED) /* its pieces are nobody's */
                ik_ring_commit(ring, IK_RING_RECV);
            ik_ring_leave(ring, IK_RING_RECV);
            return rc < 0 ? rc : 0;
        }
    }
}

int ik_ring_give_up(ik_ring *ring, int side, ik_ring_progress *progress) {
    int done = 0;
    if (!progress->inside)
        return 0;
    if (side == IK_RING_SEND) {
        done = progress->inside == FINISHED && !take_back(ring, progress);
        drop_stream(ring);
        ik_ring_wake(ring, IK_RING_RECV);
    } else if (progress->inside == TAKEN) {
        rewind_stream(ring, progress->stream);
    }
    progress->inside = 0;
    ik_ring_leave(ring, side);
    return done;
}

/* Entered, and something is there: take it into the buffer, and leave. */
static int64_t take(ik_ring *ring, void *buffer, uint64_t size, int64_t deadline_ns) {
    const void *data;
    uint64_t len = 0;
    int rc = ik_ring_look(ring, &data, &len);
    if (rc >= 0 && len > size)
        rc = -EMSGSIZE;
    if (rc == 0) {
        ik_ring_progress progress = {0};
        do
            rc = ik_ring_recv_stream(ring, &progress, buffer, len, deadline_ns);
        while (rc == -EINTR);
        return rc < 0 ? rc : (int64_t)len;
    }
    if (rc == 1) {
        memcpy(buffer, data, len);
        ik_ring_step(ring, len);
        ik_ring_commit(ring, IK_RING_RECV);
    }
    ik_ring_leave(ring, IK_RING_RECV);
    return rc < 0 ? rc : (int64_t)len;
}

int64_t ik_ring_recv(ik_ring *ring, void *buffer, uint64_t size, int64_t deadline_ns) {
    int64_t rc;
    do {
        rc = ik_ring_wait_message(ring, deadline_ns);
        if (rc == 0)
            rc = take(ring, buffer, size, deadline_ns);
    } while (rc == -EINTR || rc == -ECONNABORTED || rc == -EAGAIN);
    return rc;
}

/* --- the ends -------------------------------------------------------------------------------- */

void ik_ring_shut(ik_ring *ring, int side) {
    /* Release: what was sent before is seen by who sees this. */
    __atomic_store_n(&ring->shared->closed[side], 1, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* as in commit() */
    ik_ring_wake(ring, IK_RING_SEND);
    ik_ring_wake(ring, IK_RING_RECV);
}

void ik_ring_join(ik_ring *ring, int side) {
    __atomic_fetch_add(&ring->shared->users[side], 1, __ATOMIC_RELAXED);
}

void ik_ring_part(ik_ring *ring, int side, int for_good) {
    /* Release and acquire: the last one's shutting comes after what all the others sent. */
    if (__atomic_fetch_sub(&ring->shared->users[side], 1, __ATOMIC_ACQ_REL) == 1 && for_good)
        ik_ring_shut(ring, side);
}

int ik_ring_is_deserted(const ik_ring *ring, int side) {
    struct pollfd life = {.fd = ring->life, .events = POLLRDHUP};
    if (poll(&life, 1, 0) <= 0 || is_closed(ring, !side))
        return 0;
    const line *lines = ring->shared->lines;
    return side == IK_RING_SEND ||
           load(&lines[IK_RING_SEND].index) == load(&lines[IK_RING_RECV].index);
}

void ik_ring_reopen(ik_ring *ring, int side) {
    __atomic_store_n(&ring->shared->closed[side], 0, __ATOMIC_RELEASE);
}

int ik_ring_glance(ik_ring *ring, int side) {
    const ik_ring_end *end = &ring->ends[side];
    return ik_wait_glance(word_of(&ring->shared->lines[!side]), (uint32_t)end->seen, &end->other);
}

int ik_ring_listen(ik_ring *ring, int side) {
    silence(ring->ends[side].bell);
    uint64_t other = load(&ring->shared->lines[!side].index);
    uint64_t own = load(&ring->shared->lines[side].index);
    /* For receivers equal means that there is nothing, for senders that there is all the room. */
    bool waits = (own == other) == (side == IK_RING_RECV);
    if (announce(ring, side, LISTENS, (uint32_t)other) && waits)
        return 0;
    ring_bell(ring->ends[side].bell);
    return 1;
}

/* --- both ways at a time --------------------------------------------------------------------- */

int ik_ring_spin(ik_ring *ring, int side) {
    const uint32_t *word = word_of(&ring->shared->lines[!side]);
    return ik_wait_spin(word, __atomic_load_n(word, __ATOMIC_RELAXED), &ring->ends[side].other);
}

int ik_ring_sleep_both(const ik_ring *out, const ik_ring *in, int64_t deadline_ns) {
    int rc = sleep_in_poll(out, IK_RING_SEND, in ? in->ends[IK_RING_RECV].bell : -1, deadline_ns,
                           IK_SLICE);
    return rc == -ECONNRESET && is_closed(out, IK_RING_RECV) ? 0 : rc;
}

static void set_inside(ik_ring_end *end, uint32_t thread) {
    uint32_t found = __atomic_load_n(&end->busy, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&end->busy, &found, thread | (found & CONTENDED), false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        continue;
}

void ik_ring_park(ik_ring *ring) {
    set_inside(&ring->ends[IK_RING_RECV], PARKED);
}

void ik_ring_resume(ik_ring *ring) {
    set_inside(&ring->ends[IK_RING_RECV], (uint32_t)ik_wait_thread());
}

void ik_ring_get_stats(ik_ring *ring, ik_ring_stats *ret_stats) {
    const line *lines = ring->shared->lines;
    uint64_t head = load(&lines[IK_RING_RECV].index), tail = load(&lines[IK_RING_SEND].index);
    *ret_stats = (ik_ring_stats){.used = tail - head > ring->capacity ? 0 : tail - head,
                                 .sent = count_at(&lines[IK_RING_SEND], tail),
                                 .received = count_at(&lines[IK_RING_RECV], head)};
    for (int side = 0; side < 2; side++) {
        ret_stats->recoveries[side] = ik_lock_recoveries(lock_of(ring, side));
        ret_stats->holder[side] = is_locked(ring, side) ? ik_lock_holder(lock_of(ring, side)) : 0;
        ret_stats->asleep[side] = __atomic_load_n(&lines[!side].waiting, __ATOMIC_RELAXED) != 0;
        ret_stats->closed[side] = is_closed(ring, side);
    }
}

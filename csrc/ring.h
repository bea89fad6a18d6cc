/* ring.h - a byte ring of messages in shared memory.
 *
 * The memory holds a header and a power of two of bytes. A message is a record, a header of 8 bytes
 * and the payload, rounded up to 8 bytes and never split; one of more than half the ring goes
 * through in pieces, which one receive puts together.
 *
 * One store of the tail makes a sent message so, one store of the head a received one. Whatever is
 * written before those is scratch: a process killed there has done nothing, and nothing is mended.
 *
 * An end (of senders, of receivers) may be used by many processes if the ring was made with a lock
 * for that end; else by one process at a time, whose threads take turns. A ring without locks may
 * be shared with a process that is not trusted: all that is read from the memory is read once and
 * checked, so that such a peer can spoil messages and nothing else.
 *
 * -EINTR of any function that waits: a signal came or a slice is over; look around, call again.
 */
#pragma once
#include "lock.h"

/* A deadline for who waits elsewhere: what would wait returns -EINTR instead. */
enum ik_ring_deadline { IK_RING_STEP = -2 };

/* Nanoseconds for each piece of a long message but the first, when the deadline is IK_NOW. */
enum ik_ring_moment { IK_RING_MOMENT = 10000000 };

enum ik_ring_side { IK_RING_SEND = 0, IK_RING_RECV = 1 };
enum ik_ring_flags { IK_RING_MANY_SENDERS = 1, IK_RING_MANY_RECEIVERS = 2 };
/* Bytes before the data, of the smallest data, and of what the memory's address is a multiple of.
 */
enum ik_ring_sizes { IK_RING_HEADER = 512, IK_RING_LEAST = 256, IK_RING_ALIGNMENT = 128 };

typedef struct ik_ring_shared ik_ring_shared;

/* One end, as one process knows it. */
typedef struct ik_ring_end {
    uint64_t at;     /* its index, with what is staged; only while entered, as the next three */
    uint64_t seen;   /* the other end's index, as last read */
    uint64_t gap;    /* bytes that the reserved record skips to begin at the start */
    uint32_t staged; /* messages */
    uint32_t busy;   /* without a lock: the thread that entered, and whether others wait */
    int bell;      /* eventfd, FIFO or socket that wakes who waits at this end in poll; -1: none */
    ik_spin turn;  /* waiting to enter */
    ik_spin other; /* waiting for the other end */
    uint32_t naps; /* slices slept in vain, in a row */
} ik_ring_end;

/* A ring as one process knows it: each has its own, also after fork. */
typedef struct ik_ring {
    ik_ring_shared *shared;
    unsigned char *data;
    uint64_t capacity;
    uint64_t largest; /* payload of a record; what is larger is streamed */
    uint32_t flags;
    uint32_t max_messages;
    int life; /* a descriptor that hangs up when the peer dies, waited for in poll; -1: none */
    ik_ring_end ends[2];
} ik_ring;

/* How far a long message has come; zero to begin with. */
typedef struct ik_ring_progress {
    uint64_t done;
    uint32_t stream;
    int inside; /* the end: the state of the message, as this side knows it */
} ik_ring_progress;

/* Numbers for people; each was true at some moment. */
typedef struct ik_ring_stats {
    uint64_t used;     /* bytes */
    uint32_t sent;     /* modulo 2**32; a long message counts when it is complete */
    uint32_t received; /* modulo 2**32 */
    uint32_t recoveries[2];
    int holder[2]; /* thread that has the lock of the end, or 0 */
    int asleep[2]; /* somebody is, or was when last looked */
    int closed[2];
} ik_ring_stats;

/* --- making and attaching -------------------------------------------------------------------- */

/* Make a ring in size bytes of zeros at memory that nobody else uses. Its capacity
 * is the largest power of two that fits behind the header. max_messages: 0 for no limit but the
 * bytes. 0, or -EINVAL: the size is too small. */
int ik_ring_create(void *memory, uint64_t size, uint32_t flags, uint32_t max_messages);

/* Attach to what is there, of at least size bytes; all of the header is checked. 0, or -EBADMSG:
 * there is no ring, or none of this version, or it does not fit; -EAGAIN: it is not complete yet.
 */
int ik_ring_attach(ik_ring *ring, void *memory, uint64_t size);

/* --- whole operations: what waits, until the deadline --------------------------------------- */

/* Send one message. 0, or -ETIMEDOUT; -EINTR: call again with the same progress, or give up;
 * -EPIPE: an end is closed; -EBADMSG: the memory is spoilt; -EDEADLK: this thread has
 * reserved; -ECONNRESET: the peer is gone; -ENOTRECOVERABLE. */
int ik_ring_send(ik_ring *ring, ik_ring_progress *progress, const void *data, uint64_t len,
                 int64_t deadline_ns);

/* Wait until there is a message, and enter the receiving end: it is entered when the result is 0.
 * Else as ik_ring_send(), and -ENODATA: the sending end is closed and everything was received. */
int ik_ring_wait_message(ik_ring *ring, int64_t deadline_ns);

/* Wait until there is room for a record of len bytes, and enter the sending end. */
int ik_ring_wait_room(ik_ring *ring, uint64_t len, int64_t deadline_ns);

/* Receive the long message that ik_ring_look() found into len bytes, and leave. 0; -ECONNABORTED:
 * its sender gave up or died, the end is left, nothing was received. On -EINTR the end is still
 * entered: call again with the same progress, or give up. Any other error leaves it; the message is
 * then there still, or will be sent again. */
int ik_ring_recv_stream(ik_ring *ring, ik_ring_progress *progress, void *buffer, uint64_t len,
                        int64_t deadline_ns);

/* After -EINTR, end an operation of that side for good. 0: it did nothing; 1: of a sender, while
 * somebody receives the long message: that was quicker, the message is sent. */
int ik_ring_give_up(ik_ring *ring, int side, ik_ring_progress *progress);

/* Receive one message of at most size bytes. Its length, or as above; -EMSGSIZE: it is larger, and
 * stays. For callers that need no look around: -EINTR is dealt with here. */
int64_t ik_ring_recv(ik_ring *ring, void *buffer, uint64_t size, int64_t deadline_ns);

/* --- the steps of which they are made: nothing here waits, but for entering ---------------------
 */

/* Have the end for oneself. 0, -ETIMEDOUT, -EINTR, -EDEADLK, -ENOTRECOVERABLE. */
int ik_ring_enter(ik_ring *ring, int side, int64_t deadline_ns);

/* What is staged and not published is as if it never was. */
void ik_ring_leave(ik_ring *ring, int side);

/* Room for a record of len bytes, or NULL with *ret_error: -EAGAIN, -EPIPE, -EMSGSIZE (must be
 * streamed), -EBADMSG. */
void *ik_ring_reserve(ik_ring *ring, uint64_t len, int *ret_error);

/* Stage the reserved record, of len bytes or fewer. */
void ik_ring_stage(ik_ring *ring, uint64_t len);

/* What is staged at the side is done: those messages are sent, or received. */
void ik_ring_commit(ik_ring *ring, int side);

/* The next message: 1 and where it is, or 0 and how long if it comes in pieces. Else -EAGAIN;
 * -ENODATA: there will be none; -EBADMSG. */
int ik_ring_look(ik_ring *ring, const void **ret_data, uint64_t *ret_len);

/* Stage the receipt of the message that was looked at, and go behind it. */
void ik_ring_step(ik_ring *ring, uint64_t len);

/* --- the ends ------------------------------------------------------------------------------- */

/* No more messages from, or to, this side: wakes everybody. */
void ik_ring_shut(ik_ring *ring, int side);

/* One process more that uses the side, and one that does no more. The last of them shuts it, unless
 * it parts in favour of one that will join. Who is killed never parts. */
void ik_ring_join(ik_ring *ring, int side);
void ik_ring_part(ik_ring *ring, int side, int for_good);

/* The peer's life has ended, it did not shut its side, and it left nothing for this one. */
int ik_ring_is_deserted(const ik_ring *ring, int side);

/* Take that back. */
void ik_ring_reopen(ik_ring *ring, int side);

/* 1 if something came for the side (messages, room) within the microsecond that it is worth looking
 * without letting others work; called right after -EAGAIN or -ETIMEDOUT. */
int ik_ring_glance(ik_ring *ring, int side);

/* Silence the bell of the side, and have it rung at the next commit of the other. 1, and it rings
 * now, if a receive would not block, or a send of any record. A sender tries again after this call
 * and before it waits. */
int ik_ring_listen(ik_ring *ring, int side);

/* Wake all who wait at the side, so that they look around. */
void ik_ring_wake(ik_ring *ring, int side);

/* --- for who sends into one ring and meanwhile receives from another ------------------------- */

/* Look for a moment whether the other end moves: 1, or 0. */
int ik_ring_spin(ik_ring *ring, int side);

/* After ik_ring_listen() at the ends: sleep until there may be room in out, or something in the
 * other ring, NULL: regardless. 0, or -ETIMEDOUT, -EINTR, -ECONNRESET. */
int ik_ring_sleep_both(const ik_ring *out, const ik_ring *in, int64_t deadline_ns);

/* Leave the receiving end entered, amid a long message, for whichever thread of this process goes
 * on with it; and go on. Only without a lock. */
void ik_ring_park(ik_ring *ring);
void ik_ring_resume(ik_ring *ring);

void ik_ring_get_stats(ik_ring *ring, ik_ring_stats *ret_stats);

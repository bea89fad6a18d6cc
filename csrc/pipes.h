/* pipes.h - messages over a pipe, and splice and tee. See pipe(7), splice(2), tee(2).
 *
 * Every write that reaches the pipe is one whole chunk: a header and its payload, together at most
 * PIPE_BUF bytes, which the kernel never mixes with another write. So the stream can be parsed
 * whoever is killed whenever, and there is no lock that a dead writer could hold. A message larger
 * than a chunk is sent as several in one lane, a number that only its sender uses, and put together
 * by the reader; the chunks of other lanes may come in between.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* The header in front of each payload. Where the chunk is a whole message, the rest is 0. */
typedef struct ik_pipes_chunk {
    uint16_t magic;
    uint16_t length;           /* of the payload */
    uint32_t total;            /* of the message */
    uint32_t offset;           /* of this payload in it; 0 gives up what came in the lane before */
    uint32_t pid, pidns, lane; /* the sender and its namespace (0: unknown), and which of its own */
} ik_pipes_chunk;

/* A message of several chunks, on either side; the lock is the caller's. */
typedef struct ik_pipes_part {
    uint32_t pid, pidns, lane;
    uint32_t total;
    uint32_t moved; /* bytes so far */
    char *into;     /* where the reader wants its total bytes */
} ik_pipes_part;

/* Any number of threads may use one. */
typedef struct ik_pipes_writer {
    int fd; /* non-blocking, as everywhere below */
    uint64_t messages, bytes;
} ik_pipes_writer;

/* Messages of at most ik_pipes_payload() bytes, end to end in data, sent as many to a write as fit.
 * A call goes on at next. */
typedef struct ik_pipes_batch {
    const char *data;
    const uint32_t *lengths;
    size_t count, next;
} ik_pipes_batch;

/* One caller at a time. */
typedef struct ik_pipes_reader {
    int fd;
    uint32_t largest; /* a message of more bytes stays where it is */
    int ahead;        /* read all of a message at once, and with it what others sent in between */
    char *buffer;     /* of size bytes, two chunks or more; [start, end) were read, not yet taken */
    size_t size, start, end;
    ik_pipes_chunk head; /* the last header seen */
    ik_pipes_part *part; /* the message being put together, or NULL */
    uint32_t left;       /* bytes of its current chunk that are still to come */
    size_t at, length;   /* the message that came whole, in buffer */
    uint64_t messages, bytes;
    uint64_t position; /* bytes read since the beginning */
    int64_t spin;      /* how many nanoseconds it pays to look before sleeping */
} ik_pipes_reader;

enum ik_pipes_came {
    IK_PIPES_LANE = 1,  /* a chunk that isn't the next one of part: begin or enter, call again */
    IK_PIPES_WHOLE = 2, /* a message is at `at` in buffer, until the next call */
    IK_PIPES_PART = 3   /* part is complete */
};

/* Bytes that fit into one chunk. */
uint32_t ik_pipes_payload(void);

/* Send one message; part is NULL for one that fits into a chunk. 0 when all of it is in the pipe,
 * or -EPIPE, -ETIMEDOUT, -EINTR, ...: with a part call again to go on, without one nothing went. */
int ik_pipes_send(ik_pipes_writer *writer, const char *data, size_t len, ik_pipes_part *part,
                  int64_t deadline_ns);
int ik_pipes_send_many(ik_pipes_writer *writer, ik_pipes_batch *batch, int64_t deadline_ns);

/* Receive until one of ik_pipes_came. Unless ahead is set, reads no more bytes than `wanted`
 * messages have at least, so that at most so many whole ones are taken out of the pipe; 0 takes
 * only what was read before. Or -ENODATA: end of file, -EBADMSG: not a chunk, -EMSGSIZE,
 * -ETIMEDOUT, -EINTR, ... */
int ik_pipes_next(ik_pipes_reader *reader, uint32_t wanted, int64_t deadline_ns);

/* After IK_PIPES_LANE: put the message that begins there into `into`, of head.total bytes; or go on
 * with one begun before: 0, or -EBADMSG: the chunk isn't its next one. */
void ik_pipes_begin(ik_pipes_reader *reader, ik_pipes_part *part, const char *into);
int ik_pipes_enter(ik_pipes_reader *reader, ik_pipes_part *part);

/* One write(2) or splice(2) that never ends the process by SIGPIPE; one tee(2). Offsets of -1: the
 * position of the descriptor. Bytes moved or -errno; -EAGAIN is the caller's to wait out. */
int64_t ik_pipes_write(int fd, const char *data, size_t len);
int64_t ik_pipes_splice(int source, int64_t source_offset, int target, int64_t target_offset,
                        size_t len, unsigned flags);
int64_t ik_pipes_tee(int source, int target, size_t len, unsigned flags);

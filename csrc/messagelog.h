/* messagelog.h - many processes append messages through one pipe; a logger child moves it to a
 * file.
 *
 * A message reaches the pipe whole or, if its writer is killed in the middle of one longer than
 * PIPE_BUF, is marked as torn by the next writer. Up to PIPE_BUF it is one write, which the kernel
 * never splits; beyond, a robust lock keeps other writers out until the last byte.
 * The logger keeps no byte in user space, so killing it loses none: another one goes on. The
 * supervisor may offer it another file, which it takes between two messages.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum ik_log_format { IK_LOG_RAW, IK_LOG_RECORD };

/* What an append waits for: the pipe has it, the file has it, the disk has it. */
enum ik_log_durability { IK_LOG_NONE, IK_LOG_WRITTEN, IK_LOG_SYNCED };

/* What the processes of one log share; in memory that all of them map. */
typedef struct ik_log_shared ik_log_shared;

/* One process's end of a log. Filled in by whoever opens the descriptors; -1: not held here. */
typedef struct ik_log {
    int reader; /* the pipe, read by the logger, held open by its supervisor */
    int writer; /* non-blocking */
    int file;   /* regular, not O_APPEND (splice refuses it) */
    int wake;   /* eventfd: somebody waits for an acknowledgement */
    int acked; /* eventfd, non-blocking: what an event loop waits for has come; see ik_log_append */
    int told;  /* socket of packets, the logger's end: another file is offered */
    int tell;  /* its supervisor's end */
    int format;
    int durability;
    ik_log_shared *shared;
} ik_log;

typedef struct ik_log_counters {
    uint64_t messages; /* appended */
    uint64_t bytes;    /* appended, as they stand in the file */
    uint64_t moved;    /* bytes that the loggers have moved to the file */
    uint32_t torn;     /* messages whose writer ended in their middle */
    int error;         /* errno that stops the logger now (ENOSPC, ...), or 0 */
    int sync_error;    /* errno of the first failed fdatasync of the file in use, or 0 */
    uint32_t files;    /* switches to another file */
    uint32_t split;    /* of these, those that were not between two messages */
} ik_log_counters;

/* An append under way. Start with data and len, all else 0; after -EINTR call again with the same,
 * after -ETIMEDOUT either that or ik_log_abandon, after any other error ik_log_abandon. */
typedef struct ik_append {
    const void *data;
    size_t len;
    size_t sent;
    int locked;
    int full; /* -ETIMEDOUT meant: no room in the pipe */
    int asked;
    uint32_t ticket;
    uint32_t file;
} ik_append;

size_t ik_log_shared_size(void);

/* Map the shared memory behind a descriptor of that size; NULL with no memory left. */
ik_log_shared *ik_log_map(int memory);
void ik_log_unmap(ik_log_shared *shared);

/* Prepare it, zeroed, for its first use. 0 or -errno. */
int ik_log_shared_init(ik_log_shared *shared);

/* The longest line that ik_log_format_record makes of len bytes. */
size_t ik_log_record_bound(size_t len, const char *peer);

/* Write the record line of one message into line; connection 0 is left out. Its length. */
size_t ik_log_format_record(char *line, const void *data, size_t len, const char *peer,
                            uint64_t connection);

/* Append a message (a whole line, in record format). 0 when as durable as the log promises, or
 * -EINTR: run signal handlers, call again; -ETIMEDOUT; -EPIPE: no logger and no supervisor;
 * -EIO and others: fdatasync failed, nothing is promised of this file any more.
 *
 * With IK_NOW, no other deadline, it never waits, so an event loop can use it: after -ETIMEDOUT it
 * does other things until writer is ready for POLLOUT (append->full) or else acked for POLLIN,
 * which it reads empty first, and calls again with the same append. It also calls again after 100
 * ms without either: who was to ring acked may have been killed before it did. A message up to
 * PIPE_BUF is whole in the pipe (sent == len) or not at all (sent == 0): then nothing is held, and
 * data may be given up, or another text put in its place. Longer ones hold the lock while they are
 * in their middle, and only the thread that began can go on: a loop should not append any. Of
 * several loops that poll acked, one may read it before the other has seen it; with an
 * edge-triggered epoll nobody need read it. */
int ik_log_append(ik_log *log, ik_append *append, int64_t deadline_ns);

/* Give an append up: in the middle of a long message this leaves the torn mark. */
void ik_log_abandon(ik_log *log, ik_append *append);

void ik_log_read_counters(const ik_log *log, ik_log_counters *ret_counters);

/* Bytes waiting in the pipe, or -errno. */
int64_t ik_log_backlog(const ik_log *log);

/* The supervisor: offer the logger an open file, one offer at a time. It takes it when no message
 * is half-way, all before is in the old file and, if the log promises that, synced; from until_ns
 * on between any two bytes. tell becomes readable when it has. 0 or -errno. */
int ik_log_offer(ik_log *log, int file, int64_t until_ns);

/* Take the offer back unless it has been taken; how many were taken so far. */
uint32_t ik_log_withdraw(ik_log *log);

/* The logger child: moves the pipe to the file until the last writer is gone. For fork; argument is
 * an ik_log. The exit status: 0, or the errno that stopped it. */
int ik_log_run(void *argument);

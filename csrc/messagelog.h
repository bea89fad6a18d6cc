/* messagelog.h - many processes append messages through one pipe; a logger child moves it to a
 * file.
 *
 *     writers --write--> pipe --splice--> second pipe --splice--> file
 *        longer than PIPE_BUF: a file of its own --splice--^
 *
 * A message is in the log whole or not at all, and no writer ever holds a lock. Up to PIPE_BUF it
 * is one write, which the kernel never splits; a longer one is written to memory of its own, which
 * goes to the logger in one packet. A pipe's mutex is held while it is spliced to a file, which
 * lasts as long as the disk does. So the logger alone touches the second pipe; the first one is
 * moved there by reference, which waits for no disk. Nor has any other process the log file open:
 * closing one may wait for its disk too. The logger keeps no byte in user space, so killing it
 * loses none: another one goes on. The supervisor may offer it another file, which it takes between
 * two messages.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum ik_log_format { IK_LOG_RAW, IK_LOG_RECORD };

/* What an append waits for: the pipe has it, the file has it, the disk has it. */
enum ik_log_durability { IK_LOG_NONE, IK_LOG_WRITTEN, IK_LOG_SYNCED };

/* What the processes of one log share; in memory that all of them map. */
typedef struct ik_log_shared ik_log_shared;

/* One process's end of a log. Filled in by whoever opens the descriptors; -1: not held here. The
 * logger has all but writer, hand and tell; the supervisor, which outlives loggers, all but file.
 */
typedef struct ik_log {
    int reader;         /* the writers' pipe */
    int writer;         /* non-blocking */
    int handed;         /* socket of packets, the logger's end: messages longer than PIPE_BUF */
    int hand;           /* the writers' end */
    int staging_reader; /* the second pipe, as large as the first one */
    int staging_writer;
    int parked; /* socket of packets: the file in use waits here for the next logger */
    int park;   /* its other end */
    int wake;   /* eventfd: somebody waits for an acknowledgement */
    int acked; /* eventfd, non-blocking: what an event loop waits for has come; see ik_log_append */
    int told;  /* socket of packets, the logger's end: another file is offered */
    int tell;  /* its supervisor's end */
    int file;  /* regular, not O_APPEND (splice refuses it); opened by the logger, from parked */
    int format;
    int durability;
    ik_log_shared *shared;
} ik_log;

typedef struct ik_log_counters {
    uint64_t messages; /* appended, but for those whose writer was killed before it could count */
    uint64_t bytes;    /* of them, as they stand in the file */
    int error;         /* errno that stops the logger now (ENOSPC, ...), or 0 */
    int sync_error;    /* errno of the first failed fdatasync of the file in use, or 0 */
    uint32_t split;    /* switches to another file that were not between two messages */
} ik_log_counters;

/* An append under way. Start with data and len, all else 0. After -EINTR and -ETIMEDOUT call again
 * with the same, or forget it: nothing is held. */
typedef struct ik_append {
    const void *data;
    size_t len;
    int appended; /* it is whole in the log; else nothing of it is */
    int full;     /* -ETIMEDOUT meant: no room in the pipe */
    int behind;   /* it waits for a long message that came before */
    int passed;   /* and that has been moved */
    int asked;
    uint32_t ticket;
    uint32_t file;
} ik_append;

size_t ik_log_shared_size(void);

/* Map the shared memory behind a descriptor of that size, zeroed before its first use; NULL with no
 * memory left. */
ik_log_shared *ik_log_map(int memory);
void ik_log_unmap(ik_log_shared *shared);

/* The longest line that ik_log_format_record makes of len bytes. */
size_t ik_log_record_bound(size_t len, const char *peer);

/* Write the record line of one message into line; connection 0 is left out. Its length. */
size_t ik_log_format_record(char *line, const void *data, size_t len, const char *peer,
                            uint64_t connection);

/* Append a message (a whole line, in record format). 0 when as durable as the log promises, or
 * -EINTR: run signal handlers, call again; -ETIMEDOUT; -EPIPE: no logger and no supervisor;
 * -EIO and others: fdatasync failed, nothing is promised of this file any more; of a message longer
 * than PIPE_BUF also -ENOMEM, -EMFILE, ...: it is not appended.
 *
 * With IK_NOW, no other deadline, it never waits, so an event loop can use it: after -ETIMEDOUT it
 * does other things until writer is ready for POLLOUT (append->full) or else acked for POLLIN,
 * which it reads empty first, and calls again with the same append. It also calls again after 100
 * ms without either: the logger that was to ring acked may have been killed before it did. Unless
 * append->appended, data may be given up, or another text put in its place. Of several loops that
 * poll acked, one may read it before the other has seen it; with an edge-triggered epoll nobody
 * need read it. */
int ik_log_append(ik_log *log, ik_append *append, int64_t deadline_ns);

void ik_log_read_counters(const ik_log *log, ik_log_counters *ret_counters);

/* Bytes that are not in the file, or -errno. Waits for no disk. While one splice to the file lasts
 * all of it counts. */
int64_t ik_log_backlog(const ik_log *log);

/* The supervisor, before the first logger: this is the file. It need not stay open here. 0 or
 * -errno. */
int ik_log_park(ik_log *log, int file);

/* The supervisor: offer the logger an open file, one offer at a time. It takes it when all that was
 * appended before is in the old file and, if the log promises that, synced; from until_ns on
 * between any two bytes. tell becomes readable when it has. 0 or -errno. */
int ik_log_offer(ik_log *log, int file, int64_t until_ns);

/* Take the offer back unless it has been taken. As ik_log_in_use(). */
uint32_t ik_log_withdraw(ik_log *log);

/* The number of the file in use: another one after each switch. Reads tell empty. */
uint32_t ik_log_in_use(ik_log *log);

/* The logger child: moves the pipe to the file until the last writer is gone. For fork; argument is
 * an ik_log. The exit status: 0, or the errno that stopped it. */
int ik_log_run(void *argument);

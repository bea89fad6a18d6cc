/* load.h - load on an echo server, or one that answers a request, from one epoll loop; every byte
 * that comes back is checked.
 *
 * Closed loop: a connection sends its next message when the last one is back, so a server that
 * stalls is sent less, and the stall is one late message for each connection. On a schedule
 * (interval_ns) message k is due at k * interval_ns on connection k % connections, whatever the
 * server does, and its latency counts from then ("without coordinated omission").
 *
 * A load on nobody (the first connection is refused) fails. One that nothing is answered to ends at
 * its first time limit, one without a duration also when errors are all that comes.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* Bytes of the largest message; connections at a time; source addresses of a loopback load. */
enum ik_load_limits {
    IK_LOAD_LARGEST = 16777216,
    IK_LOAD_MOST_CONNECTIONS = 1000000,
    IK_LOAD_SOURCES = 16,
};

enum ik_load_kind {
    IK_LOAD_REFUSED,
    IK_LOAD_TIMED_OUT,
    IK_LOAD_RESET,
    IK_LOAD_CLOSED_EARLY,
    IK_LOAD_WRONG_BYTE,
    IK_LOAD_TOO_MUCH,
    IK_LOAD_OTHER,
    IK_LOAD_KINDS,
};

enum ik_load_phase { IK_LOAD_OPENING, IK_LOAD_RUNNING, IK_LOAD_ENDING, IK_LOAD_DONE };

/* What a connection is doing. */
enum ik_load_state {
    IK_LOAD_NEW,     /* not begun yet */
    IK_LOAD_PAUSED,  /* after an error */
    IK_LOAD_QUEUED,  /* a Unix socket whose server has a full backlog */
    IK_LOAD_HELLO,   /* connecting, and one byte or request there and back: the server has it */
    IK_LOAD_READY,   /* nothing under way */
    IK_LOAD_ECHOING, /* a message under way */
    IK_LOAD_CLOSING, /* our side is shut down; the end of file is to come */
    IK_LOAD_ENDED,
};

typedef struct ik_load_options {
    const char *host; /* numeric, IPv4 or IPv6; or NULL */
    int port;
    const char *path; /* of a Unix socket; used without a host */
    uint32_t connections;
    uint32_t idle;       /* further ones, held silently */
    int reconnect;       /* a connection for each message */
    int64_t size;        /* of a message of a pattern that is echoed; used without a request */
    const void *request; /* what each message is; or NULL */
    int64_t request_len;
    const void *answer; /* and what comes back to it */
    int64_t answer_len;
    uint64_t messages;   /* of each connection; 0: no limit */
    int64_t warm_up_ns;  /* not counted at first */
    int64_t duration_ns; /* counted then; 0: no limit */
    int64_t timeout_ns;  /* of a message, of opening, of the end of file */
    int64_t grace_ns;    /* of all that is under way when the duration is over, or at a stop */
    double interval_ns;  /* of the schedule of all connections together; 0: closed loop */
} ik_load_options;

/* The first error of its kind. */
typedef struct ik_load_failure {
    uint64_t count;
    uint64_t connection; /* they are numbered from 0 in the order of their opening */
    uint64_t position;   /* in its stream: bytes that had come back */
    int64_t at_ns;       /* since the start */
    int state;           /* ik_load_state */
    int error;           /* errno, or 0 */
    int expected, got;   /* bytes, for IK_LOAD_WRONG_BYTE */
} ik_load_failure;

typedef struct ik_load_counters {
    int phase;
    uint32_t open;    /* connections that the server has now */
    uint64_t count;   /* messages (with reconnect: connections) that were counted */
    uint64_t echoed;  /* messages that came back, counted or not */
    uint64_t bytes;   /* that came back right, in all */
    uint64_t unsent;  /* due by the schedule, but never begun; at the end */
    int64_t began_ns; /* when counting began, on CLOCK_MONOTONIC; 0: not yet */
    int64_t ended_ns; /* when it ended; 0: not yet */
    int64_t worst_ns; /* the largest latency */
} ik_load_counters;

typedef struct ik_load ik_load;

/* Prepare a load; nothing is sent yet. 0, or -EINVAL (a bad host), -ENAMETOOLONG, -ENOMEM, ... */
int ik_load_new(const ik_load_options *options, ik_load **ret);
void ik_load_free(ik_load *load);

/* Go on until until_ns on CLOCK_MONOTONIC at the latest. 1 at the end, 0 before, -EINTR: run signal
 * handlers and call again; another error is epoll's, or says why nobody can be reached. See
 * epoll(7).
 */
int ik_load_run(ik_load *load, int64_t until_ns);

/* Begin nothing more; what is under way comes to its end, within the grace. */
void ik_load_stop(ik_load *load);

void ik_load_read_counters(const ik_load *load, ik_load_counters *ret);
void ik_load_read_failure(const ik_load *load, int kind, ik_load_failure *ret);

/* The latency in nanoseconds that a share (0 to 1) of the counted messages did not exceed, at most
 * 0.8 % too large. 0 if nothing was counted. */
int64_t ik_load_percentile(const ik_load *load, double share);

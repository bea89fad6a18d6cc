/* echo.h - the echo service for one connection, run by a forked child. */
#pragma once
#include <stdint.h>

#include "messagelog.h"

/* How a connection ended: the child's exit status. */
enum ik_echo_end {
    IK_ECHO_DONE = 0,       /* the client closed its side, or we were told to stop */
    IK_ECHO_IDLE = 3,       /* nothing came for idle_ns, or up to a quarter longer */
    IK_ECHO_NOT_READ = 4,   /* the client took none of the answer for idle_ns */
    IK_ECHO_RESET = 5,      /* the connection broke */
    IK_ECHO_LOG_FAILED = 6, /* the log did not take the message, so it was not echoed either */
};

/* Counted by all children of a server in memory that they share. */
typedef struct ik_echo_counters {
    uint64_t echoes;
    uint64_t bytes;
} ik_echo_counters;

typedef struct ik_echo {
    int socket;
    int64_t idle_ns; /* 0: none */
    ik_log *log;     /* NULL: none */
    const char *peer;
    uint64_t connection;
    ik_echo_counters *counters;
} ik_echo;

/* An ik_echo with all that it points to but the counters, for a child that has no other memory. */
typedef struct ik_echo_job {
    ik_echo echo;
    ik_log log;
    char peer[80];
} ik_echo_job;

/* Read a piece, log it, echo it, until end of file; then close. One piece is one message of the
 * log, small enough to reach it by one atomic write. SIGTERM ends it after what has come already.
 * For fork; argument is an ik_echo. Returns an ik_echo_end. */
int ik_echo_run(void *argument);

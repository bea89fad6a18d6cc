/* connection.h - one client of a server: receive a piece, log it, answer it, and so on.
 *
 * A connection is a small state machine that one function drives a piece at a time. Whether that
 * function waits is the caller's choice: a child or a thread that has this client only lets it
 * block, a loop over many clients has it say what it waits for. Either way a piece is in the log
 * before any of its answer is sent.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "messagelog.h"

/* How a connection ended; also the exit status of a child that served it. */
enum ik_connection_end {
    IK_END_OPEN = -1,
    IK_END_DONE = 0,           /* the client closed its side, or we were told to stop */
    IK_END_IDLE = 3,           /* nothing came for idle_ns, or up to two ticks longer */
    IK_END_NOT_READ = 4,       /* the client took none of the answer for idle_ns */
    IK_END_RESET = 5,          /* the connection broke */
    IK_END_LOG_FAILED = 6,     /* the log did not take the piece, so it was not answered either */
    IK_END_EXPIRED = 7,        /* it lasted until its deadline */
    IK_END_SERVICE_FAILED = 8, /* the service raised */
    IK_END_TOO_MUCH = 9,       /* the answer was longer than max_output */
    IK_END_NO_MEMORY = 10,
    IK_END_CUT = 11,     /* still open when the server had waited long enough to stop */
    IK_END_REFUSED = 12, /* the server can't wait for a descriptor of that number */
    IK_ENDS = 13
};

/* What a step came to: what it waits for, or what the caller has to do now. */
enum ik_connection_step {
    IK_STEP_ENDED = 0,   /* see end */
    IK_STEP_READ = 1,    /* POLLIN on the socket */
    IK_STEP_WRITE = 4,   /* POLLOUT on the socket */
    IK_STEP_LOG = 16,    /* POLLOUT on the log's writer */
    IK_STEP_ACK = 32,    /* POLLIN on the log's acked; see ik_log_append */
    IK_STEP_LINGER = 64, /* ik_connection_flushed() until that is true */
    IK_STEP_PIECE = 128, /* piece_len bytes are in the block, and logged: answer them */
    IK_STEP_LAST = 256,  /* the client has ended its side: answer that, or nothing */
};

/* The longest piece, and the longest line that one becomes in the log. */
enum ik_connection_limits { IK_PIECE = 4096, IK_PEER = 80, IK_TICKS = 10 };

/* Counted by all processes and threads of a server, in memory that they share. */
typedef struct ik_server_counters {
    uint64_t accepted;
    uint64_t echoes; /* pieces answered */
    uint64_t bytes;  /* of the answers */
    uint64_t ends[13];
} ik_server_counters;

typedef struct ik_connection {
    int socket;
    int blocking; /* steps wait in the kernel */
    int echoes;   /* a piece is its own answer; else the caller answers */
    int end;
    uint64_t number;
    ik_log *log; /* NULL: none */
    ik_server_counters *counters;
    size_t max_output;
    int64_t idle_ns;  /* 0: none */
    int64_t total_ns; /* 0: none */
    int64_t began_ns;
    /* What the ticks know. */
    int64_t quiet_since_ns;
    int64_t reads_until_ns; /* what its system has taken already, if it is slow */
    int64_t taken;
    int64_t given; /* bytes of answers, so far */
    int64_t held;  /* of them, those that the caller has not handed to the kernel yet */
    int thread;    /* that has entered, or 0 */
    /* Set by a signal handler or another thread. */
    int moved; /* since the last tick; or it is the log, not the client, that is waited for */
    int expired;
    int stopping;
    int64_t answer_until_ns; /* once it stops */
    /* What is under way. */
    int state;
    int closing; /* after this answer */
    size_t piece_len;
    const char *data; /* the piece or the answer; kept, or the caller's */
    size_t len;
    size_t sent;
    char *kept;
    ik_append append;
    int sends_on; /* though we have said that this is the end */
    int64_t linger_until_ns;
    char peer[80];
} ik_connection;

/* A connection with its log, for a child that has no other memory. */
typedef struct ik_connection_job {
    ik_connection connection;
    ik_log log;
} ik_connection_job;

/* A thread that serves one connection. */
typedef struct ik_connection_thread {
    ik_connection *connection;
    int told; /* a pipe */
    uint64_t handle;
} ik_connection_thread;

/* Accept from a listening socket: fills in socket, number, peer and the times. 0 or -errno.
 * The peer is "127.0.0.1:5000", "[::1]:5000" or, of a Unix socket, "pid 1 uid 0". See accept(2). */
int ik_connection_accept(ik_connection *c, int listener);

/* Go on with a connection: at most one piece, so that a busy client can't keep others waiting.
 * block: IK_PIECE bytes that the caller leaves alone until the next step of any connection.
 * An ik_connection_step; after IK_STEP_PIECE and IK_STEP_LAST comes ik_connection_answer(). */
int ik_connection_step(ik_connection *c, char *block);

/* Answer a piece (or nothing, with len 0), close then if closing; as ik_connection_step(). */
int ik_connection_answer(ik_connection *c, const char *answer, size_t len, int closing);

/* End it now, as end says. IK_STEP_ENDED. */
int ik_connection_abort(ik_connection *c, int end);

/* For who receives and sends by itself. A piece of at most ik_connection_most() bytes has come: log
 * it without waiting. IK_STEP_PIECE: it is logged, answer it (an echo counts already); IK_STEP_LOG,
 * IK_STEP_ACK: call again later, with the same; IK_STEP_ENDED. */
int ik_connection_take(ik_connection *c, const char *piece, size_t len);
size_t ik_connection_most(const ik_connection *c);

/* As ik_connection_answer(): so much is the answer, which the caller sends unless it has ended. */
int ik_connection_answered(ik_connection *c, size_t len, int closing);

/* All is answered and it was the last: IK_STEP_ENDED or IK_STEP_LINGER. */
int ik_connection_finish(ik_connection *c);

/* It broke. IK_STEP_ENDED. */
int ik_connection_lost(ik_connection *c);

/* 1: it was told to stop, and all that has come is taken. Then comes the end, as at the client's.
 */
int ik_connection_is_drained(ik_connection *c);

/* All steps of a blocking echo connection until its end, lingering too, and close. Its end. */
int ik_connection_run(ik_connection *c);

/* Those steps, by a thread of their own. When the client has all that it gets, told gets the number
 * of the connection, as 8 bytes; then comes ik_connection_join(), and closing it is left to who
 * ticks and stops it, so that nobody does that to another socket of the same number. 0 or -errno:
 * -EAGAIN: out of memory, or at the limit of processes, which counts threads. */
int ik_connection_start_thread(ik_connection_thread *thread);
void ik_connection_join(ik_connection_thread *thread);

/* A thread that waits for its client is told of the stop by SIGURG, which interrupts it. Unless
 * that has a handler already have one called that does nothing, around ik_connection_stop(). By its
 * default action SIGURG is ignored, so one that comes late harms nobody. */
void ik_connection_claim_signal(void);
void ik_connection_release_signal(void);

/* This thread is the one that serves the connection. ik_connection_start_thread() does it itself.
 */
void ik_connection_enter(ik_connection *c);

/* For a blocking connection that is not an echo, after its last step: wait, where it must, until
 * the client has all of the answer, or has had its time; then hang up, without closing it. */
void ik_connection_hang_up(ik_connection *c);

/* One look at what lingers: says that this was the end, and drops what the client still sends, or
 * the kernel would answer it by a reset, which overtakes the answer. 1 when the client has ended
 * too, has all of the answer (and half a second more, if it sends on), or has had its time. */
int ik_connection_flushed(ik_connection *c);

/* Close the socket, free what is kept, count the end. For connections that don't block. */
void ik_connection_close(ik_connection *c);

/* Answer what has come already, then end: until a receive finds nothing, or half a second. From a
 * signal handler of the thread that serves it, or from another thread if that has entered. One that
 * does not block is to be stepped, for as long as IK_STEP_READ comes. */
void ik_connection_stop(ik_connection *c);

/* End it at once, whatever it waits for (the log within half a second); it counts as cut, unless
 * the client has all of its answer. From another thread too. */
void ik_connection_cut(ik_connection *c);

/* See to the deadlines, IK_TICKS times in the shorter of them. From a signal handler or another
 * thread too; the next step then ends the connection. */
void ik_connection_tick(ik_connection *c, int64_t now_ns);

/* How often to call it: nanoseconds, or 0 for never. */
int64_t ik_connection_tick_ns(int64_t idle_ns, int64_t total_ns);

/* In a child that serves one connection: SIGTERM stops it, a timer ticks; what is meant for the
 * server (SIGINT, SIGHUP, SIGUSR1) is ignored. */
void ik_connection_guard(ik_connection *c);

/* The life of a child that serves one echo connection. For fork; argument is an ik_connection.
 * Returns an ik_connection_end. */
int ik_connection_child(void *argument);

void ik_counters_read(const ik_server_counters *counters, ik_server_counters *ret_counters);

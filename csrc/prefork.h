/* prefork.h - a worker of a pool: wait for a client, serve it, and so on.
 *
 * The supervisor and its workers share a scoreboard. A worker writes its own place only, and the
 * supervisor believes only the places of workers that live: whatever instruction a worker is
 * killed at, no count stays wrong.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "connection.h"

/* What a worker does; a byte of the scoreboard. */
enum ik_prefork_state { IK_PREFORK_NOBODY, IK_PREFORK_STARTING, IK_PREFORK_IDLE, IK_PREFORK_BUSY };

enum ik_prefork_limits { IK_PREFORK_LISTENERS = 32 };

/* A worker's place. Of the connection, number is 0 while there is none. */
typedef struct ik_prefork_place {
    uint64_t served; /* connections, to their end */
    ik_connection connection;
} ik_prefork_place;

/* Shared by all: which workers are idle, and whether the bell has been rung for too few of them.
 *
 *   at                                    what
 *   0                                     the board
 *   sizeof(ik_prefork_board)              n_places places
 *   behind them                           the state of each place, a byte, together, so that
 *                                         counting them is cheap
 */
typedef struct ik_prefork_board {
    int rung;
    int least_idle; /* the bell rings below that */
    int n_places;
    int shortage;    /* errno of an accept that found no descriptor or memory */
    uint64_t untold; /* events that found the pipe full */
} ik_prefork_board;

/* What happened to a connection; in the pipe of events, by a write that is never split. */
typedef struct ik_prefork_event {
    uint64_t number;
    int end; /* IK_END_OPEN: it began */
    char peer[80];
} ik_prefork_event;

/* All that a worker needs, for a fork that leaves it nothing else. */
typedef struct ik_prefork_worker {
    ik_prefork_board *board;
    ik_prefork_place *place; /* found by the worker itself */
    int index;               /* of the place */
    int bell;                /* eventfd */
    int events;              /* a pipe, or -1 for not to tell */
    uint64_t limit;          /* connections after which it ends by itself; 0: none */
    int n_listeners;
    int listeners[32];  /* non-blocking */
    ik_connection form; /* what each connection begins as */
    ik_log log;
    int epoll; /* made by the worker itself */
} ik_prefork_worker;

/* Where a board of so many places lies; its size in bytes. */
size_t ik_prefork_board_size(int n_places);
ik_prefork_place *ik_prefork_places(ik_prefork_board *board);
unsigned char *ik_prefork_states(const ik_prefork_board *board);

/* In the worker, first: handlers, timer, what to wait with. From then on SIGTERM has it answer what
 * its client has sent already, and end; SIGUSR2 has it serve its client to the end, and end. 0 or
 * -errno. */
int ik_prefork_begin(ik_prefork_worker *worker);

/* Block until a client has come, and accept it into worker->place->connection. 1; 0 when the
 * worker is to end; -errno: the listeners are of no use. */
int ik_prefork_next(ik_prefork_worker *worker);

/* The connection has ended so. */
void ik_prefork_served(ik_prefork_worker *worker, int end);

/* The life of a worker with an echo service. For fork; argument is an ik_prefork_worker.
 * The exit status: 0, or the errno that ended it. */
int ik_prefork_run(void *argument);

/* The supervisor: have the bell rung for what comes from now on, and count the idle workers, those
 * that are starting among them, and the busy ones. */
int ik_prefork_look(ik_prefork_board *board);
int ik_prefork_busy(const ik_prefork_board *board);

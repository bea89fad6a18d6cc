/* turn.h - one turn of an event loop over all echo connections that are ready.
 *
 * The caller has registered the sockets with its epoll, and has a table of those that are clients'.
 * A client that goes on waiting for the same takes no time of the caller's; the others, and what is
 * no client, are reported.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "connection.h"

enum ik_turn_limits { IK_TURN_MOST = 128 };

/* The connection that has a descriptor, NULL if none has, and what it waits for. */
typedef struct ik_turn_client {
    ik_connection *connection;
    int waits_for;
} ik_turn_client;

/* A descriptor that is ready. stepped: it is a connection's, which has had its step and now waits
 * for what (an ik_connection_step). Else what: the events of epoll(7). */
typedef struct ik_turn_report {
    int fd;
    int stepped;
    int what;
} ik_turn_report;

/* clients: by descriptor, so many. */
typedef struct ik_turn {
    int epoll;
    size_t n_clients;
    ik_turn_client *clients;
    char block[4096];            /* IK_PIECE */
    ik_turn_report reports[128]; /* IK_TURN_MOST */
} ik_turn;

/* Wait until something is ready, or so many milliseconds (-1: for ever); give each connection that
 * is ready its step. How many reports there are, or -errno: -EINTR. See epoll_wait(2). */
int ik_turn_run(ik_turn *turn, int timeout_ms);

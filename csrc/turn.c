/* SPDX-License-Identifier: MIT */
#include "turn.h"

#include <errno.h>
#include <sys/epoll.h>

_Static_assert(sizeof((ik_turn *)0)->block == IK_PIECE, "room for a piece");
_Static_assert(sizeof((ik_turn *)0)->reports / sizeof(ik_turn_report) == IK_TURN_MOST, "for each");

static ik_turn_client *client_of(const ik_turn *turn, int fd) {
    if ((size_t)fd >= turn->n_clients || !turn->clients[fd].connection)
        return NULL;
    return &turn->clients[fd];
}

/* 1 if there is something to report. */
static int see_to(ik_turn *turn, const struct epoll_event *event, ik_turn_report *ret_report) {
    int fd = event->data.fd;
    ik_turn_client *client = client_of(turn, fd);
    int what = client ? ik_connection_step(client->connection, turn->block) : (int)event->events;
    *ret_report = (ik_turn_report){fd, client != NULL, what};
    return !client || what != client->waits_for;
}

int ik_turn_run(ik_turn *turn, int timeout_ms) {
    struct epoll_event events[IK_TURN_MOST];
    int n = epoll_wait(turn->epoll, events, IK_TURN_MOST, timeout_ms), n_reports = 0;
    if (n < 0)
        return -errno;
    for (int i = 0; i < n; i++)
        n_reports += see_to(turn, &events[i], &turn->reports[n_reports]);
    return n_reports;
}

/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "turn.h"

enum { CLIENTS = 3, TABLE = 64, HIGH = 100 };

static ik_server_counters counters;
static ik_connection connections[CLIENTS];
static ik_turn_client table[TABLE];
static ik_turn turn = {.n_clients = TABLE, .clients = table};
static int theirs[CLIENTS];

static void watch(int fd, int events) {
    struct epoll_event event = {.events = (uint32_t)events, .data.fd = fd};
    assert(epoll_ctl(turn.epoll, EPOLL_CTL_ADD, fd, &event) == 0);
}

static void set_up(void) {
    turn.epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < CLIENTS; i++) {
        int ends[2];
        assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0 && ends[1] < TABLE);
        theirs[i] = ends[0];
        connections[i] = (ik_connection){
            .socket = ends[1], .echoes = 1, .end = IK_END_OPEN, .counters = &counters};
        table[ends[1]] = (ik_turn_client){&connections[i], IK_STEP_READ};
        watch(ends[1], EPOLLIN);
    }
}

static int echoed(int i, const char *text) {
    char got[16] = "";
    return recv(theirs[i], got, sizeof got, MSG_DONTWAIT) == (ssize_t)strlen(text) &&
           strcmp(got, text) == 0;
}

static void all_that_are_ready_are_answered(void) {
    for (int i = 0; i < CLIENTS; i++)
        assert(write(theirs[i], "hello", 5) == 5);
    assert(ik_turn_run(&turn, -1) == 0); /* nothing to report */
    for (int i = 0; i < CLIENTS; i++)
        assert(echoed(i, "hello"));
    assert(counters.echoes == CLIENTS && ik_turn_run(&turn, 0) == 0);
}

static void what_is_no_connection_is_reported(void) {
    int ends[2];
    assert(pipe2(ends, O_CLOEXEC) == 0 && dup2(ends[0], HIGH) == HIGH);
    watch(ends[0], EPOLLIN);
    watch(HIGH, EPOLLIN); /* beyond the table */
    assert(write(ends[1], ".", 1) == 1 && write(theirs[0], "x", 1) == 1);
    assert(ik_turn_run(&turn, -1) == 2 && echoed(0, "x"));
    for (int i = 0; i < 2; i++) {
        ik_turn_report one = turn.reports[i];
        assert((one.fd == ends[0] || one.fd == HIGH) && !one.stepped && one.what == EPOLLIN);
    }
    assert(turn.reports[0].fd != turn.reports[1].fd);
    close(ends[0]);
    close(HIGH);
    close(ends[1]);
}

/* Nobody reads the echo, so the step waits for room. */
static void who_waits_for_something_else_is_reported(void) {
    char much[4096] = "";
    int n = 0;
    while (n == 0) {
        assert(write(theirs[1], much, sizeof much) == (ssize_t)sizeof much);
        n = ik_turn_run(&turn, -1);
    }
    ik_turn_report one = turn.reports[0];
    assert(n == 1 && one.fd == connections[1].socket && one.stepped && one.what == IK_STEP_WRITE);
    table[one.fd].connection = NULL; /* not ours any more */
    assert(ik_turn_run(&turn, 0) == 0);
    ik_connection_close(&connections[1]);
}

static void an_end_is_reported(void) {
    close(theirs[2]);
    assert(ik_turn_run(&turn, -1) == 1);
    assert(turn.reports[0].stepped && turn.reports[0].what == IK_STEP_ENDED);
    assert(connections[2].end == IK_END_DONE);
}

int main(void) {
    set_up();
    all_that_are_ready_are_answered();
    what_is_no_connection_is_reported();
    who_waits_for_something_else_is_reported();
    an_end_is_reported();
    return 0;
}

/* SPDX-License-Identifier: MIT */
#include "prefork.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

_Static_assert(sizeof(ik_prefork_event) <= 512, "POSIX's PIPE_BUF: never split");
_Static_assert(sizeof((ik_prefork_worker *)0)->listeners / sizeof(int) == IK_PREFORK_LISTENERS,
               "as many as the limit says");

enum { REST_MS = 100 };

/* --- the scoreboard ----------------------------------------------------------------------------*/

size_t ik_prefork_board_size(int n_places) {
    return sizeof(ik_prefork_board) + (size_t)n_places * (sizeof(ik_prefork_place) + 1);
}

ik_prefork_place *ik_prefork_places(ik_prefork_board *board) {
    return (ik_prefork_place *)(board + 1);
}

unsigned char *ik_prefork_states(const ik_prefork_board *board) {
    return (unsigned char *)((ik_prefork_place *)(board + 1) + board->n_places);
}

/* A worker says what it does, then looks whether too few are idle; the supervisor says that it
 * wants to be told, then looks who is idle. In one order for all, so that one of the two sees the
 * other. */
static void set_state(ik_prefork_worker *w, int state) {
    unsigned char *mine = ik_prefork_states(w->board) + w->index;
    __atomic_store_n(mine, (unsigned char)state, __ATOMIC_SEQ_CST);
}

static int is_idle(const ik_prefork_board *board, int i) {
    int state = __atomic_load_n(ik_prefork_states(board) + i, __ATOMIC_SEQ_CST);
    return state == IK_PREFORK_IDLE || state == IK_PREFORK_STARTING;
}

static int count_idle(const ik_prefork_board *board, int enough) {
    int idle = 0;
    for (int i = 0; i < board->n_places && idle < enough; i++)
        idle += is_idle(board, i);
    return idle;
}

int ik_prefork_look(ik_prefork_board *board) {
    __atomic_store_n(&board->rung, 0, __ATOMIC_SEQ_CST);
    return count_idle(board, board->n_places);
}

int ik_prefork_busy(const ik_prefork_board *board) {
    int busy = 0;
    for (int i = 0; i < board->n_places; i++)
        busy += __atomic_load_n(ik_prefork_states(board) + i, __ATOMIC_RELAXED) == IK_PREFORK_BUSY;
    return busy;
}

/* Once until the supervisor has looked at flag. Killed before the write, this worker is missed all
 * the same: its death makes the supervisor look. */
static void ring(ik_prefork_worker *w, int *flag, int value) {
    const uint64_t once = 1;
    if (__atomic_exchange_n(flag, value, __ATOMIC_SEQ_CST) == 0)
        (void)!write(w->bell, &once, sizeof once);
}

static void tell(ik_prefork_worker *w, int end) {
    const ik_connection *c = &w->place->connection;
    ik_prefork_event event = {.number = c->number, .end = end};
    if (w->events < 0)
        return;
    memcpy(event.peer, c->peer, sizeof event.peer);
    if (write(w->events, &event, sizeof event) < 0)
        __atomic_add_fetch(&w->board->untold, 1, __ATOMIC_RELAXED);
}

/* --- signals -----------------------------------------------------------------------------------*/

/* Blocked but while there is something for them to interrupt: the wait for a client (not by the
 * timer, which has nothing to look at then), or the service of one. So none comes between a look at
 * what it left and the wait that it should have ended. */
static sigset_t between, waiting, serving;
static volatile sig_atomic_t retired;

static void on_retire(int signum) {
    (void)signum;
    retired = 1;
}

static void handle_signals(ik_prefork_worker *w) {
    struct sigaction action = {.sa_handler = on_retire, .sa_flags = SA_RESTART};
    sigaction(SIGUSR2, &action, NULL);
    w->place->connection = w->form;
    ik_connection_guard(&w->place->connection);
    sigprocmask(SIG_SETMASK, NULL, &serving);
    sigdelset(&serving, SIGUSR2);
    between = waiting = serving;
    sigaddset(&waiting, SIGALRM);
    sigaddset(&between, SIGALRM);
    sigaddset(&between, SIGTERM);
    sigaddset(&between, SIGUSR2);
    sigprocmask(SIG_SETMASK, &between, NULL);
}

/* --- a client ----------------------------------------------------------------------------------*/

static int is_to_end(const ik_prefork_worker *w) {
    return retired || __atomic_load_n(&w->place->connection.stopping, __ATOMIC_RELAXED) ||
           (w->limit && w->place->served >= w->limit);
}

/* EPOLLEXCLUSIVE: a client wakes one worker, not all of them. One that is busy then is passed over;
 * one that begins to wait sees what has come before. */
static int watch(ik_prefork_worker *w) {
    w->epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < w->n_listeners && w->epoll >= 0; i++) {
        struct epoll_event wanted = {.events = EPOLLIN | EPOLLEXCLUSIVE,
                                     .data.fd = w->listeners[i]};
        if (epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->listeners[i], &wanted) < 0)
            return -errno;
    }
    return w->epoll < 0 ? -errno : 0;
}

/* epoll_pwait(2) tells of a client without a look at the signals that came before that one. */
static int was_told_to_stop(void) {
    sigset_t pending;
    if (sigpending(&pending) < 0 || sigismember(&pending, SIGTERM) <= 0)
        return 0;
    sigprocmask(SIG_SETMASK, &waiting, NULL); /* it is handled here */
    sigprocmask(SIG_SETMASK, &between, NULL);
    return 1;
}

static int accept_next(ik_prefork_worker *w) {
    struct epoll_event ready;
    if (epoll_pwait(w->epoll, &ready, 1, -1, &waiting) < 0)
        return -errno;
    if (was_told_to_stop())
        return -EINTR; /* the supervisor forks one that finds the client in the backlog */
    ik_connection *c = &w->place->connection;
    int stopping = c->stopping; /* by a SIGTERM during the wait */
    *c = w->form;
    c->stopping = stopping;
    return ik_connection_accept(c, ready.data.fd);
}

/* Out of descriptors or memory: leave the backlog alone for a moment; the supervisor says so. */
static void rest(ik_prefork_worker *w, int error) {
    const struct timespec moment = {0, REST_MS * 1000000};
    ring(w, &w->board->shortage, error);
    ppoll(NULL, 0, &moment, &waiting);
}

static int is_shortage(int error) {
    return error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOBUFS;
}

/* Errors of the listener. All others are of the one connection: the next one may do. */
static int is_useless(int error) {
    return error == EBADF || error == EINVAL || error == ENOTSOCK || error == EFAULT;
}

static void begin_client(ik_prefork_worker *w) {
    set_state(w, IK_PREFORK_BUSY);
    if (count_idle(w->board, w->board->least_idle) < w->board->least_idle)
        ring(w, &w->board->rung, 1);
    tell(w, IK_END_OPEN);
    sigprocmask(SIG_SETMASK, &serving, NULL);
}

int ik_prefork_next(ik_prefork_worker *w) {
    while (!is_to_end(w)) {
        int rc = accept_next(w);
        if (rc == 0) {
            begin_client(w);
            return 1;
        }
        if (is_useless(-rc))
            return rc;
        if (is_shortage(-rc))
            rest(w, -rc);
    }
    return 0;
}

void ik_prefork_served(ik_prefork_worker *w, int end) {
    sigprocmask(SIG_SETMASK, &between, NULL);
    tell(w, end);
    w->place->connection.number = 0;
    __atomic_add_fetch(&w->place->served, 1, __ATOMIC_RELAXED);
    if (!is_to_end(w))
        set_state(w, IK_PREFORK_IDLE);
}

/* --- the life of a worker ----------------------------------------------------------------------*/

int ik_prefork_begin(ik_prefork_worker *w) {
    w->place = ik_prefork_places(w->board) + w->index;
    handle_signals(w);
    int rc = watch(w);
    if (rc == 0)
        set_state(w, IK_PREFORK_IDLE);
    return rc;
}

int ik_prefork_run(void *argument) {
    ik_prefork_worker *w = argument;
    int rc = ik_prefork_begin(w);
    while (rc >= 0 && (rc = ik_prefork_next(w)) > 0)
        ik_prefork_served(w, ik_connection_run(&w->place->connection));
    return -rc;
}

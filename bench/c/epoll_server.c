/* SPDX-License-Identifier: MIT
 *
 * The echo server in C on one epoll loop, with a message-logging child: what one process can do.
 * Each message (what one read gives) goes into the log pipe before it goes back. Nothing more is
 * read from a client until it has taken its answer.
 *
 *     epoll_server [PORT [LOG]]     port 0, the default, lets the kernel choose; LOG is echomsg.txt
 *
 * SIGTERM and SIGINT stop it: what was read is in the pipe, and the logger writes all of that.
 */
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

#include "server.h"

enum { EVENTS = 64 };

typedef struct {
    int fd;
    size_t size, sent; /* of the message that goes back */
    char message[MESSAGE];
} client;

static int loop;

static void watch(int operation, int fd, uint32_t events, void *what) {
    struct epoll_event event = {.events = events, .data.ptr = what};
    if (epoll_ctl(loop, operation, fd, &event) < 0)
        fail("epoll_ctl");
}

static void accept_clients(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        client *c = malloc(sizeof *c);
        if (c == NULL)
            fail("malloc");
        c->fd = fd;
        c->size = c->sent = 0;
        watch(EPOLL_CTL_ADD, fd, EPOLLIN, c);
    }
    if (errno != EAGAIN && errno != ECONNABORTED)
        fail("accept");
}

static void drop(client *c) {
    close(c->fd);
    free(c);
}

/* -1 when the client is gone. */
static int send_back(client *c, int was_waiting) {
    ssize_t n = write(c->fd, c->message + c->sent, c->size - c->sent);
    if (n < 0 && errno != EAGAIN)
        return -1;
    c->sent += n > 0 ? (size_t)n : 0;
    int waits = c->sent < c->size;
    if (waits != was_waiting)
        watch(EPOLL_CTL_MOD, c->fd, waits ? EPOLLOUT : EPOLLIN, c);
    return 0;
}

static int echo(client *c, int log) {
    ssize_t n = read(c->fd, c->message, sizeof c->message);
    if (n < 0 && errno == EAGAIN)
        return 0;
    if (n <= 0)
        return -1;
    if (write_all(log, c->message, (size_t)n) < 0)
        fail("the log");
    c->size = (size_t)n;
    c->sent = 0;
    return send_back(c, 0);
}

static void serve(int listener, int signals, int log) {
    struct epoll_event events[EVENTS];
    watch(EPOLL_CTL_ADD, listener, EPOLLIN, &listener);
    watch(EPOLL_CTL_ADD, signals, EPOLLIN, &signals);
    for (;;) {
        int ready = epoll_wait(loop, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            client *c = events[i].data.ptr;
            if (events[i].data.ptr == &signals)
                return;
            if (events[i].data.ptr == &listener)
                accept_clients(listener);
            else if ((c->sent < c->size ? send_back(c, 1) : echo(c, log)) < 0)
                drop(c);
        }
    }
}

static void allow_all_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        fail("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
        fail("setrlimit");
}

int main(int argc, char **argv) {
    if (argc > 3) {
        fprintf(stderr, "usage: epoll_server [PORT [LOG]]\n");
        return 2;
    }
    int port = argc > 1 ? port_number("epoll_server", argv[1]) : 0;
    int log = start_logger(argc > 2 ? argv[2] : "echomsg.txt");
    sigset_t stops;
    sigemptyset(&stops);
    sigaddset(&stops, SIGTERM);
    sigaddset(&stops, SIGINT);
    sigprocmask(SIG_BLOCK, &stops, NULL);
    handle(SIGPIPE, SIG_IGN, 0);
    int signals = signalfd(-1, &stops, SFD_CLOEXEC);
    loop = epoll_create1(EPOLL_CLOEXEC);
    if (signals < 0 || loop < 0)
        fail("epoll_create1");
    allow_all_descriptors();
    int listener = listen_on(port);
    if (fcntl(listener, F_SETFL, O_NONBLOCK) < 0)
        fail("O_NONBLOCK");
    serve(listener, signals, log);
    close(log);
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}

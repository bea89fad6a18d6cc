/* SPDX-License-Identifier: MIT
 *
 * server.h - what the echo servers of this folder have in common, beside the way they serve: the
 * listening socket, and the message log. What they read goes into a pipe before it goes back; the
 * logger child appends what comes out of the pipe to the log.
 */
#pragma once
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/* A message of up to PIPE_BUF bytes is one write that no other process's can split. */
enum { MESSAGE = 4096, PIPE_SIZE = 65536 };

static inline void fail(const char *what) {
    perror(what);
    exit(1);
}

static inline void handle(int signum, void (*handler)(int), int flags) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    sigemptyset(&action.sa_mask);
    if (sigaction(signum, &action, NULL) < 0)
        fail("sigaction");
}

static inline int write_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t n = write(fd, data, size);
        if (n < 0)
            return -1;
        data += n;
        size -= (size_t)n;
    }
    return 0;
}

static inline int listen_on(int port) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)port)};
    socklen_t length = sizeof address;
    if (fd < 0)
        fail("socket");
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0)
        fail("SO_REUSEADDR");
    /* Accepted sockets inherit it, so it costs nothing per connection. */
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        fail("TCP_NODELAY");
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("bind");
    if (listen(fd, SOMAXCONN) < 0)
        fail("listen");
    if (getsockname(fd, (struct sockaddr *)&address, &length) < 0)
        fail("getsockname");
    printf("listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

/* Ends at end of file only: when the server and the last worker have closed their write ends. */
static inline void log_messages(int from, int to) {
    char block[PIPE_SIZE];
    ssize_t n;
    while ((n = read(from, block, sizeof block)) > 0)
        if (write_all(to, block, (size_t)n) < 0)
            break;
    if (n != 0) {
        perror("logger");
        _exit(1);
    }
    _exit(0);
}

/* What stops the server is blocked in the logger from birth: it may not have run yet when Ctrl-C
 * comes, and has to outlive the server. */
static inline int start_logger(const char *path) {
    sigset_t stops, before;
    int ends[2], file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file < 0)
        fail(path);
    if (pipe2(ends, O_CLOEXEC) < 0)
        fail("pipe");
    sigemptyset(&stops);
    sigaddset(&stops, SIGTERM);
    sigaddset(&stops, SIGINT);
    sigprocmask(SIG_BLOCK, &stops, &before);
    pid_t pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid == 0) {
        close(ends[1]);
        log_messages(ends[0], file);
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    close(ends[0]);
    close(file);
    return ends[1];
}

static inline int port_number(const char *program, const char *text) {
    char *end;
    long port = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || port < 0 || port > 65535) {
        fprintf(stderr, "%s: port must be 0 to 65535, not '%s'\n", program, text);
        exit(2);
    }
    return (int)port;
}

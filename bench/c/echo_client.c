/* SPDX-License-Identifier: MIT
 *
 * echo_client HOST PORT: sends its standard input, closes its sending side at end of file, and
 * prints the answer until end of file. Both ways at once, so input of any size passes.
 */
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static int connect_to(const char *host, const char *port) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    int fd = -1, rc = getaddrinfo(host, port, &hints, &found);
    if (rc != 0) {
        fprintf(stderr, "echo_client: %s port %s: %s\n", host, port, gai_strerror(rc));
        exit(2);
    }
    for (struct addrinfo *a = found; a != NULL; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0)
            break;
        if (a->ai_next == NULL)
            fail("connect");
        close(fd);
    }
    freeaddrinfo(found);
    return fd;
}

/* What of the input is not sent yet. */
static char unsent[65536];
static size_t first, last;
static int at_end;

static void take_input(int fd) {
    ssize_t n = read(STDIN_FILENO, unsent, sizeof unsent);
    if (n < 0)
        fail("read");
    first = 0;
    last = (size_t)n;
    at_end = n == 0;
    if (at_end)
        shutdown(fd, SHUT_WR);
}

static void send_some(int fd) {
    ssize_t n = send(fd, unsent + first, last - first, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0)
        first += (size_t)n;
    else if (errno != EAGAIN)
        fail("send");
}

/* Whether there is more to come. */
static int print_some(int fd) {
    static char answer[65536];
    ssize_t n = recv(fd, answer, sizeof answer, 0), done = 0;
    if (n < 0)
        fail("recv");
    while (done < n) {
        ssize_t written = write(STDOUT_FILENO, answer + done, (size_t)(n - done));
        if (written < 0)
            fail("write");
        done += written;
    }
    return n > 0;
}

static void exchange(int fd) {
    for (;;) {
        struct pollfd wait[] = {{.fd = fd, .events = POLLIN}, {.fd = -1, .events = POLLIN}};
        if (first < last)
            wait[0].events |= POLLOUT;
        else if (!at_end)
            wait[1].fd = STDIN_FILENO;
        if (poll(wait, 2, -1) < 0)
            fail("poll");
        if (wait[1].revents)
            take_input(fd);
        if (wait[0].revents & POLLOUT)
            send_some(fd);
        if (wait[0].revents & (POLLIN | POLLHUP | POLLERR) && !print_some(fd))
            return;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: echo_client HOST PORT\n");
        return 2;
    }
    exchange(connect_to(argv[1], argv[2]));
    if (!at_end || first < last) {
        fprintf(stderr, "echo_client: the server closed before it had everything\n");
        return 1;
    }
    return 0;
}

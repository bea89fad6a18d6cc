/* SPDX-License-Identifier: MIT
 *
 * load: loads an echo server from one epoll loop and checks every byte that comes back.
 *
 *     load connections HOST PORT    each: connect, one echo, half-close, wait for the end of file
 *     load echoes HOST PORT         long connections, each sending a message when the one before
 *                                   is back; the clock starts when each has had its first echo
 *
 *     --connections N (16)    so many at a time
 *     --size BYTES (64)       of a message
 *     --seconds S (1)         how long to count
 *
 * Prints one line of JSON and exits with 1 if there were errors. Latencies are of an echo, in
 * connections mode from connect() to the end of file. What is under way at the end is finished and
 * checked, but not counted; bytes is all that was echoed.
 *
 * This side closes first, so each connection leaves a port in TIME_WAIT here, and no SO_LINGER
 * takes it back after the end of file. Linux reuses loopback ports after a second, so they last for
 * some 14,000 connections/s; with net.ipv4.tcp_tw_reuse at 0, for 28,000 connections a minute.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MOST_CONNECTIONS = 10000,
    LARGEST = 1 << 20,
    MOST_SECONDS = 3600,
    PERIOD = 251,         /* of the content, so that one message is not taken for the next */
    SLOWEST_US = 1000000, /* what takes longer is recorded as this */
    ENOUGH_ERRORS = 100,
    EVENTS = 64
};

/* For the first echoes, and for what is under way at the end. */
static const int64_t patience_ns = 10000000000;

typedef struct {
    int fd;
    uint64_t message, echoes;
    size_t sent, received;
    int64_t began;
} slot;

static int connections = 16, size = 64, long_connections;
static double seconds = 1;
static struct sockaddr_storage server;
static socklen_t server_length;

static char pattern[LARGEST + PERIOD], answer[LARGEST];
static uint32_t took_us[SLOWEST_US + 1];
static int epoll, under_way, warm, draining;
static uint64_t messages, count, errors, bytes;
static int64_t counting_from = INT64_MAX, counting_until = INT64_MAX;

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* --- the counts */

static void start_counting(void) {
    counting_from = now();
    counting_until = counting_from + (int64_t)(seconds * 1e9);
}

static void record(const slot *s) {
    int64_t end = now(), us = (end - s->began) / 1000;
    if (s->began < counting_from || end > counting_until)
        return;
    took_us[us < SLOWEST_US ? us : SLOWEST_US]++;
    count++;
}

static unsigned percentile(double share) {
    uint64_t passed = 0;
    for (unsigned us = 0; us < SLOWEST_US; us++) {
        passed += took_us[us];
        if (count > 0 && (double)passed >= share * (double)count)
            return us;
    }
    return count > 0 ? SLOWEST_US : 0;
}

static void print_result(void) {
    double counted =
        counting_from == INT64_MAX ? 0 : (double)(counting_until - counting_from) / 1e9;
    printf(
        "{\"mode\": \"%s\", \"connections\": %d, \"size\": %d, \"count\": %llu, \"seconds\": %.6f, "
        "\"rate\": %.1f, \"errors\": %llu, \"bytes\": %llu, \"p50_us\": %u, \"p99_us\": %u}\n",
        long_connections ? "echoes" : "connections", connections, size, (unsigned long long)count,
        counted, counted > 0 ? (double)count / counted : 0, (unsigned long long)errors,
        (unsigned long long)bytes, percentile(0.5), percentile(0.99));
}

/* --- one connection */

static void finish(slot *s) {
    close(s->fd);
    s->fd = -1;
    under_way--;
}

static void error(slot *s, const char *what, const char *why) {
    if (errors++ == 0)
        fprintf(stderr, "load: %s: %s\n", what, why);
    if (errors >= ENOUGH_ERRORS)
        draining = 1;
    finish(s);
}

static void next_message(slot *s) {
    s->message = messages++;
    s->sent = s->received = 0;
    s->began = now();
}

static void wait_for(slot *s, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = s};
    if (epoll_ctl(epoll, operation, s->fd, &event) < 0)
        fail("epoll_ctl");
}

static int whole(const slot *s) {
    return s->sent == (size_t)size;
}

/* Send what the kernel takes. On a connection still being made that is nothing. */
static void push(slot *s) {
    ssize_t n =
        send(s->fd, pattern + s->message % PERIOD + s->sent, (size_t)size - s->sent, MSG_NOSIGNAL);
    if (n >= 0)
        s->sent += (size_t)n;
    else if (errno != EAGAIN)
        error(s, "send", strerror(errno));
}

static void open_connection(slot *s) {
    int on = 1;
    s->fd = socket(server.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (s->fd < 0)
        fail("socket");
    under_way++;
    s->echoes = 0;
    next_message(s);
    if (setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        fail("TCP_NODELAY");
    if (connect(s->fd, (struct sockaddr *)&server, server_length) < 0 && errno != EINPROGRESS) {
        error(s, "connect", strerror(errno));
        return;
    }
    push(s);
    if (s->fd >= 0)
        wait_for(s, EPOLL_CTL_ADD, whole(s) ? EPOLLIN : EPOLLIN | EPOLLOUT);
}

static void echoed(slot *s) {
    bytes += (uint64_t)size;
    s->echoes++;
    if (!long_connections) {
        shutdown(s->fd, SHUT_WR);
        return;
    }
    record(s);
    if (s->echoes == 1 && ++warm == connections)
        start_counting();
    if (draining) {
        shutdown(s->fd, SHUT_WR);
        return;
    }
    next_message(s);
    push(s);
    if (s->fd >= 0 && !whole(s))
        wait_for(s, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
}

static void end_of_file(slot *s) {
    if (s->received < (size_t)size) {
        error(s, "recv", "the server closed before it had echoed everything");
        return;
    }
    if (!long_connections)
        record(s);
    finish(s);
}

static void pull(slot *s) {
    ssize_t n = recv(s->fd, answer, sizeof answer, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n < 0)
        error(s, "recv", strerror(errno));
    else if (n == 0)
        end_of_file(s);
    else if (s->received + (size_t)n > s->sent)
        error(s, "recv", "more came back than was sent");
    else if (memcmp(answer, pattern + s->message % PERIOD + s->received, (size_t)n) != 0)
        error(s, "recv", "what came back is not what was sent");
    else if ((s->received += (size_t)n) == (size_t)size)
        echoed(s);
}

static void handle(slot *s, uint32_t events) {
    if (events & EPOLLOUT) {
        push(s);
        if (s->fd >= 0 && whole(s))
            wait_for(s, EPOLL_CTL_MOD, EPOLLIN);
    }
    if (s->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        pull(s);
    if (s->fd < 0 && !draining)
        open_connection(s);
}

/* --- the loop */

/* At the end of the time, or of the patience, or with nobody to connect to: begin nothing more. */
static void look_at_the_clock(int64_t began) {
    if (under_way == 0)
        draining = 1;
    if (now() < (counting_from == INT64_MAX ? began + patience_ns : counting_until))
        return;
    if (counting_from == INT64_MAX && errors++ == 0)
        fprintf(stderr, "load: only %d of %d connections got their first echo\n", warm,
                connections);
    draining = 1;
}

static void run(slot *slots) {
    struct epoll_event events[EVENTS];
    int64_t began = now(), drained_by;
    if (!long_connections)
        start_counting();
    for (int i = 0; i < connections && !draining; i++)
        open_connection(&slots[i]);
    while (!draining) {
        int ready = epoll_wait(epoll, events, EVENTS, 10);
        for (int i = 0; i < ready; i++)
            handle(events[i].data.ptr, events[i].events);
        look_at_the_clock(began);
    }
    if (counting_until > now())
        counting_until = now();
    for (drained_by = now() + patience_ns; under_way > 0 && now() < drained_by;) {
        int ready = epoll_wait(epoll, events, EVENTS, 10);
        for (int i = 0; i < ready; i++)
            handle(events[i].data.ptr, events[i].events);
    }
    if (under_way > 0)
        fprintf(stderr, "load: %d connections without an answer\n", under_way);
    errors += (uint64_t)under_way;
}

/* --- the arguments */

static int is_loopback(const struct sockaddr *address) {
    if (address->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)address)->sin_addr.s_addr) >> 24 ==
               IN_LOOPBACKNET;
    return address->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)address)->sin6_addr);
}

static double number(const char *name, const char *text, double least, double most) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= least && value <= most)) {
        fprintf(stderr, "load: %s must be %g to %.0f, not '%s'\n", name, least, most, text);
        exit(2);
    }
    return value;
}

static void set_server(const char *host, const char *port) {
    struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV,
                             .ai_socktype = SOCK_STREAM},
                    *found;
    number("PORT", port, 1, 65535);
    if (getaddrinfo(host, port, &hints, &found) != 0 || !is_loopback(found->ai_addr)) {
        fprintf(stderr,
                "load: '%s' is not a loopback address (127.0.0.1, ::1): this machine loads only "
                "itself\n",
                host);
        exit(2);
    }
    memcpy(&server, found->ai_addr, found->ai_addrlen);
    server_length = found->ai_addrlen;
    freeaddrinfo(found);
}

static void usage(void) {
    fprintf(stderr, "usage: load connections|echoes HOST PORT [--connections N] [--size BYTES] "
                    "[--seconds S]\n");
    exit(2);
}

static void take_arguments(int argc, char **argv) {
    static const struct option options[] = {{"connections", required_argument, NULL, 'c'},
                                            {"size", required_argument, NULL, 'b'},
                                            {"seconds", required_argument, NULL, 's'},
                                            {0}};
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'c')
            connections = (int)number("--connections", optarg, 1, MOST_CONNECTIONS);
        else if (option == 'b')
            size = (int)number("--size", optarg, 1, LARGEST);
        else if (option == 's')
            seconds = number("--seconds", optarg, 0.01, MOST_SECONDS);
        else
            usage();
    }
    if (argc - optind != 3)
        usage();
    long_connections = strcmp(argv[optind], "echoes") == 0;
    if (!long_connections && strcmp(argv[optind], "connections") != 0)
        usage();
    set_server(argv[optind + 1], argv[optind + 2]);
}

int main(int argc, char **argv) {
    take_arguments(argc, argv);
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = (char)(i % PERIOD);
    slot *slots = calloc((size_t)connections, sizeof *slots);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (slots == NULL || epoll < 0)
        fail("epoll_create1");
    run(slots);
    print_result();
    free(slots);
    return errors > 0;
}

/* SPDX-License-Identifier: MIT */
#include "connection.h"

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "wait.h"

static ik_server_counters counters;
static char block[IK_PIECE];
static const int64_t PATIENCE_NS = 120000000000;

static ik_log open_log(int format) {
    int fd[2], memory = memfd_create("test", MFD_CLOEXEC);
    assert(pipe2(fd, O_CLOEXEC) == 0 && memory >= 0);
    assert(fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0 && fcntl(fd[1], F_SETPIPE_SZ, 4096) == 4096);
    assert(ftruncate(memory, (off_t)ik_log_shared_size()) == 0);
    ik_log log = {.reader = fd[0],
                  .writer = fd[1],
                  .handed = -1,
                  .hand = -1,
                  .acked = -1,
                  .told = -1,
                  .tell = -1};
    log.format = format;
    log.wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    log.durability = IK_LOG_NONE;
    log.shared = ik_log_map(memory);
    assert(log.shared);
    close(memory);
    return log;
}

static void close_log(ik_log *log) {
    close(log->reader);
    close(log->writer);
    close(log->wake);
    ik_log_unmap(log->shared);
}

/* A connection that does not block, and the client's end of it. */
static ik_connection connect_to(int *ret_client, ik_log *log) {
    int both[2], small = 4096;
    assert(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, both) == 0);
    assert(setsockopt(both[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0);
    *ret_client = both[1];
    memset(&counters, 0, sizeof counters);
    return (ik_connection){.socket = both[0],
                           .end = IK_END_OPEN,
                           .echoes = 1,
                           .log = log,
                           .counters = &counters,
                           .max_output = 1 << 20,
                           .number = 7,
                           .peer = "it"};
}

static size_t drain(int fd, char *to, size_t most) {
    size_t got = 0;
    ssize_t n;
    while (got < most && (n = recv(fd, to + got, most - got, MSG_DONTWAIT)) > 0)
        got += (size_t)n;
    return got;
}

static void one_piece_a_step(void) {
    int client;
    ik_connection c = connect_to(&client, NULL);
    char two[2 * IK_PIECE], back[2 * IK_PIECE];
    memset(two, 'a', sizeof two);
    assert(ik_connection_step(&c, block) == IK_STEP_READ);
    assert(send(client, two, IK_PIECE, 0) == IK_PIECE && send(client, "b", 1, 0) == 1);
    assert(ik_connection_step(&c, block) == IK_STEP_READ);
    assert(drain(client, back, sizeof back) == IK_PIECE);
    assert(ik_connection_step(&c, block) == IK_STEP_READ);
    assert(drain(client, back, sizeof back) == 1 && back[0] == 'b');
    shutdown(client, SHUT_WR);
    assert(ik_connection_step(&c, block) == IK_STEP_ENDED && c.end == IK_END_DONE);
    ik_connection_close(&c);
    assert(c.socket == -1 && counters.echoes == 2 && counters.bytes == IK_PIECE + 1);
    assert(counters.ends[IK_END_DONE] == 1);
    close(client);
}

/* A client that takes nothing: no more is read from it than one piece beyond what the kernel holds.
 */
static void what_the_client_does_not_take_is_kept(void) {
    int client;
    ik_connection c = connect_to(&client, NULL);
    static char sent[1 << 20], back[1 << 20];
    for (size_t i = 0; i < sizeof sent; i++)
        sent[i] = (char)rand();
    size_t given = 0, got = 0;
    int wanted = IK_STEP_READ;
    while (got < sizeof sent) {
        ssize_t n =
            given < sizeof sent ? send(client, sent + given, sizeof sent - given, MSG_DONTWAIT) : 0;
        given += n > 0 ? (size_t)n : 0;
        for (int i = 0; i < 100 && wanted != IK_STEP_WRITE; i++)
            wanted = ik_connection_step(&c, block);
        memset(block, 'x', sizeof block); /* it belongs to others in between */
        if (wanted == IK_STEP_WRITE) {
            assert(c.kept && c.len - c.sent <= IK_PIECE);
            assert(ik_connection_step(&c, block) == IK_STEP_WRITE); /* and nothing changes */
        }
        got += drain(client, back + got, 10000);
        wanted = ik_connection_step(&c, block);
    }
    assert(memcmp(sent, back, sizeof sent) == 0 && counters.bytes == sizeof sent);
    ik_connection_close(&c);
    close(client);
}

static void a_full_log_holds_the_echo_back(int format) {
    int client;
    ik_log log = open_log(format);
    ik_connection c = connect_to(&client, &log);
    char back[IK_PIECE], logged[2 * IK_PIECE] = {0};
    assert(write(log.writer, back, 4096) == 4096);
    assert(send(client, "hello", 5, 0) == 5);
    assert(ik_connection_step(&c, block) == IK_STEP_LOG);
    memset(block, 'x', sizeof block);
    ik_connection_tick(&c, ik_wait_now());
    assert(ik_connection_step(&c, block) == IK_STEP_LOG);
    assert(drain(client, back, sizeof back) == 0);
    assert(read(log.reader, logged, sizeof logged) == 4096);
    assert(ik_connection_step(&c, block) == IK_STEP_READ);
    assert(drain(client, back, sizeof back) == 5 && memcmp(back, "hello", 5) == 0);
    memset(logged, 0, sizeof logged);
    assert(read(log.reader, logged, sizeof logged) > 0);
    assert(format == IK_LOG_RAW ? strcmp(logged, "hello") == 0
                                : strstr(logged, "\"connection\":7") && strstr(logged, "hello"));
    ik_connection_close(&c);
    close(client);
    close_log(&log);
}

static void the_caller_answers_for_a_service(void) {
    int client;
    ik_log log = open_log(IK_LOG_RAW);
    ik_connection c = connect_to(&client, &log);
    char back[100];
    c.echoes = 0;
    assert(send(client, "hello", 5, 0) == 5);
    assert(ik_connection_step(&c, block) == IK_STEP_PIECE);
    assert(c.piece_len == 5 && memcmp(block, "hello", 5) == 0 && ik_log_backlog(&log) == 5);
    assert(ik_connection_answer(&c, "", 0, 0) == IK_STEP_READ);
    assert(ik_connection_step(&c, block) == IK_STEP_READ);
    shutdown(client, SHUT_WR);
    assert(ik_connection_step(&c, block) == IK_STEP_LAST);
    assert(ik_connection_answer(&c, "bye", 3, 1) == IK_STEP_LINGER);
    assert(drain(client, back, sizeof back) == 3);
    assert(ik_connection_step(&c, block) == IK_STEP_LINGER && ik_connection_flushed(&c));
    ik_connection_close(&c);
    assert(counters.ends[IK_END_DONE] == 1);
    close(client);
    close_log(&log);
}

/* A piece for a service that had to wait for the log comes back into the block. */
static void a_service_s_piece_waits_for_the_log_too(void) {
    int client;
    ik_log log = open_log(IK_LOG_RAW);
    ik_connection c = connect_to(&client, &log);
    char back[IK_PIECE];
    c.echoes = 0;
    assert(write(log.writer, back, 4096) == 4096 && send(client, "hello", 5, 0) == 5);
    assert(ik_connection_step(&c, block) == IK_STEP_LOG);
    memset(block, 'x', sizeof block);
    assert(read(log.reader, back, sizeof back) == 4096);
    assert(ik_connection_step(&c, block) == IK_STEP_PIECE);
    assert(c.piece_len == 5 && memcmp(block, "hello", 5) == 0);
    assert(ik_connection_answer(&c, back, (1 << 20) + 1, 0) == IK_STEP_ENDED);
    assert(c.end == IK_END_TOO_MUCH);
    ik_connection_close(&c);
    close(client);
    close_log(&log);
}

static int end_after_tick(ik_connection *c, int64_t now_ns) {
    ik_connection_tick(c, now_ns);
    return ik_connection_step(c, block) == IK_STEP_ENDED ? c->end : IK_END_OPEN;
}

static void deadlines(void) {
    int client;
    ik_connection c = connect_to(&client, NULL);
    c.idle_ns = 100;
    c.total_ns = 1000;
    c.began_ns = c.quiet_since_ns = 1;
    assert(end_after_tick(&c, 100) == IK_END_OPEN);
    assert(send(client, "x", 1, 0) == 1 && ik_connection_step(&c, block) == IK_STEP_READ);
    assert(drain(client, block, 1) == 1);
    assert(end_after_tick(&c, 150) == IK_END_OPEN); /* it moved */
    assert(end_after_tick(&c, 249) == IK_END_OPEN);
    ik_connection other = c;
    assert(end_after_tick(&c, 250) == IK_END_IDLE);
    ik_connection_close(&c);
    close(client);
    c = connect_to(&client, NULL);
    c.total_ns = other.total_ns;
    c.began_ns = 1;
    assert(end_after_tick(&c, 1000) == IK_END_OPEN);
    assert(end_after_tick(&c, 1001) == IK_END_EXPIRED);
    ik_connection_close(&c);
    close(client);
    assert(ik_connection_tick_ns(0, 0) == 0 && ik_connection_tick_ns(100, 0) == 10);
    assert(ik_connection_tick_ns(0, 100) == 10 && ik_connection_tick_ns(1000, 100) == 10);
    assert(ik_connection_tick_ns(100, 1000) == 10 && ik_connection_tick_ns(1, 0) == 1);
}

/* A message right after a tick is the worst case: a quarter more than idle_ns at the most. */
static void a_quarter_later_at_the_most(void) {
    int client;
    const int64_t idle = 4000, tick = ik_connection_tick_ns(idle, 0);
    ik_connection c = connect_to(&client, NULL);
    c.idle_ns = idle;
    int64_t now = 1;
    ik_connection_tick(&c, now);
    assert(send(client, "x", 1, 0) == 1 && ik_connection_step(&c, block) == IK_STEP_READ);
    assert(drain(client, block, 1) == 1);
    int64_t sent = now;
    /* Each a hair early, then a hair late: a timer is never exact. */
    for (int i = 1; c.expired == 0; i++)
        ik_connection_tick(&c, now = 1 + i * tick - (i % 2));
    assert(c.expired == IK_END_IDLE && now - sent >= idle && now - sent <= idle + idle / 4);
    ik_connection_close(&c);
    close(client);
}

/* Two ends of a TCP connection. */
static ik_connection connect_tcp(int *ret_client) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(bind(listener, (struct sockaddr *)&at, len) == 0 && listen(listener, 1) == 0);
    assert(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
    *ret_client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(connect(*ret_client, (struct sockaddr *)&at, len) == 0);
    memset(&counters, 0, sizeof counters);
    ik_connection c = {.echoes = 1, .counters = &counters, .max_output = 1 << 20};
    assert(ik_connection_accept(&c, listener) == 0);
    close(listener);
    return c;
}

/* Send and echo until neither side has room any more; the bytes sent. */
static size_t fill(ik_connection *c, int client) {
    static char much[1 << 16];
    size_t sent = 0;
    int wanted = IK_STEP_READ;
    for (int still = 0; still < 1000;) {
        ssize_t n = send(client, much, sizeof much, MSG_DONTWAIT);
        still = n > 0 ? 0 : still + 1;
        sent += n > 0 ? (size_t)n : 0;
        for (int i = 0; i < 20 && wanted == IK_STEP_READ; i++)
            wanted = ik_connection_step(c, block);
        if (wanted == IK_STEP_WRITE)
            wanted = ik_connection_step(c, block);
    }
    assert(wanted == IK_STEP_WRITE && c->state > 0);
    return sent;
}

/* By a clock of our own: 20 kB in each second, and later nothing. Nobody ever has room to send. */
static void a_slow_reader_is_none_that_takes_nothing(void) {
    int client;
    char some[20000];
    const int64_t second = 1000000000;
    ik_connection c = connect_tcp(&client);
    fill(&c, client);
    c.idle_ns = 2 * second;
    int64_t now = c.quiet_since_ns = ik_wait_now(), last;
    ik_connection_tick(&c, now);
    for (int i = 0; i < 60; i++) {
        assert(recv(client, some, sizeof some, MSG_WAITALL) == sizeof some);
        ik_connection_tick(&c, now += second);
        assert(c.expired == 0);
    }
    last = now;
    while (c.expired == 0)
        ik_connection_tick(&c, now += second / 10);
    assert(c.expired == IK_END_NOT_READ);
    assert(now - last >= 2 * second && now - last <= 17 * second);
    assert(ik_connection_step(&c, block) == IK_STEP_ENDED && c.end == IK_END_NOT_READ);
    ik_connection_close(&c);
    close(client);
}

static void a_total_deadline_holds_while_the_log_is_full(void) {
    int client;
    ik_log log = open_log(IK_LOG_RAW);
    ik_connection c = connect_to(&client, &log);
    assert(write(log.writer, block, 4096) == 4096 && send(client, "x", 1, 0) == 1);
    assert(ik_connection_step(&c, block) == IK_STEP_LOG);
    c.total_ns = 1000;
    c.began_ns = 1;
    ik_connection_tick(&c, 1000);
    assert(ik_connection_step(&c, block) == IK_STEP_LOG);
    ik_connection_tick(&c, 1001);
    assert(ik_connection_step(&c, block) == IK_STEP_ENDED && c.end == IK_END_EXPIRED);
    assert(ik_log_backlog(&log) == 4096);
    ik_connection_close(&c);
    close(client);
    close_log(&log);
}

static void stopped_it_answers_what_has_come(void) {
    int client;
    ik_connection c = connect_to(&client, NULL);
    char back[10];
    assert(send(client, "x", 1, 0) == 1);
    ik_connection_stop(&c);
    assert(ik_connection_step(&c, block) == IK_STEP_READ);
    assert(ik_connection_step(&c, block) == IK_STEP_LINGER);
    assert(drain(client, back, sizeof back) == 1);
    ik_connection_hang_up(&c);
    assert(c.end == IK_END_DONE);
    assert(recv(client, back, 1, 0) == 0);
    ik_connection_close(&c);
    close(client);
}

/* The client has much to take when it is told, and sends on: it gets all that was answered. */
static void one_that_sends_on_gets_all_of_its_answer(void) {
    int client, wanted = IK_STEP_WRITE, flushed = 0;
    char some[4096];
    size_t got = 0;
    ik_connection c = connect_tcp(&client);
    fill(&c, client);
    ik_connection_stop(&c);
    for (ssize_t n = 1; n != 0;) {
        (void)!send(client, "more", 4, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (wanted == IK_STEP_LINGER)
            flushed |= ik_connection_flushed(&c);
        else
            wanted = ik_connection_step(&c, block);
        n = recv(client, some, sizeof some, MSG_DONTWAIT);
        assert(n >= 0 || errno == EAGAIN); /* no reset */
        got += n > 0 ? (size_t)n : 0;
    }
    assert(wanted == IK_STEP_LINGER && c.end == IK_END_DONE);
    close(client);
    while (!flushed)
        flushed = ik_connection_flushed(&c);
    assert(got == counters.bytes && got > 0);
    ik_connection_close(&c);
}

/* Cut with a part of its answer on the way, it has not had all. */
static void cut_while_it_lingers(void) {
    int client;
    ik_connection c = connect_tcp(&client);
    fill(&c, client);
    c.state = 0; /* the rest of the answer left out */
    assert(ik_connection_answer(&c, "", 0, 1) == IK_STEP_LINGER && !ik_connection_flushed(&c));
    assert(c.end == IK_END_DONE);
    ik_connection_cut(&c);
    assert(ik_connection_flushed(&c) && c.end == IK_END_CUT);
    ik_connection_close(&c);
    close(client);
}

static void reset_and_abort(void) {
    int client;
    ik_connection c = connect_to(&client, NULL);
    char much[1000];
    assert(send(client, much, sizeof much, 0) == sizeof much);
    close(client); /* the answer finds nobody */
    assert(ik_connection_step(&c, block) == IK_STEP_ENDED && c.end == IK_END_RESET);
    ik_connection_close(&c);
    assert(counters.ends[IK_END_RESET] == 1);
    c = connect_to(&client, NULL);
    assert(ik_connection_abort(&c, IK_END_CUT) == IK_STEP_ENDED && c.end == IK_END_CUT);
    ik_connection_close(&c);
    close(client);
}

/* --- who it is ---------------------------------------------------------------------------------*/

/* The peer as accept names it is what inet_ntop makes of it. */
static void name_of(int family, const char *host) {
    struct sockaddr_in6 six = {.sin6_family = AF_INET6};
    struct sockaddr_in four = {.sin_family = AF_INET};
    struct sockaddr *at = family == AF_INET ? (struct sockaddr *)&four : (struct sockaddr *)&six;
    socklen_t len = family == AF_INET ? sizeof four : sizeof six;
    assert(inet_pton(family, host, family == AF_INET ? (void *)&four.sin_addr : &six.sin6_addr));
    int listener = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), client = -1;
    if (listener < 0 || bind(listener, at, len) < 0) {
        printf("skip: no %s here\n", host);
        close(listener);
        return;
    }
    assert(listen(listener, 1) == 0 && getsockname(listener, at, &len) == 0);
    client = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(connect(client, at, len) == 0);
    ik_connection c = {.counters = &counters};
    assert(ik_connection_accept(&c, listener) == 0 && c.end == IK_END_OPEN && c.number > 0);
    len = sizeof six;
    assert(getsockname(client, at, &len) == 0);
    char text[INET6_ADDRSTRLEN], expected[80];
    const void *address = family == AF_INET ? (void *)&four.sin_addr : (void *)&six.sin6_addr;
    assert(inet_ntop(family, address, text, sizeof text));
    snprintf(expected, sizeof expected, family == AF_INET ? "%s:%d" : "[%s]:%d", text,
             ntohs(family == AF_INET ? four.sin_port : six.sin6_port));
    assert(strcmp(c.peer, expected) == 0);
    close(c.socket);
    assert(fcntl(listener, F_SETFL, O_NONBLOCK) == 0);
    assert(ik_connection_accept(&c, listener) == -EAGAIN);
    close(client);
    close(listener);
}

static void a_unix_peer_is_its_process(void) {
    struct sockaddr_un at = {.sun_family = AF_UNIX}; /* no name: the kernel makes one up */
    socklen_t len = sizeof(sa_family_t);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), client;
    assert(bind(listener, (struct sockaddr *)&at, len) == 0 && listen(listener, 1) == 0);
    len = sizeof at;
    assert(getsockname(listener, (struct sockaddr *)&at, &len) == 0);
    client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(connect(client, (struct sockaddr *)&at, len) == 0);
    ik_connection c = {.counters = &counters};
    char expected[80];
    assert(ik_connection_accept(&c, listener) == 0);
    snprintf(expected, sizeof expected, "pid %d uid %d", getpid(), getuid());
    assert(strcmp(c.peer, expected) == 0);
    close(c.socket);
    close(client);
    close(listener);
}

/* --- threads, and who receives and sends by itself ---------------------------------------------*/

static uint64_t read_number(int told) {
    uint64_t number;
    assert(read(told, &number, sizeof number) == sizeof number);
    return number;
}

static void a_thread_serves_and_tells(void) {
    int client, told[2];
    assert(pipe2(told, O_CLOEXEC) == 0);
    ik_log log = open_log(IK_LOG_RAW);
    ik_connection c = connect_to(&client, &log);
    ik_connection_thread thread = {.connection = &c, .told = told[1]};
    char back[10], logged[10];
    assert(ik_connection_start_thread(&thread) == 0);
    assert(send(client, "hello", 5, 0) == 5);
    assert(recv(client, back, 5, MSG_WAITALL) == 5 && memcmp(back, "hello", 5) == 0);
    ik_connection_tick(&c, 1);
    ik_connection_stop(&c);
    assert(read_number(told[0]) == 7);
    ik_connection_join(&thread);
    assert(recv(client, back, 1, 0) == 0); /* it has hung up */
    ik_connection_stop(&c);                /* and the number is still its own */
    assert(c.socket >= 0 && c.end == IK_END_DONE);
    ik_connection_close(&c);
    assert(counters.ends[IK_END_DONE] == 1 && counters.echoes == 1);
    assert(read(log.reader, logged, sizeof logged) == 5);
    close_log(&log);
    close(client);
    close(told[0]);
    close(told[1]);
}

/* Told to stop at any moment, it answers what had come, and ends: no wait begins after that. */
static void a_thread_is_stopped_at_any_moment(void) {
    int client, told[2];
    assert(pipe2(told, O_CLOEXEC) == 0);
    for (int i = 0; i < 2000; i++) {
        ik_connection c = connect_to(&client, NULL);
        ik_connection_thread thread = {.connection = &c, .told = told[1]};
        char back[8];
        assert(ik_connection_start_thread(&thread) == 0);
        for (int turns = rand() % 200000; turns > 0; turns--)
            __atomic_signal_fence(__ATOMIC_SEQ_CST);
        int sends = i % 3;
        for (int k = 0; k < sends; k++)
            assert(send(client, "x", 1, 0) == 1);
        ik_connection_stop(&c);
        assert(recv(client, back, sizeof back, MSG_WAITALL) == sends);
        assert(read_number(told[0]) == 7);
        ik_connection_join(&thread);
        assert(c.end == IK_END_DONE);
        ik_connection_close(&c);
        close(client);
    }
    close(told[0]);
    close(told[1]);
}

/* The same of a child, which a signal tells. */
static void a_child_is_stopped_at_any_moment(void) {
    for (int i = 0; i < 200; i++) {
        int client, ready[2], status, sends = i % 3;
        char back[8];
        assert(pipe2(ready, O_CLOEXEC) == 0);
        ik_connection c = connect_to(&client, NULL);
        int pid = fork();
        if (pid == 0) {
            close(client);
            ik_connection_guard(&c);
            assert(write(ready[1], "r", 1) == 1);
            _exit(ik_connection_run(&c));
        }
        close(c.socket);
        assert(read(ready[0], back, 1) == 1);
        for (int turns = rand() % 200000; turns > 0; turns--)
            __atomic_signal_fence(__ATOMIC_SEQ_CST);
        for (int k = 0; k < sends; k++)
            assert(send(client, "x", 1, 0) == 1);
        assert(kill(pid, SIGTERM) == 0);
        assert(recv(client, back, sizeof back, MSG_WAITALL) == sends);
        assert(waitpid(pid, &status, 0) == pid && status == 0);
        close(client);
        close(ready[0]);
        close(ready[1]);
    }
}

static void other_handler(int signum) {
    (void)signum;
}

static void *handler_of_sigurg(void) {
    struct sigaction action;
    assert(sigaction(SIGURG, NULL, &action) == 0);
    return (void *)action.sa_handler;
}

static void sigurg_is_given_back_and_a_handler_left_alone(void) {
    ik_connection_release_signal();
    assert(handler_of_sigurg() == (void *)SIG_DFL);
    ik_connection_claim_signal();
    assert(handler_of_sigurg() != (void *)SIG_DFL);
    ik_connection_release_signal();
    assert(handler_of_sigurg() == (void *)SIG_DFL);
    signal(SIGURG, other_handler);
    ik_connection_claim_signal();
    assert(handler_of_sigurg() == (void *)other_handler);
    a_thread_is_stopped_at_any_moment();
    ik_connection_release_signal();
    assert(handler_of_sigurg() == (void *)other_handler);
    signal(SIGURG, SIG_DFL);
    ik_connection_claim_signal();
}

/* It waits for the log, the client, or to send: it ends all the same. */
static void a_thread_is_cut(int size, const char *first, size_t len) {
    int client, told[2];
    char much[IK_PIECE] = {0};
    assert(pipe2(told, O_CLOEXEC) == 0);
    ik_log log = open_log(IK_LOG_RAW);
    if (size > 0)
        assert(write(log.writer, much, (size_t)size) == size);
    ik_connection c = connect_to(&client, size > 0 ? &log : NULL);
    ik_connection_thread thread = {.connection = &c, .told = told[1]};
    assert(ik_connection_start_thread(&thread) == 0);
    for (int i = 0; len > 0 && i < 20; i++)
        if (send(client, first, len, MSG_DONTWAIT) < 0)
            break;
    assert(ik_wait_fd(told[0], POLLIN, ik_wait_now() + 50000000) == -ETIMEDOUT); /* not by itself */
    ik_connection_cut(&c);
    assert(ik_wait_fd(told[0], POLLIN, ik_wait_now() + PATIENCE_NS) > 0);
    ik_connection_join(&thread);
    ik_connection_close(&c);
    assert(c.end == IK_END_CUT && counters.ends[IK_END_CUT] == 1);
    close_log(&log);
    close(client);
    close(told[0]);
    close(told[1]);
}

static void the_caller_receives_and_sends(int format) {
    int client;
    ik_log log = open_log(format);
    ik_connection c = connect_to(&client, &log);
    char full[IK_PIECE] = {0}, line[2 * IK_PIECE];
    assert(ik_connection_most(&c) < IK_PIECE || format == IK_LOG_RAW);
    assert(write(log.writer, full, sizeof full) == sizeof full);
    assert(ik_connection_take(&c, "piece", 5) == IK_STEP_LOG);
    assert(ik_connection_take(&c, "piece", 5) == IK_STEP_LOG && counters.echoes == 0);
    c.idle_ns = 1;
    ik_connection_tick(&c, 1LL << 60); /* it is the log that is waited for */
    assert(c.expired == 0);
    assert(read(log.reader, line, sizeof full) == sizeof full);
    assert(ik_connection_take(&c, "piece", 5) == IK_STEP_PIECE);
    assert(counters.echoes == 1 && counters.bytes == 5);
    ssize_t n = read(log.reader, line, sizeof line);
    assert(format == IK_LOG_RAW ? n == 5 : n > 5 && line[n - 1] == '\n');
    c.max_output = 10;
    assert(ik_connection_answered(&c, 10, 0) == IK_STEP_READ && c.end == IK_END_OPEN);
    assert(ik_connection_answered(&c, 10, 1) == IK_STEP_LINGER && c.end == IK_END_DONE);
    assert(ik_connection_answered(&c, 11, 0) == IK_STEP_ENDED && c.end == IK_END_TOO_MUCH);
    assert(ik_connection_lost(&c) == IK_STEP_ENDED && c.end == IK_END_RESET);
    c.expired = IK_END_NOT_READ;
    assert(ik_connection_lost(&c) == IK_STEP_ENDED && c.end == IK_END_NOT_READ);
    assert(ik_connection_finish(&c) == IK_STEP_ENDED && c.end == IK_END_NOT_READ);
    ik_connection_close(&c);
    close_log(&log);
    close(client);
}

int main(void) {
    ik_connection_claim_signal();
    one_piece_a_step();
    what_the_client_does_not_take_is_kept();
    a_full_log_holds_the_echo_back(IK_LOG_RAW);
    a_full_log_holds_the_echo_back(IK_LOG_RECORD);
    the_caller_answers_for_a_service();
    a_service_s_piece_waits_for_the_log_too();
    deadlines();
    a_quarter_later_at_the_most();
    a_slow_reader_is_none_that_takes_nothing();
    a_total_deadline_holds_while_the_log_is_full();
    stopped_it_answers_what_has_come();
    one_that_sends_on_gets_all_of_its_answer();
    cut_while_it_lingers();
    reset_and_abort();
    name_of(AF_INET, "127.0.0.1");
    name_of(AF_INET6, "::1");
    name_of(AF_INET6, "::ffff:127.0.0.1");
    a_unix_peer_is_its_process();
    a_thread_serves_and_tells();
    a_thread_is_stopped_at_any_moment();
    sigurg_is_given_back_and_a_handler_left_alone();
    a_child_is_stopped_at_any_moment();
    a_thread_is_cut(0, "", 0);
    a_thread_is_cut(IK_PIECE, "log", 3);
    char much[IK_PIECE] = {0};
    a_thread_is_cut(0, much, sizeof much);
    the_caller_receives_and_sends(IK_LOG_RAW);
    the_caller_receives_and_sends(IK_LOG_RECORD);
    return 0;
}

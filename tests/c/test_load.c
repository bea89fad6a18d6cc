/* The loop of the load generator against an echo server in a child, for the sanitizers too. */
#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel.h"
#include "load.h"
#include "wait.h"

enum { MOST = 64, PATIENCE = 120 /* seconds, however busy the machine is */ };

static int64_t in_seconds(double seconds) {
    return ik_wait_now() + (int64_t)(seconds * 1e9);
}

/* Echo what one read gives; spoil inverts the byte at that position of each stream. 0 at its end.
 */
static int echo(int fd, uint64_t *position, uint64_t spoil) {
    unsigned char piece[65536];
    ssize_t n = recv(fd, piece, sizeof piece, 0);
    if (n <= 0)
        return 0;
    if (spoil >= *position && spoil < *position + (uint64_t)n)
        piece[spoil - *position] ^= 0xff;
    *position += (uint64_t)n;
    return send(fd, piece, (size_t)n, MSG_NOSIGNAL) == n;
}

static void serve(int listener, uint64_t spoil) {
    struct pollfd fds[MOST] = {{.fd = listener, .events = POLLIN}};
    uint64_t positions[MOST];
    nfds_t n = 1;
    for (;;) {
        assert(poll(fds, n, -1) > 0);
        for (nfds_t i = n; i-- > 1;)
            if (fds[i].revents && !echo(fds[i].fd, &positions[i], spoil)) {
                close(fds[i].fd);
                fds[i] = fds[--n];
                positions[i] = positions[n];
            }
        if (fds[0].revents && n < MOST) {
            positions[n] = 0;
            fds[n++] = (struct pollfd){.fd = accept(listener, NULL, NULL), .events = POLLIN};
        }
    }
}

static int start_server(int *ret_port, uint64_t spoil) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    assert(bind(listener, (struct sockaddr *)&address, sizeof address) == 0);
    assert(listen(listener, 128) == 0);
    assert(getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    *ret_port = ntohs(address.sin_port);
    int pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve(listener, spoil);
    }
    close(listener);
    return pid;
}

static void stop_server(int pid) {
    assert(kill(pid, SIGKILL) == 0);
    assert(waitpid(pid, NULL, 0) == pid);
}

static ik_load_counters run(ik_load_options options, int port, ik_load **ret) {
    ik_load_counters counters;
    int64_t deadline = in_seconds(PATIENCE);
    options.host = "127.0.0.1";
    options.port = port;
    options.timeout_ns = options.grace_ns = PATIENCE * INT64_C(1000000000);
    assert(ik_load_new(&options, ret) == 0);
    while (ik_load_run(*ret, in_seconds(0.01)) == 0)
        assert(ik_wait_now() < deadline);
    ik_load_read_counters(*ret, &counters);
    assert(counters.phase == IK_LOAD_DONE && counters.open == 0);
    return counters;
}

static void none_failed(const ik_load *load) {
    for (int kind = 0; kind < IK_LOAD_KINDS; kind++) {
        ik_load_failure failure;
        ik_load_read_failure(load, kind, &failure);
        assert(failure.count == 0);
    }
}

static void test_all_comes_back(int port) {
    for (int reconnect = 0; reconnect < 2; reconnect++)
        for (int64_t size = 1; size <= 1000000; size *= 10) {
            ik_load_options options = {.connections = 5,
                                       .idle = 3,
                                       .size = size,
                                       .messages = 4,
                                       .reconnect = reconnect,
                                       .interval_ns = size == 100 ? 1e6 : 0};
            ik_load *load;
            ik_load_counters counters = run(options, port, &load);
            none_failed(load);
            assert(counters.count == 20 && counters.echoed == 20);
            assert(counters.bytes == 20 * (uint64_t)size + (reconnect ? 3 : 8));
            assert(ik_load_percentile(load, 0.5) <= ik_load_percentile(load, 0.99));
            assert(ik_load_percentile(load, 0) > 0);
            assert(ik_load_percentile(load, 1) == counters.worst_ns);
            ik_load_free(load);
        }
}

/* The echo of a request is its answer; streams whose period no buffer divides. */
static void test_a_request_and_its_answer(int port) {
    static unsigned char text[70001];
    for (size_t i = 0; i < sizeof text; i++)
        text[i] = (unsigned char)(i * i + i / 251);
    for (int reconnect = 0; reconnect < 2; reconnect++)
        for (int64_t size = 1; size <= (int64_t)sizeof text; size += 35000) {
            ik_load_options options = {.connections = 3,
                                       .idle = 1,
                                       .request = text,
                                       .request_len = size,
                                       .answer = text,
                                       .answer_len = size,
                                       .messages = 4,
                                       .reconnect = reconnect};
            ik_load *load;
            ik_load_counters counters = run(options, port, &load);
            none_failed(load);
            assert(counters.count == 12);
            assert(counters.bytes == (12 + (reconnect ? 1 : 4)) * (uint64_t)size);
            ik_load_free(load);
        }
}

static void test_nobody_is_there(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int bound = socket(AF_INET, SOCK_STREAM, 0); /* but it does not listen */
    assert(bind(bound, (struct sockaddr *)&address, sizeof address) == 0);
    assert(getsockname(bound, (struct sockaddr *)&address, &length) == 0);
    for (int reconnect = 0; reconnect < 2; reconnect++) {
        ik_load_options options = {.host = "127.0.0.1",
                                   .port = ntohs(address.sin_port),
                                   .connections = 20,
                                   .size = 1,
                                   .reconnect = reconnect,
                                   .timeout_ns = INT64_MAX};
        ik_load *load;
        assert(ik_load_new(&options, &load) == 0);
        assert(ik_load_run(load, in_seconds(PATIENCE)) == -ECONNREFUSED);
        assert(ik_load_run(load, in_seconds(PATIENCE)) == -ECONNREFUSED);
        ik_load_free(load);
    }
    close(bound);
}

static void test_the_wrong_byte_is_named(void) {
    int port, pid = start_server(&port, 70000);
    ik_load_options options = {.connections = 1, .size = 50000, .messages = 2};
    ik_load *load;
    ik_load_failure failure;
    assert(run(options, port, &load).count == 1);
    ik_load_read_failure(load, IK_LOAD_WRONG_BYTE, &failure);
    assert(failure.count == 1 && failure.position == 70000);
    assert(failure.got == (failure.expected ^ 0xff) && failure.state == IK_LOAD_ECHOING);
    ik_load_free(load);
    stop_server(pid);
}

static void test_stopped_and_thrown_away_at_any_time(int port) {
    for (int steps = 0; steps < 40; steps++) {
        ik_load_options options = {.host = "127.0.0.1",
                                   .port = port,
                                   .connections = 20,
                                   .size = 1000,
                                   .idle = 2,
                                   .reconnect = steps % 2,
                                   .timeout_ns = PATIENCE * INT64_C(1000000000),
                                   .grace_ns = PATIENCE * INT64_C(1000000000)};
        ik_load *load;
        assert(ik_load_new(&options, &load) == 0);
        for (int i = 0; i < steps; i++)
            assert(ik_load_run(load, ik_wait_now() + 100000) == 0);
        ik_load_stop(load);
        if (steps % 4 < 2)
            while (ik_load_run(load, in_seconds(0.01)) == 0)
                ;
        none_failed(load);
        ik_load_free(load);
    }
}

static void test_what_is_refused(void) {
    char longest[200];
    ik_load_options options = {.connections = 1, .size = 1, .host = "localhost", .port = 1};
    ik_load *load;
    assert(ik_load_new(&options, &load) == -EINVAL);
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = '\0';
    options.host = NULL;
    options.path = longest;
    assert(ik_load_new(&options, &load) == -ENAMETOOLONG);
}

/* That a socket can be bound to an address and given its port later. */
static bool late_ports(void) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int rc = setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    close(fd);
    return rc == 0;
}

int main(void) {
    if (!has("ports that come late", late_ports()))
        return 77;
    int port, pid = start_server(&port, UINT64_MAX);
    test_all_comes_back(port);
    test_a_request_and_its_answer(port);
    test_stopped_and_thrown_away_at_any_time(port);
    stop_server(pid);
    test_the_wrong_byte_is_named();
    test_nobody_is_there();
    test_what_is_refused();
    return 0;
}

/* SPDX-License-Identifier: MIT */
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include "wait.h"

enum {
    CHUNK = 65536,  /* moved by one call */
    PERIOD = 65521, /* of the pattern: a prime, so that no size of messages or buffers divides it */
    STRIDE = 7919,  /* how far apart the streams of two connections begin in it */
    EVENTS = 256,
    AT_ONCE = 64 /* connections being opened: more might overflow the backlog of the server, and
                    each overflow is a second lost to TCP's retransmission */
};

static const int64_t MILLISECOND = 1000000;
/* After an error, so that a server that refuses is not asked without end. */
static const int64_t PAUSE = 100 * MILLISECOND;

/* Latencies: exact below 2 * STEPS ns, then STEPS steps to each power of two, up to 2^41 ns. */
enum { STEP_BITS = 7, STEPS = 1 << STEP_BITS, LAST_POWER = 40 };
enum { BUCKETS = (LAST_POWER - STEP_BITS + 2) * STEPS };

typedef struct slot {
    int fd;
    int state;
    int settled;      /* it was opened once, or that failed */
    uint32_t events;  /* that epoll reports for it */
    uint32_t index;   /* active ones first, then the idle */
    size_t begins_at; /* in the period of the streams */
    uint64_t number;
    uint64_t begun; /* messages */
    uint64_t sent, goal, received, awaited;
    int64_t began;       /* what is under way; the time limit counts from here */
    int64_t counts_from; /* the same, or when it was due: the latency counts from here */
    int64_t again_at;    /* when paused or queued */
} slot;

/* What is repeated without end: from any place in the period CHUNK bytes can be read on. */
typedef struct stream {
    unsigned char *bytes;
    size_t period;
} stream;

struct ik_load {
    ik_load_options options;
    stream out,
        in; /* what each connection sends; what has to come back: the same if it is echoed */
    int64_t out_len, in_len; /* of a message */
    union {
        struct sockaddr any;
        struct sockaddr_in in;
        struct sockaddr_in6 in6;
        struct sockaddr_un un;
    } address;
    socklen_t address_len;
    int epoll, timer, sources;
    slot *slots;
    uint32_t n_slots, n_opened, n_settled, n_ended, n_active_ended, at_once;
    uint64_t n_connections, due, armed_for;
    int64_t started, scheduled_from, counting_from, counting_until, told_at, last_echo, look_at;
    int64_t opening_ns;    /* how long the opening waits for a connection */
    int64_t failing_since; /* nothing has come back since this error; 0: there was none */
    int phase;
    int reached, answered; /* somebody, once; by somebody */
    int unreachable;       /* errno: nobody is there */
    uint64_t count, echoed, bytes, unsent;
    int64_t worst;
    ik_load_failure failures[IK_LOAD_KINDS];
    uint64_t latencies[BUCKETS];
    unsigned char answer[CHUNK];
};

static int64_t plus(int64_t a, int64_t b) {
    return a > INT64_MAX - b ? INT64_MAX : a + b;
}

static int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* --- latencies */

static unsigned bucket_of(uint64_t ns) {
    if (ns < 2 * STEPS)
        return (unsigned)ns;
    unsigned power = 63 - (unsigned)__builtin_clzll(ns);
    if (power > LAST_POWER)
        return BUCKETS - 1;
    return (power - STEP_BITS) * STEPS + (unsigned)(ns >> (power - STEP_BITS));
}

static int64_t top_of(unsigned bucket) {
    if (bucket < 2 * STEPS)
        return bucket;
    unsigned shift = bucket / STEPS - 1;
    return (((int64_t)(bucket % STEPS + STEPS + 1)) << shift) - 1;
}

int64_t ik_load_percentile(const ik_load *load, double share) {
    uint64_t passed = 0;
    for (unsigned bucket = 0; bucket < BUCKETS - 1; bucket++) {
        passed += load->latencies[bucket];
        if (passed > 0 && (double)passed >= share * (double)load->count)
            return top_of(bucket) < load->worst ? top_of(bucket) : load->worst;
    }
    return load->worst;
}

static int has_schedule(const ik_load *load) {
    return load->options.interval_ns > 0;
}

/* On a schedule what was due in the time counts, however late it came; in a closed loop what began
 * and ended in it. */
static void record(ik_load *load, const slot *s) {
    int64_t now = ik_wait_now(), took = now - s->counts_from;
    int64_t decides = has_schedule(load) ? s->counts_from : now;
    load->echoed++;
    load->last_echo = now;
    if (s->counts_from < load->counting_from || decides > load->counting_until)
        return;
    load->count++;
    load->latencies[bucket_of((uint64_t)took)]++;
    if (took > load->worst)
        load->worst = took;
}

/* --- the ends of a connection */

static int is_active(const ik_load *load, const slot *s) {
    return s->index < load->options.connections;
}

static int reconnects(const ik_load *load, const slot *s) {
    return load->options.reconnect && is_active(load, s);
}

static int all_begun(const ik_load *load, const slot *s) {
    return load->options.messages > 0 && is_active(load, s) && s->begun >= load->options.messages;
}

static void settle(ik_load *load, slot *s) {
    load->n_settled += !s->settled;
    s->settled = 1;
}

static void drop(slot *s) {
    if (s->fd >= 0)
        close(s->fd);
    s->fd = -1;
}

static void end(ik_load *load, slot *s) {
    drop(s);
    settle(load, s);
    s->state = IK_LOAD_ENDED;
    load->n_ended++;
    load->n_active_ended += is_active(load, s);
}

/* By whole milliseconds, so that however many are paused we look no more often than that. */
static void hold_off(ik_load *load, slot *s, int state, int64_t ns) {
    s->state = state;
    s->again_at = ((ik_wait_now() + ns) / MILLISECOND + 1) * MILLISECOND;
    if (s->again_at < load->look_at)
        load->look_at = s->again_at;
}

static void tell_first(ik_load *load, const slot *s, ik_load_failure *failure, int error) {
    failure->connection = s->number;
    failure->position = s->received;
    failure->at_ns = ik_wait_now() - load->started;
    failure->state = s->state;
    failure->error = error;
}

static ik_load_failure *fail(ik_load *load, slot *s, int kind, int error) {
    ik_load_failure *failure = &load->failures[kind];
    if (failure->count++ == 0)
        tell_first(load, s, failure, error);
    if (load->failing_since == 0)
        load->failing_since = ik_wait_now();
    if (load->phase == IK_LOAD_ENDING || all_begun(load, s)) {
        end(load, s);
        return failure;
    }
    drop(s);
    settle(load, s);
    hold_off(load, s, IK_LOAD_PAUSED, PAUSE);
    if (kind == IK_LOAD_TIMED_OUT)
        load->at_once = load->n_slots; /* or a dead server would take a time limit for each few */
    return failure;
}

/* EPIPE: the server closed in good order, and then refused what we sent. ENOTCONN is shutdown()'s.
 */
static int kind_of(int error) {
    return error == ECONNREFUSED                      ? IK_LOAD_REFUSED
           : error == ECONNRESET || error == ENOTCONN ? IK_LOAD_RESET
           : error == EPIPE                           ? IK_LOAD_CLOSED_EARLY
           : error == ETIMEDOUT                       ? IK_LOAD_TIMED_OUT
                                                      : IK_LOAD_OTHER;
}

static void fail_by_errno(ik_load *load, slot *s, int error) {
    int kind = kind_of(error);
    if (!load->reached && (kind == IK_LOAD_REFUSED || kind == IK_LOAD_OTHER))
        load->unreachable = error;
    fail(load, s, kind, error);
}

/* --- sending */

static const unsigned char *content(const stream *of, const slot *s, uint64_t position) {
    return of->bytes + (s->begins_at + position) % of->period;
}

static int watch(ik_load *load, slot *s, int operation) {
    uint32_t events = s->sent < s->goal ? EPOLLIN | EPOLLOUT : EPOLLIN;
    struct epoll_event event = {.events = events, .data.ptr = s};
    if (operation == EPOLL_CTL_MOD && events == s->events)
        return 0;
    s->events = events;
    return epoll_ctl(load->epoll, operation, s->fd, &event) < 0 ? -errno : 0;
}

/* Send what the kernel takes in one call; on a connection still being made that is nothing. 0 or
 * -errno. */
static int push(ik_load *load, slot *s) {
    uint64_t left = s->goal - s->sent;
    ssize_t n = send(s->fd, content(&load->out, s, s->sent), left < CHUNK ? (size_t)left : CHUNK,
                     MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN ? 0 : -errno;
    load->reached = 1;
    s->sent += (uint64_t)n;
    return 0;
}

static void send_more(ik_load *load, slot *s, int operation) {
    int rc = push(load, s);
    if (rc == 0)
        rc = watch(load, s, operation);
    if (rc < 0)
        fail_by_errno(load, s, -rc);
}

static int is_echo(const ik_load *load) {
    return load->options.request == NULL;
}

static void begin(const ik_load *load, slot *s, int state) {
    int is_byte = state == IK_LOAD_HELLO && is_echo(load);
    s->state = state;
    s->goal += is_byte ? 1 : (uint64_t)load->out_len;
    s->awaited += is_byte ? 1 : (uint64_t)load->in_len;
}

static void try_to_connect(ik_load *load, slot *s) {
    if (connect(s->fd, &load->address.any, load->address_len) < 0) {
        if (errno == EAGAIN) { /* a Unix socket does not wait in line by itself */
            hold_off(load, s, IK_LOAD_QUEUED, MILLISECOND);
            return;
        }
        if (errno != EINPROGRESS) {
            fail_by_errno(load, s, errno);
            return;
        }
    }
    begin(load, s, reconnects(load, s) ? IK_LOAD_ECHOING : IK_LOAD_HELLO);
    send_more(load, s, EPOLL_CTL_ADD);
}

/* We close first, so each connection leaves a port of ours in TIME_WAIT, for a minute or (Linux on
 * loopback) a second. Some 28,000 ports at that are too few for the faster servers; but there is
 * that number for each source address, and 127.0.0.0/8 is all ours. Without the flag bind(2) would
 * look for a port that is free to all destinations, which is slow and finds fewer. */
static int bind_source(const slot *s) {
    int on = 1;
    struct sockaddr_in source = {.sin_family = AF_INET};
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (uint32_t)(s->number % IK_LOAD_SOURCES));
    if (setsockopt(s->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) < 0)
        return -errno;
    return bind(s->fd, (struct sockaddr *)&source, sizeof source) < 0 ? -errno : 0;
}

static int make_socket(const ik_load *load, slot *s) {
    int on = 1, family = load->address.any.sa_family;
    s->fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (s->fd < 0)
        return -errno;
    if (family != AF_UNIX && setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        return -errno;
    return load->sources ? bind_source(s) : 0;
}

static void open_connection(ik_load *load, slot *s) {
    s->number = load->n_connections++;
    s->begins_at = is_echo(load) ? s->number * STRIDE % PERIOD : 0;
    s->sent = s->goal = s->received = s->awaited = 0;
    s->state = IK_LOAD_HELLO;
    s->began = ik_wait_now();
    int rc = make_socket(load, s);
    if (rc < 0)
        fail_by_errno(load, s, -rc);
    else
        try_to_connect(load, s);
}

/* --- what comes next on a connection */

static int64_t due_at(const ik_load *load, uint64_t k) {
    return load->scheduled_from + (int64_t)((double)k * load->options.interval_ns);
}

static void begin_message(ik_load *load, slot *s) {
    uint64_t k = s->index + s->begun++ * load->options.connections;
    s->began = ik_wait_now();
    s->counts_from = has_schedule(load) ? due_at(load, k) : s->began;
    if (load->options.reconnect) {
        open_connection(load, s);
        return;
    }
    begin(load, s, IK_LOAD_ECHOING);
    send_more(load, s, EPOLL_CTL_MOD);
}

static void half_close(ik_load *load, slot *s) {
    s->state = IK_LOAD_CLOSING;
    if (shutdown(s->fd, SHUT_WR) < 0)
        fail_by_errno(load, s, errno);
}

static void leave(ik_load *load, slot *s) {
    s->began = ik_wait_now();
    if (s->fd < 0)
        end(load, s);
    else
        half_close(load, s);
}

static int is_due(const ik_load *load, const slot *s) {
    return !has_schedule(load) || s->index + s->begun * load->options.connections < load->due;
}

/* Nothing is under way on it: begin the next message, or wait for its time, or leave. */
static void go_on(ik_load *load, slot *s) {
    s->state = IK_LOAD_READY;
    if (load->phase == IK_LOAD_ENDING || all_begun(load, s))
        leave(load, s);
    else if (load->phase == IK_LOAD_RUNNING && is_active(load, s) && is_due(load, s))
        begin_message(load, s);
}

static void try_again(ik_load *load, slot *s) {
    if (s->state == IK_LOAD_QUEUED)
        try_to_connect(load, s);
    else if (reconnects(load, s))
        go_on(load, s);
    else
        open_connection(load, s);
}

/* --- receiving */

static void echoed(ik_load *load, slot *s) {
    if (reconnects(load, s)) {
        half_close(load, s);
        return;
    }
    if (s->state == IK_LOAD_HELLO)
        settle(load, s);
    else
        record(load, s);
    go_on(load, s);
}

static void end_of_file(ik_load *load, slot *s) {
    if (s->state != IK_LOAD_CLOSING) {
        fail(load, s, IK_LOAD_CLOSED_EARLY, 0);
        return;
    }
    if (reconnects(load, s)) {
        drop(s);
        record(load, s);
        go_on(load, s);
    } else
        end(load, s);
}

static void wrong_byte(ik_load *load, slot *s, const unsigned char *expected) {
    size_t i = 0;
    while (load->answer[i] == expected[i])
        i++;
    load->bytes += i;
    s->received += i;
    ik_load_failure *failure = fail(load, s, IK_LOAD_WRONG_BYTE, 0);
    if (failure->count > 1)
        return;
    failure->expected = expected[i];
    failure->got = load->answer[i];
}

/* An echo is never ahead of what was sent; an answer may come when a part of the request is enough.
 */
static void take(ik_load *load, slot *s, size_t n) {
    const unsigned char *expected = content(&load->in, s, s->received);
    load->answered = 1;
    load->failing_since = 0;
    if (s->received + n > (is_echo(load) ? s->sent : s->awaited))
        fail(load, s, IK_LOAD_TOO_MUCH, 0);
    else if (memcmp(load->answer, expected, n) != 0)
        wrong_byte(load, s, expected);
    else {
        load->bytes += n;
        s->received += n;
        if (s->received == s->awaited)
            echoed(load, s);
    }
}

static void pull(ik_load *load, slot *s) {
    ssize_t n = recv(s->fd, load->answer, CHUNK, 0);
    if (n > 0)
        take(load, s, (size_t)n);
    else if (n == 0)
        end_of_file(load, s);
    else if (errno != EAGAIN)
        fail_by_errno(load, s, errno);
}

/* Sending and receiving take turns, so a message larger than all buffers on the way gets through.
 */
static void handle(ik_load *load, slot *s, uint32_t events) {
    if (events & EPOLLOUT)
        send_more(load, s, EPOLL_CTL_MOD);
    if (s->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        pull(load, s);
}

/* --- the phases */

static void start_running(ik_load *load) {
    const ik_load_options *options = &load->options;
    load->phase = IK_LOAD_RUNNING;
    load->scheduled_from = load->last_echo = ik_wait_now();
    load->counting_from = load->scheduled_from + options->warm_up_ns;
    if (options->duration_ns > 0)
        load->counting_until = load->counting_from + options->duration_ns;
    for (uint32_t i = 0; i < options->connections && load->unreachable == 0; i++)
        if (load->slots[i].state == IK_LOAD_READY)
            go_on(load, &load->slots[i]);
}

static void open_some(ik_load *load) {
    while (load->n_opened < load->n_slots && load->n_opened - load->n_settled < load->at_once &&
           load->unreachable == 0)
        open_connection(load, &load->slots[load->n_opened++]);
    if (load->n_settled == load->n_slots)
        start_running(load);
}

static void end_early(ik_load *load, slot *s) {
    if (s->state == IK_LOAD_READY)
        leave(load, s);
    else if (s->state < IK_LOAD_QUEUED)
        end(load, s);
}

static uint64_t due_on(const ik_load *load, const slot *s) {
    return load->due <= s->index ? 0 : (load->due - s->index - 1) / load->options.connections + 1;
}

static void start_ending(ik_load *load, int64_t now) {
    load->phase = IK_LOAD_ENDING;
    load->counting_until = least(load->counting_until, now);
    for (uint32_t i = 0; i < load->n_slots; i++) {
        slot *s = &load->slots[i];
        if (is_active(load, s) && due_on(load, s) > s->begun)
            load->unsent += due_on(load, s) - s->begun;
        end_early(load, s);
    }
}

/* The duration is over, or somebody says so: what is under way has the grace. */
static void tell_to_end(ik_load *load, int64_t now) {
    load->told_at = least(load->told_at, now);
    if (load->phase < IK_LOAD_ENDING)
        start_ending(load, now);
}

static uint64_t most_due(const ik_load *load) {
    return load->options.messages > 0 ? load->options.messages * load->options.connections
                                      : UINT64_MAX;
}

static void release_due(ik_load *load, int64_t now) {
    while (load->due < most_due(load) && due_at(load, load->due) <= now) {
        slot *s = &load->slots[load->due++ % load->options.connections];
        if (s->state == IK_LOAD_READY)
            go_on(load, s);
    }
}

static void advance(ik_load *load) {
    int64_t now = ik_wait_now();
    if (load->phase == IK_LOAD_OPENING)
        open_some(load);
    if (load->phase == IK_LOAD_RUNNING && has_schedule(load))
        release_due(load, now < load->counting_until ? now : load->counting_until - 1);
    if (load->phase == IK_LOAD_RUNNING && load->n_active_ended == load->options.connections)
        start_ending(load, load->last_echo);
    else if (load->phase == IK_LOAD_RUNNING && now >= load->counting_until)
        tell_to_end(load, now);
    if (load->n_ended == load->n_slots)
        load->phase = IK_LOAD_DONE;
}

/* --- the loop */

static int is_under_way(const slot *s) {
    return s->state == IK_LOAD_QUEUED || s->state == IK_LOAD_HELLO || s->state == IK_LOAD_ECHOING ||
           s->state == IK_LOAD_CLOSING;
}

static int is_late(const ik_load *load, const slot *s, int64_t now) {
    const ik_load_options *options = &load->options;
    int64_t limit = load->phase == IK_LOAD_OPENING ? load->opening_ns : options->timeout_ns;
    int is_over = now - load->told_at >= options->grace_ns;
    return is_under_way(s) && (is_over || now - s->began >= limit);
}

static void look_at(ik_load *load, slot *s, int64_t now) {
    int waits = s->state == IK_LOAD_PAUSED || s->state == IK_LOAD_QUEUED;
    if (is_late(load, s, now))
        fail(load, s, IK_LOAD_TIMED_OUT, 0);
    else if (waits && now >= s->again_at)
        try_again(load, s);
    else if (waits)
        load->look_at = least(load->look_at, s->again_at);
}

/* A server that answers nothing ends the opening, or each few connections would take a time limit.
 * With a duration the rest ends in its time, whatever the server does; without one it might never.
 */
static int is_hopeless(const ik_load *load, int64_t now) {
    if (load->phase == IK_LOAD_OPENING && load->failures[IK_LOAD_TIMED_OUT].count > 0)
        return !load->answered;
    return load->phase < IK_LOAD_ENDING && load->options.duration_ns == 0 &&
           load->failing_since > 0 &&
           now - load->failing_since >= plus(load->options.timeout_ns, 10 * PAUSE);
}

/* All connections are looked through, but rarely; keeping them in order of time would cost more. */
static void look_at_the_clock(ik_load *load) {
    int64_t now = ik_wait_now(), every = least(load->options.timeout_ns, load->opening_ns) / 4;
    if (now < load->look_at)
        return;
    load->look_at = now + least(every, PAUSE);
    for (uint32_t i = 0; i < load->n_slots; i++)
        look_at(load, &load->slots[i], now);
    if (is_hopeless(load, now))
        tell_to_end(load, now);
}

/* A timer descriptor, because the time limit of epoll_wait is in milliseconds. */
static int set_timer(ik_load *load) {
    if (!has_schedule(load) || load->phase != IK_LOAD_RUNNING || load->due == load->armed_for ||
        load->due >= most_due(load))
        return 0;
    int64_t at = due_at(load, load->due);
    struct itimerspec when = {.it_value = {at / 1000000000, at % 1000000000}};
    load->armed_for = load->due;
    return timerfd_settime(load->timer, TFD_TIMER_ABSTIME, &when, NULL) < 0 ? -errno : 0;
}

static int milliseconds(const ik_load *load, int64_t until) {
    int64_t now = ik_wait_now(), at = load->look_at < until ? load->look_at : until;
    if (load->phase == IK_LOAD_RUNNING && load->counting_until < at)
        at = load->counting_until;
    return at <= now ? 0 : (int)((at - now + MILLISECOND - 1) / MILLISECOND);
}

static void expire(const ik_load *load) {
    uint64_t times;
    while (read(load->timer, &times, sizeof times) > 0)
        ;
}

static int turn(ik_load *load, int64_t until) {
    struct epoll_event events[EVENTS];
    int rc = set_timer(load);
    int ready = rc < 0 ? rc : epoll_wait(load->epoll, events, EVENTS, milliseconds(load, until));
    if (ready < 0)
        return rc < 0 ? rc : -errno;
    for (int i = 0; i < ready; i++) {
        if (events[i].data.ptr == NULL)
            expire(load);
        else
            handle(load, events[i].data.ptr, events[i].events);
    }
    return 0;
}

int ik_load_run(ik_load *load, int64_t until_ns) {
    int rc = 0;
    if (load->started == 0)
        load->started = ik_wait_now();
    while (rc == 0 && load->phase != IK_LOAD_DONE && ik_wait_now() < until_ns) {
        advance(load);
        if (load->phase == IK_LOAD_DONE || load->unreachable)
            break;
        rc = turn(load, until_ns);
        look_at_the_clock(load);
    }
    if (load->unreachable)
        return -load->unreachable;
    return rc < 0 ? rc : load->phase == IK_LOAD_DONE;
}

void ik_load_stop(ik_load *load) {
    tell_to_end(load, ik_wait_now());
}

/* --- from here to there */

static int take_path(ik_load *load, const char *path) {
    struct sockaddr_un *un = &load->address.un;
    if (strlen(path) >= sizeof un->sun_path)
        return -ENAMETOOLONG;
    un->sun_family = AF_UNIX;
    memcpy(un->sun_path, path, strlen(path) + 1);
    load->address_len = sizeof *un;
    return 0;
}

static int take_address(ik_load *load, const char *host, int port) {
    struct sockaddr_in *in = &load->address.in;
    struct sockaddr_in6 *in6 = &load->address.in6;
    if (inet_pton(AF_INET, host, &in->sin_addr) == 1) {
        in->sin_family = AF_INET;
        in->sin_port = htons((uint16_t)port);
        load->address_len = sizeof *in;
        load->sources =
            load->options.reconnect && ntohl(in->sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
        return 0;
    }
    if (inet_pton(AF_INET6, host, &in6->sin6_addr) != 1)
        return -EINVAL;
    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons((uint16_t)port);
    load->address_len = sizeof *in6;
    return 0;
}

static int make_stream(stream *of, const unsigned char *bytes, int64_t period) {
    of->period = (size_t)period;
    of->bytes = malloc(of->period + CHUNK);
    for (size_t i = 0; of->bytes != NULL && i < of->period + CHUNK; i++)
        of->bytes[i] = bytes[i % of->period];
    return of->bytes != NULL ? 0 : -ENOMEM;
}

/* Neighbours differ, so that a message of one byte is not taken for the next one. */
static int make_pattern(stream *of) {
    uint32_t random = 2463534242;
    unsigned char pattern[PERIOD], byte = 0;
    for (size_t i = 0; i < PERIOD; i++) {
        random ^= random << 13;
        random ^= random >> 17;
        random ^= random << 5;
        pattern[i] = byte = (unsigned char)(byte + 1 + random % 255);
    }
    return make_stream(of, pattern, PERIOD);
}

static int make_streams(ik_load *load) {
    const ik_load_options *options = &load->options;
    int rc = is_echo(load) ? make_pattern(&load->out)
                           : make_stream(&load->out, options->request, options->request_len);
    load->in = load->out;
    load->out_len = is_echo(load) ? options->size : options->request_len;
    load->in_len = is_echo(load) ? options->size : options->answer_len;
    if (rc == 0 && !is_echo(load))
        rc = make_stream(&load->in, options->answer, options->answer_len);
    return rc;
}

static int make_slots(ik_load *load) {
    const ik_load_options *options = &load->options;
    load->n_slots = options->connections + options->idle;
    load->slots = calloc(load->n_slots, sizeof *load->slots);
    if (load->slots == NULL)
        return -ENOMEM;
    for (uint32_t i = 0; i < load->n_slots; i++) {
        load->slots[i].index = i;
        load->slots[i].fd = -1;
    }
    /* Those that reconnect are not opened beforehand. */
    for (; options->reconnect && load->n_opened < options->connections; load->n_opened++) {
        load->slots[load->n_opened].state = IK_LOAD_READY;
        settle(load, &load->slots[load->n_opened]);
    }
    return 0;
}

static int make_descriptors(ik_load *load) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    load->epoll = epoll_create1(EPOLL_CLOEXEC);
    load->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (load->epoll < 0 || load->timer < 0 ||
        epoll_ctl(load->epoll, EPOLL_CTL_ADD, load->timer, &event) < 0)
        return -errno;
    return 0;
}

static int prepare(ik_load *load) {
    const ik_load_options *options = &load->options;
    int rc = options->host ? take_address(load, options->host, options->port)
                           : take_path(load, options->path);
    if (rc == 0)
        rc = make_streams(load);
    if (rc == 0)
        rc = make_slots(load);
    if (rc == 0)
        rc = make_descriptors(load);
    return rc;
}

int ik_load_new(const ik_load_options *options, ik_load **ret) {
    ik_load *load = calloc(1, sizeof *load);
    if (load == NULL)
        return -ENOMEM;
    load->options = *options;
    load->epoll = load->timer = -1;
    load->armed_for = UINT64_MAX;
    load->at_once = AT_ONCE;
    load->counting_from = load->counting_until = load->told_at = INT64_MAX;
    load->opening_ns = options->timeout_ns;
    if (options->duration_ns > 0)
        load->opening_ns =
            least(load->opening_ns,
                  plus(plus(options->warm_up_ns, options->duration_ns), options->grace_ns));
    int rc = prepare(load);
    if (rc < 0)
        ik_load_free(load);
    else
        *ret = load;
    return rc;
}

void ik_load_free(ik_load *load) {
    for (uint32_t i = 0; load->slots != NULL && i < load->n_slots; i++)
        drop(&load->slots[i]);
    if (load->epoll >= 0)
        close(load->epoll);
    if (load->timer >= 0)
        close(load->timer);
    free(load->slots);
    if (load->in.bytes != load->out.bytes)
        free(load->in.bytes);
    free(load->out.bytes);
    free(load);
}

/* --- the figures */

void ik_load_read_counters(const ik_load *load, ik_load_counters *ret) {
    *ret = (ik_load_counters){
        .phase = load->phase,
        .count = load->count,
        .echoed = load->echoed,
        .bytes = load->bytes,
        .unsent = load->unsent,
        .began_ns = load->counting_from == INT64_MAX ? 0 : load->counting_from,
        .ended_ns = load->phase < IK_LOAD_ENDING ? 0 : load->counting_until,
        .worst_ns = load->worst,
    };
    for (uint32_t i = 0; i < load->n_slots; i++)
        ret->open += load->slots[i].state >= IK_LOAD_READY && load->slots[i].fd >= 0;
}

void ik_load_read_failure(const ik_load *load, int kind, ik_load_failure *ret) {
    *ret = load->failures[kind];
}

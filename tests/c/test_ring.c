/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel.h"
#include "ring.h"

enum { BOTH = IK_RING_MANY_SENDERS | IK_RING_MANY_RECEIVERS, MILLISECOND = 1000000 };
/* Where the header has what the tests preset: the indices, and the state of long messages. */
enum { CAPACITY = 8, FLAGS = 16, CLOSED = 64, TAIL = 128, STREAM = 152, HEAD = 256, LOCKS = 384 };

enum { PATIENCE = 120000 }; /* milliseconds, however busy the machine is */

static int64_t in(int64_t milliseconds) {
    return ik_wait_now() + milliseconds * MILLISECOND;
}

static void *map(uint64_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert(memory != MAP_FAILED);
    return memory;
}

static ik_ring new_ring(uint64_t capacity, uint32_t flags, uint32_t max_messages) {
    ik_ring ring;
    void *memory = map(IK_RING_HEADER + capacity);
    assert(ik_ring_create(memory, IK_RING_HEADER + capacity, flags, max_messages) == 0);
    assert(ik_ring_attach(&ring, memory, IK_RING_HEADER + capacity) == 0);
    assert(ring.capacity == capacity && ring.flags == flags);
    return ring;
}

/* The same ring as another process would know it. */
static ik_ring attached(const ik_ring *ring) {
    ik_ring other;
    assert(ik_ring_attach(&other, ring->shared, IK_RING_HEADER + ring->capacity) == 0);
    return other;
}

static void drop(ik_ring *ring) {
    munmap(ring->shared, IK_RING_HEADER + ring->capacity);
}

static uint64_t *word(const ik_ring *ring, int offset) {
    return (uint64_t *)((char *)ring->shared + offset);
}

static ik_ring_stats stats_of(ik_ring *ring) {
    ik_ring_stats stats;
    ik_ring_get_stats(ring, &stats);
    return stats;
}

static void fill(unsigned char *bytes, uint64_t len, uint32_t seed) {
    for (uint64_t i = 0; i < len; i++)
        bytes[i] = (unsigned char)((seed = seed * 1664525 + 1013904223) >> 24);
}

static bool is_filled(const unsigned char *bytes, uint64_t len, uint32_t seed) {
    for (uint64_t i = 0; i < len; i++)
        if (bytes[i] != (unsigned char)((seed = seed * 1664525 + 1013904223) >> 24))
            return false;
    return true;
}

/* Send to the end, whatever -EINTR says; never from a handler of signals here. */
static int send(ik_ring *ring, const void *data, uint64_t len, int64_t deadline) {
    ik_ring_progress progress = {0};
    int rc;
    do
        rc = ik_ring_send(ring, &progress, data, len, deadline);
    while (rc == -EINTR);
    return rc;
}

static unsigned char bytes[1 << 20], got[1 << 20];

static void send_filled(ik_ring *ring, uint64_t len, uint32_t seed) {
    fill(bytes, len, seed);
    assert(send(ring, bytes, len, IK_NOW) == 0);
}

static void recv_filled(ik_ring *ring, uint64_t len, uint32_t seed) {
    assert(ik_ring_recv(ring, got, sizeof got, IK_NOW) == (int64_t)len);
    assert(is_filled(got, len, seed));
}

static pid_t forked(int (*child)(ik_ring *ring, int argument), ik_ring *ring, int argument) {
    pid_t pid = fork();
    assert(pid >= 0);
    if (pid == 0)
        _exit(child(ring, argument));
    return pid;
}

static void reap(pid_t pid) {
    int status;
    assert(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* --- whole messages -------------------------------------------------------------------------- */

/* From each index: every size that fits, one at a time and two at a time, so all gaps come. */
static void all_sizes_pass_from(uint64_t index, uint32_t flags) {
    ik_ring ring = new_ring(IK_RING_LEAST, flags, 0);
    *word(&ring, TAIL) = *word(&ring, HEAD) = index;
    ik_ring fresh = attached(&ring);
    for (uint32_t round = 0; round < 40; round++) {
        for (uint64_t len = 0; len <= ring.largest; len++) {
            send_filled(&fresh, len, round);
            if (len < ring.largest / 2)
                send_filled(&ring, round % 8, round + 1);
            recv_filled(&fresh, len, round);
            if (len < ring.largest / 2)
                recv_filled(&ring, round % 8, round + 1);
        }
    }
    ik_ring_stats stats = stats_of(&ring);
    assert(stats.used == 0 && stats.sent == stats.received && stats.sent > 4000);
    drop(&ring);
}

static void all_sizes_pass_wherever_the_indices_are(void) {
    for (uint32_t flags = 0; flags <= BOTH; flags++) {
        all_sizes_pass_from(0, flags);
        all_sizes_pass_from(((uint64_t)1 << 32) - 2048, flags);
        all_sizes_pass_from((uint64_t)1 << 63, flags);
        all_sizes_pass_from(-(uint64_t)2048, flags);
    }
}

static void who_attaches_behind_the_end_of_the_numbers_overwrites_nothing(void) {
    ik_ring ring = new_ring(IK_RING_LEAST, 0, 0);
    *word(&ring, TAIL) = *word(&ring, HEAD) = -(uint64_t)128;
    ring = attached(&ring);
    for (int i = 0; i < 2; i++)
        send_filled(&ring, 112, 7); /* the ring is full but for 16 bytes, and the tail is small */
    ik_ring fresh = attached(&ring);
    assert(send(&fresh, bytes, 64, IK_NOW) == -ETIMEDOUT);
    recv_filled(&fresh, 112, 7);
    recv_filled(&fresh, 112, 7);
    assert(ik_ring_recv(&fresh, got, sizeof got, IK_NOW) == -ETIMEDOUT);
    drop(&ring);
}

static void a_full_ring_takes_none_and_loses_none(void) {
    ik_ring ring = new_ring(1024, BOTH, 0);
    uint32_t sent = 0;
    while (send(&ring, &sent, sizeof sent, IK_NOW) == 0)
        sent++;
    assert(sent == 1024 / 16 && stats_of(&ring).used == 1024 && stats_of(&ring).sent == sent);
    assert(send(&ring, "", 0, in(2)) == -ETIMEDOUT);
    for (uint32_t i = 0; i < sent; i++) {
        uint32_t found;
        assert(ik_ring_recv(&ring, &found, sizeof found, IK_NOW) == sizeof found && found == i);
    }
    assert(ik_ring_recv(&ring, got, sizeof got, in(2)) == -ETIMEDOUT);
    drop(&ring);
}

static void messages_are_limited_by_number(void) {
    ik_ring ring = new_ring(4096, BOTH, 3);
    for (int round = 0; round < 1000; round++) {
        for (uint32_t i = 0; i < 3; i++)
            send_filled(&ring, i, i);
        assert(send(&ring, "", 0, IK_NOW) == -ETIMEDOUT);
        for (uint32_t i = 0; i < 3; i++)
            recv_filled(&ring, i, i);
    }
    drop(&ring);
}

static void what_does_not_fit_the_buffer_stays(void) {
    ik_ring ring = new_ring(4096, BOTH, 0);
    send_filled(&ring, 100, 1);
    send_filled(&ring, 3000, 2);
    assert(ik_ring_recv(&ring, got, 99, IK_NOW) == -EMSGSIZE);
    recv_filled(&ring, 100, 1);
    assert(ik_ring_recv(&ring, got, 2999, IK_NOW) == -EMSGSIZE);
    recv_filled(&ring, 3000, 2);
    drop(&ring);
}

static void what_is_not_committed_never_was(void) {
    ik_ring ring = new_ring(4096, BOTH, 0);
    const void *data;
    uint64_t len;
    int rc = 0;
    assert(ik_ring_enter(&ring, IK_RING_SEND, IK_NOW) == 0);
    memcpy(ik_ring_reserve(&ring, 100, &rc), "lost", 4);
    ik_ring_stage(&ring, 4);
    ik_ring_leave(&ring, IK_RING_SEND);
    assert(ik_ring_recv(&ring, got, sizeof got, IK_NOW) == -ETIMEDOUT && !stats_of(&ring).sent);
    send_filled(&ring, 5, 1);
    assert(ik_ring_wait_message(&ring, IK_NOW) == 0);
    assert(ik_ring_look(&ring, &data, &len) == 1 && len == 5);
    ik_ring_step(&ring, len);
    ik_ring_leave(&ring, IK_RING_RECV);
    recv_filled(&ring, 5, 1);
    drop(&ring);
}

static void a_batch_is_one_commit(void) {
    ik_ring ring = new_ring(4096, 0, 0);
    const void *data;
    uint64_t len;
    int rc = 0;
    assert(ik_ring_enter(&ring, IK_RING_SEND, IK_NOW) == 0);
    for (int i = 0; i < 10; i++) {
        *(int *)ik_ring_reserve(&ring, sizeof i, &rc) = i;
        ik_ring_stage(&ring, sizeof i);
        assert(stats_of(&ring).used == 0);
    }
    assert(!ik_ring_reserve(&ring, ring.largest + 1, &rc) && rc == -EMSGSIZE);
    ik_ring_commit(&ring, IK_RING_SEND);
    ik_ring_leave(&ring, IK_RING_SEND);
    assert(stats_of(&ring).sent == 10 && ik_ring_wait_message(&ring, IK_NOW) == 0);
    for (int i = 0; i < 10; i++) {
        assert(ik_ring_look(&ring, &data, &len) == 1 && *(const int *)data == i);
        ik_ring_step(&ring, len);
    }
    assert(ik_ring_look(&ring, &data, &len) == -EAGAIN && stats_of(&ring).received == 0);
    ik_ring_commit(&ring, IK_RING_RECV);
    ik_ring_leave(&ring, IK_RING_RECV);
    assert(stats_of(&ring).received == 10);
    drop(&ring);
}

/* --- closing, entering ----------------------------------------------------------------------- */

static void closing_lets_the_rest_through(void) {
    ik_ring ring = new_ring(4096, BOTH, 0);
    send_filled(&ring, 10, 1);
    send_filled(&ring, 3000, 2);
    ik_ring_shut(&ring, IK_RING_SEND);
    assert(stats_of(&ring).closed[IK_RING_SEND] && !stats_of(&ring).closed[IK_RING_RECV]);
    recv_filled(&ring, 10, 1);
    recv_filled(&ring, 3000, 2);
    assert(ik_ring_recv(&ring, got, sizeof got, IK_FOREVER) == -ENODATA);
    ik_ring_reopen(&ring, IK_RING_SEND);
    assert(ik_ring_recv(&ring, got, sizeof got, IK_NOW) == -ETIMEDOUT);
    ik_ring_shut(&ring, IK_RING_RECV);
    assert(send(&ring, bytes, 10, IK_FOREVER) == -EPIPE);
    assert(send(&ring, bytes, 3000, IK_FOREVER) == -EPIPE);
    drop(&ring);
}

static int receive_until_closed(ik_ring *ring, int argument) {
    (void)argument;
    return ik_ring_recv(ring, got, sizeof got, in(PATIENCE)) != -ENODATA;
}

static int send_until_closed(ik_ring *ring, int len) {
    int rc;
    while ((rc = send(ring, bytes, (uint64_t)len, in(PATIENCE))) == 0)
        continue;
    return rc != -EPIPE;
}

static void closing_wakes_who_sleeps(void) {
    for (uint32_t flags = 0; flags <= BOTH; flags += BOTH) {
        ik_ring ring = new_ring(4096, flags, 0);
        pid_t receiver = forked(receive_until_closed, &ring, 0);
        while (!stats_of(&ring).asleep[IK_RING_RECV])
            usleep(100);
        ik_ring_shut(&ring, IK_RING_SEND);
        reap(receiver);
        ik_ring_reopen(&ring, IK_RING_SEND);
        for (int len = 100; len <= 10000; len += 9900) {
            pid_t sender = forked(send_until_closed, &ring, len);
            while (!stats_of(&ring).asleep[IK_RING_SEND])
                usleep(100);
            ik_ring_shut(&ring, IK_RING_RECV);
            reap(sender);
            ik_ring_reopen(&ring, IK_RING_RECV);
        }
        drop(&ring);
    }
}

static void *shut_and_reopen(void *argument) {
    for (ik_ring other = attached(argument); !stats_of(&other).closed[IK_RING_SEND];) {
        ik_ring_shut(&other, IK_RING_RECV);
        ik_ring_reopen(&other, IK_RING_RECV);
    }
    return NULL;
}

static void the_end_may_be_shut_while_something_is_sent(void) {
    ik_ring ring = new_ring(4096, 0, 0);
    pthread_t thread;
    int changes = 0, last = 0;
    assert(pthread_create(&thread, NULL, shut_and_reopen, &ring) == 0);
    /* Until it was often open and shut in turn: on a loaded machine the two seldom run at once. */
    for (int64_t end = in(500); changes == 0 || (changes < 3000 && ik_wait_now() < end);) {
        int rc = send(&ring, "message", 7, IK_NOW);
        assert(rc == 0 || rc == -EPIPE || rc == -ETIMEDOUT);
        changes += rc != last;
        last = rc;
        ik_ring_recv(&ring, got, sizeof got, IK_NOW);
    }
    ik_ring_shut(&ring, IK_RING_SEND);
    pthread_join(thread, NULL);
    drop(&ring);
}

static void who_is_inside_does_not_enter_again(void) {
    for (uint32_t flags = 0; flags <= BOTH; flags += BOTH) {
        ik_ring ring = new_ring(4096, flags, 0);
        for (int side = 0; side < 2; side++) {
            assert(ik_ring_enter(&ring, side, IK_NOW) == 0);
            assert(ik_ring_enter(&ring, side, IK_FOREVER) == -EDEADLK);
            ik_ring_leave(&ring, side);
        }
        drop(&ring);
    }
}

static enum {
    OUT,
    INSIDE,
    LEAVE
} stay; /* of who stays inside the sending end until told to leave */

static void *stay_inside(void *argument) {
    ik_ring *ring = argument;
    assert(ik_ring_enter(ring, IK_RING_SEND, IK_FOREVER) == 0);
    __atomic_store_n(&stay, INSIDE, __ATOMIC_RELEASE);
    while (__atomic_load_n(&stay, __ATOMIC_ACQUIRE) != LEAVE)
        usleep(100);
    ik_ring_leave(ring, IK_RING_SEND);
    return NULL;
}

static int enter_after_fork(ik_ring *ring, int flags) {
    int rc = ik_ring_enter(ring, IK_RING_SEND, in(PATIENCE));
    if (rc == -EINTR) /* a slice: with a lock the thread of the parent lives, and is waited for */
        rc = flags ? 0 : -1;
    return rc != 0;
}

static void a_thread_of_the_parent_that_was_inside_is_not_waited_for(void) {
    for (uint32_t flags = 0; flags <= BOTH; flags += BOTH) {
        ik_ring ring = new_ring(4096, flags, 0);
        pthread_t thread;
        stay = OUT;
        assert(pthread_create(&thread, NULL, stay_inside, &ring) == 0);
        while (__atomic_load_n(&stay, __ATOMIC_ACQUIRE) != INSIDE)
            usleep(10);
        assert(ik_ring_enter(&ring, IK_RING_SEND, IK_NOW) == -ETIMEDOUT);
        reap(forked(enter_after_fork, &ring, (int)flags));
        __atomic_store_n(&stay, LEAVE, __ATOMIC_RELEASE);
        pthread_join(thread, NULL);
        assert(ik_ring_enter(&ring, IK_RING_SEND, in(PATIENCE)) == 0);
        ik_ring_leave(&ring, IK_RING_SEND);
        drop(&ring);
    }
}

static int die_inside(ik_ring *ring, int side) {
    return ik_ring_enter(ring, side, IK_NOW); /* and ends with the lock */
}

static void a_death_inside_is_counted(void) {
    ik_ring ring = new_ring(4096, BOTH, 0);
    for (int side = 0; side < 2; side++) {
        reap(forked(die_inside, &ring, side));
        assert(stats_of(&ring).holder[side] == 0 && stats_of(&ring).recoveries[side] == 0);
        for (int again = 0; again < 2; again++) {
            assert(ik_ring_enter(&ring, side, IK_NOW) == 0);
            ik_ring_leave(&ring, side);
        }
        assert(stats_of(&ring).recoveries[side] == 1);
    }
    drop(&ring);
}

/* --- long messages --------------------------------------------------------------------------- */

static int send_sizes(ik_ring *ring, int count) {
    for (int i = 0; i < count; i++) {
        uint64_t len = (uint64_t)i * 977 % 20000;
        fill(bytes, len, (uint32_t)i);
        if (send(ring, bytes, len, in(PATIENCE)) != 0)
            return 1;
    }
    return 0;
}

static void long_and_short_pass_between_processes(void) {
    for (uint32_t flags = 0; flags <= BOTH; flags++) {
        ik_ring ring = new_ring(4096, flags, flags == BOTH ? 2 : 0);
        pid_t sender = forked(send_sizes, &ring, 400);
        for (uint32_t i = 0; i < 400; i++) {
            int64_t len = ik_ring_recv(&ring, got, sizeof got, in(PATIENCE));
            assert(len == (int64_t)i * 977 % 20000 && is_filled(got, (uint64_t)len, i));
        }
        reap(sender);
        assert(stats_of(&ring).received == 400 && stats_of(&ring).sent == 400);
        drop(&ring);
    }
}

/* Go on with a long message until it needs the other side; it does, in one thread. */
static void send_until_stuck(ik_ring *ring, ik_ring_progress *progress, uint64_t len) {
    assert(ik_ring_send(ring, progress, bytes, len, IK_FOREVER) == -EINTR && progress->inside);
}

static int send_on(ik_ring *ring, ik_ring_progress *progress, uint64_t len) {
    return ik_ring_send(ring, progress, bytes, len, IK_FOREVER);
}

static void recv_until_stuck(ik_ring *ring, ik_ring_progress *progress, uint64_t len) {
    const void *data;
    uint64_t found;
    if (!progress->inside) {
        assert(ik_ring_wait_message(ring, IK_NOW) == 0);
        assert(ik_ring_look(ring, &data, &found) == 0 && found == len);
    }
    assert(ik_ring_recv_stream(ring, progress, got, len, IK_FOREVER) == -EINTR);
}

static void a_sender_that_runs_out_of_time_has_sent_nothing(void) {
    ik_ring ring = new_ring(4096, BOTH, 0);
    fill(bytes, 10000, 1);
    assert(send(&ring, bytes, 10000, in(5)) == -ETIMEDOUT);
    assert(ik_ring_recv(&ring, got, sizeof got, in(5)) == -ETIMEDOUT);
    assert(stats_of(&ring).used == 0 && stats_of(&ring).sent == 0);
    send_filled(&ring, 10, 2);
    recv_filled(&ring, 10, 2);
    drop(&ring);
}

static void a_sender_gives_up_in_the_middle(void) {
    ik_ring ring = new_ring(4096, BOTH, 0), other = attached(&ring);
    ik_ring_progress sending = {0}, receiving = {0};
    send_until_stuck(&ring, &sending, 10000);
    recv_until_stuck(&other, &receiving, 10000);
    ik_ring_give_up(&ring, IK_RING_SEND, &sending);
    assert(ik_ring_recv_stream(&other, &receiving, got, 10000, IK_FOREVER) == -ECONNABORTED);
    send_filled(&ring, 10, 2);
    recv_filled(&other, 10, 2);
    assert(stats_of(&ring).sent == 1 && stats_of(&ring).received == 1);
    drop(&ring);
}

/* Everything is in the ring, but a receiver is in the middle of it, and may die there. */
static void a_sender_waits_for_who_has_begun_to_receive(void) {
    for (int gives_up = 0; gives_up < 2; gives_up++) {
        ik_ring ring = new_ring(4096, BOTH, 0), other = attached(&ring);
        ik_ring_progress sending = {0}, receiving = {0};
        fill(bytes, 5000, 4);
        send_until_stuck(&ring, &sending, 5000);
        recv_until_stuck(&other, &receiving, 5000);
        send_until_stuck(&ring, &sending, 5000);
        assert(sending.done == 5000);
        if (gives_up) {
            assert(ik_ring_give_up(&ring, IK_RING_SEND, &sending) == 0);
            assert(ik_ring_recv_stream(&other, &receiving, got, 5000, IK_NOW) == -ECONNABORTED);
        } else {
            assert(ik_ring_recv_stream(&other, &receiving, got, 5000, IK_NOW) == 0);
            assert(is_filled(got, 5000, 4));
            assert(ik_ring_give_up(&ring, IK_RING_SEND, &sending) == 1); /* too late */
        }
        assert(stats_of(&ring).sent == stats_of(&ring).received && stats_of(&ring).used == 0);
        drop(&ring);
    }
}

/* After a receiver that left in the middle the next one gets all of it. */
static void a_long_message_is_sent_again(bool timed_out) {
    ik_ring ring = new_ring(4096, 0, 0), first = attached(&ring), second = attached(&ring);
    ik_ring_progress sending = {0}, receiving = {0};
    fill(bytes, 10000, 3);
    send_until_stuck(&ring, &sending, 10000);
    recv_until_stuck(&first, &receiving, 10000);
    if (timed_out)
        assert(ik_ring_recv_stream(&first, &receiving, got, 10000, in(1)) == -ETIMEDOUT);
    else
        ik_ring_give_up(&first, IK_RING_RECV, &receiving);
    receiving = (ik_ring_progress){0};
    send_until_stuck(&ring, &sending, 10000);
    recv_until_stuck(&second, &receiving, 10000);
    int rc = -EINTR;
    for (int i = 0; i < 10 && rc == -EINTR; i++) {
        send_until_stuck(&ring, &sending, 10000);
        rc = ik_ring_recv_stream(&second, &receiving, got, 10000, IK_FOREVER);
    }
    assert(rc == 0 && send_on(&ring, &sending, 10000) == 0);
    assert(is_filled(got, 10000, 3) && stats_of(&ring).sent == 1 && stats_of(&ring).received == 1);
    assert(stats_of(&ring).used == 0);
    drop(&ring);
}

static void after_a_receiver_a_long_message_is_sent_again(void) {
    a_long_message_is_sent_again(false);
    a_long_message_is_sent_again(true);
}

static void what_was_staged_before_a_long_message_counts(void) {
    ik_ring ring = new_ring(4096, BOTH, 0);
    ik_ring_progress progress = {0};
    const void *data;
    uint64_t len;
    send_filled(&ring, 10, 1);
    send_filled(&ring, 20, 2);
    send_filled(&ring, 3000, 3);
    assert(ik_ring_wait_message(&ring, IK_NOW) == 0);
    for (int i = 0; i < 2; i++) {
        assert(ik_ring_look(&ring, &data, &len) == 1);
        ik_ring_step(&ring, len);
    }
    assert(ik_ring_look(&ring, &data, &len) == 0 && len == 3000);
    assert(ik_ring_recv_stream(&ring, &progress, got, len, IK_NOW) == 0);
    assert(is_filled(got, 3000, 3) && stats_of(&ring).received == 3);
    drop(&ring);
}

static int send_endlessly(ik_ring *ring, int len) {
    return send(ring, bytes, (uint64_t)len, in(PATIENCE)) == -ETIMEDOUT;
}

/* The peer keeps up, so nobody ever waits. The deadline is over from the start. */
static void a_deadline_counts_also_while_data_flows(void) {
    static unsigned char huge[64 << 20];
    ik_ring ring = new_ring(4096, BOTH, 0);
    pid_t sender = forked(send_endlessly, &ring, sizeof bytes);
    while (stats_of(&ring).used < 3000)
        usleep(100);
    assert(ik_ring_recv(&ring, huge, sizeof huge, ik_wait_now() - 1) == -ETIMEDOUT);
    assert(ik_ring_recv(&ring, huge, sizeof huge, in(PATIENCE)) == sizeof bytes);
    reap(sender);
    ik_ring roomy = new_ring(1 << 20, 0, 0);
    assert(send(&roomy, huge, 1000000, ik_wait_now() - 1) == -ETIMEDOUT);
    drop(&roomy);
    drop(&ring);
}

/* --- bells ----------------------------------------------------------------------------------- */

static bool rings(int bell) {
    struct pollfd one = {.fd = bell, .events = POLLIN};
    return poll(&one, 1, 0) == 1;
}

static void a_bell_rings_only_for_who_listens(void) {
    ik_ring ring = new_ring(1024, BOTH, 0);
    for (int side = 0; side < 2; side++)
        assert((ring.ends[side].bell = eventfd(0, EFD_NONBLOCK)) >= 0);
    int to_receive = ring.ends[IK_RING_RECV].bell, to_send = ring.ends[IK_RING_SEND].bell;
    send_filled(&ring, 10, 1);
    assert(!rings(to_receive) && ik_ring_listen(&ring, IK_RING_RECV) == 1 && rings(to_receive));
    recv_filled(&ring, 10, 1);
    assert(ik_ring_listen(&ring, IK_RING_RECV) == 0 && !rings(to_receive));
    send_filled(&ring, 10, 1);
    assert(rings(to_receive));
    assert(ik_ring_listen(&ring, IK_RING_SEND) == 0 && !rings(to_send));
    recv_filled(&ring, 10, 1);
    assert(rings(to_send) && ik_ring_listen(&ring, IK_RING_SEND) == 1);
    assert(ik_ring_listen(&ring, IK_RING_RECV) == 0);
    ik_ring_shut(&ring, IK_RING_SEND);
    assert(rings(to_receive) && ik_ring_listen(&ring, IK_RING_RECV) == 1);
    close(to_receive);
    close(to_send);
    drop(&ring);
}

static void who_sleeps_in_poll_is_woken_and_sees_the_end(void) {
    ik_ring ring = new_ring(4096, 0, 0);
    int lives[2];
    assert(pipe(lives) == 0);
    ring.life = lives[0];
    for (int side = 0; side < 2; side++)
        assert((ring.ends[side].bell = eventfd(0, EFD_NONBLOCK)) >= 0);
    pid_t sender = forked(send_sizes, &ring, 50);
    close(lives[1]);
    for (uint32_t i = 0; i < 50; i++)
        assert(ik_ring_recv(&ring, got, sizeof got, in(PATIENCE)) == (int64_t)i * 977 % 20000);
    assert(ik_ring_recv(&ring, got, sizeof got, in(PATIENCE)) == -ECONNRESET);
    reap(sender);
    close(lives[0]);
    for (int side = 0; side < 2; side++)
        close(ring.ends[side].bell);
    drop(&ring);
}

/* --- memory that is not as it should be ------------------------------------------------------ */

/* Every byte of the header, flipped in each bit: what attaches can be used. */
static void attaching_to_a_spoilt_header_is_refused_or_works(void) {
    uint64_t size = IK_RING_HEADER + 1024;
    int refused = 0;
    for (uint64_t bit = 0; bit < 8 * (uint64_t)LOCKS; bit++) {
        ik_ring ring = new_ring(1024, 0, 0), spoilt;
        ((unsigned char *)ring.shared)[bit / 8] ^= (unsigned char)(1 << bit % 8);
        int rc = ik_ring_attach(&spoilt, ring.shared, size);
        assert(rc == 0 || rc == -EBADMSG);
        refused += rc < 0;
        if (rc == 0 && spoilt.flags == 0) {
            send(&spoilt, bytes, 10, IK_NOW);
            ik_ring_recv(&spoilt, got, sizeof got, IK_NOW);
        }
        drop(&ring);
    }
    assert(refused >= 64 + 63); /* all of the magic, all but the right capacity */
}

static void attaching_checks_what_it_is_given(void) {
    ik_ring ring = new_ring(1024, 0, 0), other;
    char *memory = (char *)ring.shared;
    assert(ik_ring_attach(&other, memory, 0) == -EBADMSG);
    assert(ik_ring_attach(&other, memory, IK_RING_HEADER + 512) == -EBADMSG);
    assert(ik_ring_attach(&other, memory + 8, IK_RING_HEADER + 1016) == -EBADMSG);
    *word(&ring, CAPACITY) = 1000;
    assert(ik_ring_attach(&other, memory, IK_RING_HEADER + 1024) == -EBADMSG);
    assert(ik_ring_create(memory, IK_RING_HEADER, 0, 0) == -EINVAL);
    memset(memory, 0, 8);
    assert(ik_ring_attach(&other, memory, IK_RING_HEADER + 1024) == -EAGAIN);
    drop(&ring);
}

/* A ring whose receivers find these words at the head, and this much of them. */
static int64_t received_from(const uint64_t *words, int count, uint64_t used) {
    ik_ring ring = new_ring(256, 0, 0);
    memcpy(ring.data, words, (size_t)count * sizeof *words);
    *word(&ring, TAIL) = used;
    int64_t rc = ik_ring_recv(&ring, got, sizeof got, in(50));
    drop(&ring);
    return rc;
}

static uint64_t record(uint64_t kind, uint64_t len) {
    return len | kind << 40;
}

static void spoilt_records_are_refused(void) {
    enum { WHOLE = 1, GAP, FIRST, MORE, LAST };
    uint64_t beyond = record(WHOLE, 100), unknown = record(9, 0), none = 0;
    assert(received_from(&beyond, 1, 16) == -EBADMSG);
    assert(received_from(&unknown, 1, 16) == -EBADMSG);
    assert(received_from(&none, 1, 16) == -EBADMSG);
    assert(received_from(&none, 1, 12) == -EBADMSG);
    assert(received_from(&none, 1, 512) == -EBADMSG);
    uint64_t gap[] = {record(GAP, 248)}, gaps[] = {record(GAP, 0), record(GAP, 0)};
    assert(received_from(gap, 1, 256) == -EBADMSG);
    assert(received_from(gaps, 2, 16) == -EBADMSG);
    uint64_t short_gap[] = {record(GAP, 0), record(WHOLE, 0)};
    assert(received_from(short_gap, 2, 16) == -EBADMSG);
    uint64_t small[] = {record(FIRST, 16), 100, 0}, bare[] = {record(FIRST, 8), 1000};
    assert(received_from(small, 3, 24) == -EBADMSG);
    assert(received_from(bare, 2, 16) == -EBADMSG);
    uint64_t empty[] = {record(FIRST, 16), 1000, 0, record(MORE, 0)};
    assert(received_from(empty, 4, 32) == -EBADMSG);
    uint64_t more[] = {record(FIRST, 16), 1000, 0, record(LAST, 8), 0};
    assert(received_from(more, 5, 40) == -EBADMSG);
}

/* A bad index is refused each time it is looked at, and by an end that knew a good one before. */
static void a_spoilt_index_is_refused_again_and_again(void) {
    ik_ring ring = new_ring(256, 0, 0);
    send_filled(&ring, 0, 0);
    send_filled(&ring, 0, 0);
    assert(ik_ring_recv(&ring, got, sizeof got, in(50)) ==
           0); /* so the end knows the other's index */
    for (int i = 2; i < 32; i++)
        ((uint64_t *)ring.data)[i] = record(2, 0); /* gaps, as many as there are */
    *word(&ring, TAIL) = (uint64_t)1 << 62;
    for (int i = 0; i < 3; i++) {
        *word(&ring, HEAD) = (uint64_t)1 << 61;
        assert(ik_ring_recv(&ring, got, sizeof got, in(50)) == -EBADMSG);
        assert(send(&ring, bytes, 8, in(50)) == -EBADMSG);
    }
    for (int i = 0; i < 32; i++)
        ((uint64_t *)ring.data)[i] = record(1, 0); /* whole ones */
    *word(&ring, HEAD) = -((uint64_t)1 << 40);
    assert(ik_ring_recv(&ring, got, sizeof got, in(50)) == -EBADMSG);
    *word(&ring, HEAD) = 4;
    assert(ik_ring_recv(&ring, got, sizeof got, in(50)) == -EBADMSG);
    drop(&ring);
}

/* --- waking ----------------------------------------------------------------------------------- */

enum { WAKES = 20 };

static int receive_wakes(ik_ring *ring, int argument) {
    (void)argument;
    for (int i = 0; i < WAKES; i++)
        if (ik_ring_recv(ring, got, sizeof got, in(PATIENCE)) < 0)
            return 1;
    return 0;
}

/* How many of the sleepers were woken before half of their slice was over, of 25 ms at least. */
static int woken_early(uint32_t flags) {
    ik_ring ring = new_ring(4096, flags, 0);
    pid_t receiver = forked(receive_wakes, &ring, 0);
    int early = 0;
    for (uint32_t i = 0; i < WAKES; i++) {
        while (!stats_of(&ring).asleep[IK_RING_RECV])
            usleep(50);
        usleep(200); /* it has announced; now it falls asleep */
        int64_t begun = ik_wait_now();
        send_filled(&ring, 8, i);
        while (stats_of(&ring).received <= i)
            usleep(50);
        early += ik_wait_now() - begun < IK_SLICE / 4;
    }
    reap(receiver);
    drop(&ring);
    return early;
}

/* And not by the end of its slice. A loaded machine may have any number of tries. */
static void who_sleeps_is_woken_by_a_commit(void) {
    for (uint32_t flags = 0; flags <= BOTH; flags += BOTH)
        while (woken_early(flags) <= WAKES / 2)
            continue;
}

/* --- many at once ---------------------------------------------------------------------------- */

enum { SENDERS = 3, RECEIVERS = 3, EACH = 3000 };

typedef struct many {
    ik_ring ring;
    bool seen[SENDERS][EACH];
    uint32_t received;
} many;

static void send_numbers(ik_ring *ring, int who) {
    uint32_t message[200];
    for (uint32_t i = 0; i < EACH; i++) {
        uint64_t len = 8 + i * 7 % 792;
        fill((unsigned char *)message, len, i);
        message[0] = (uint32_t)who;
        message[1] = i;
        assert(send(ring, message, len, in(PATIENCE)) == 0);
    }
}

static void receive_numbers(ik_ring *ring, many *all) {
    uint32_t message[200], last[SENDERS] = {0};
    while (__atomic_load_n(&all->received, __ATOMIC_RELAXED) < SENDERS * EACH) {
        int64_t len = ik_ring_recv(ring, message, sizeof message, in(20));
        if (len == -ETIMEDOUT)
            continue;
        uint32_t who = message[0], number = message[1];
        assert(who < SENDERS && number < EACH && number >= last[who]);
        assert(len == 8 + number * 7 % 792 && !all->seen[who][number]);
        all->seen[who][number] = true;
        last[who] = number;
        __atomic_fetch_add(&all->received, 1, __ATOMIC_RELAXED);
    }
}

static many *all; /* of the processes or threads of one test */
static ik_ring *threads_ring;

static void *send_in_thread(void *argument) {
    send_numbers(threads_ring, (int)(intptr_t)argument);
    return NULL;
}

static void *receive_in_thread(void *argument) {
    (void)argument;
    receive_numbers(threads_ring, all);
    return NULL;
}

static void threads_send_and_receive(uint32_t flags) {
    pthread_t threads[SENDERS + RECEIVERS];
    ik_ring ring = new_ring(1024, flags, 0);
    threads_ring = &ring;
    all = map(sizeof *all);
    for (intptr_t i = 0; i < SENDERS + RECEIVERS; i++)
        assert(pthread_create(&threads[i], NULL, i < SENDERS ? send_in_thread : receive_in_thread,
                              (void *)i) == 0);
    for (int i = 0; i < SENDERS + RECEIVERS; i++)
        pthread_join(threads[i], NULL);
    assert(all->received == SENDERS * EACH);
    munmap(all, sizeof *all);
    drop(&ring);
}

static void threads_take_turns(void) {
    threads_send_and_receive(0);
    threads_send_and_receive(BOTH);
}

static int send_in_process(ik_ring *ring, int who) {
    ik_ring own = attached(ring);
    send_numbers(&own, who);
    return 0;
}

static int receive_in_process(ik_ring *ring, int who) {
    (void)who;
    ik_ring own = attached(ring);
    receive_numbers(&own, all);
    return 0;
}

static void processes_share_a_locked_ring(void) {
    pid_t pids[SENDERS + RECEIVERS];
    ik_ring ring = new_ring(1024, BOTH, 5);
    all = map(sizeof *all);
    for (int i = 0; i < SENDERS + RECEIVERS; i++)
        pids[i] = forked(i < SENDERS ? send_in_process : receive_in_process, &ring, i);
    for (int i = 0; i < SENDERS + RECEIVERS; i++)
        reap(pids[i]);
    ik_ring_stats stats = stats_of(&ring);
    /* A long message whose time ran out at its last piece is counted on both sides. */
    assert(all->received == SENDERS * EACH && stats.received >= SENDERS * EACH);
    assert(stats.sent == stats.received && stats.used == 0);
    munmap(all, sizeof *all);
    drop(&ring);
}

int main(int argc, char **argv) {
    struct {
        const char *name;
        void (*run)(void);
        bool wanted;
    } tests[] = {
#define TEST(name) {#name, name, true}
#define ROBUST(name) {#name, name, has("robust futexes", robust_futexes())}
        TEST(all_sizes_pass_wherever_the_indices_are),
        TEST(who_attaches_behind_the_end_of_the_numbers_overwrites_nothing),
        TEST(a_full_ring_takes_none_and_loses_none),
        TEST(messages_are_limited_by_number),
        TEST(what_does_not_fit_the_buffer_stays),
        TEST(what_is_not_committed_never_was),
        TEST(a_batch_is_one_commit),
        TEST(closing_lets_the_rest_through),
        TEST(closing_wakes_who_sleeps),
        TEST(the_end_may_be_shut_while_something_is_sent),
        TEST(who_is_inside_does_not_enter_again),
        TEST(a_thread_of_the_parent_that_was_inside_is_not_waited_for),
        ROBUST(a_death_inside_is_counted),
        TEST(long_and_short_pass_between_processes),
        TEST(a_sender_that_runs_out_of_time_has_sent_nothing),
        TEST(a_sender_gives_up_in_the_middle),
        TEST(a_sender_waits_for_who_has_begun_to_receive),
        TEST(after_a_receiver_a_long_message_is_sent_again),
        TEST(what_was_staged_before_a_long_message_counts),
        TEST(a_deadline_counts_also_while_data_flows),
        TEST(a_bell_rings_only_for_who_listens),
        TEST(who_sleeps_in_poll_is_woken_and_sees_the_end),
        TEST(attaching_to_a_spoilt_header_is_refused_or_works),
        TEST(attaching_checks_what_it_is_given),
        TEST(spoilt_records_are_refused),
        TEST(a_spoilt_index_is_refused_again_and_again),
        TEST(who_sleeps_is_woken_by_a_commit),
        TEST(threads_take_turns),
        TEST(processes_share_a_locked_ring),
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (!tests[i].wanted || (argc > 1 && !strstr(tests[i].name, argv[1])))
            continue;
        int64_t begun = ik_wait_now();
        alarm(600); /* a guard against a hang */
        tests[i].run();
        if (getenv("IK_TIMES"))
            printf("%5d ms %s\n", (int)((ik_wait_now() - begun) / MILLISECOND), tests[i].name);
    }
    return 0;
}

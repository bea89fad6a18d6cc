/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/msg.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"
#include "sysv_queue.h"
#include "wait.h"

enum { ROOM = 64, MILLISECOND = 1000000 };

static int made; /* the id of the queue of this test */

static int new_id(void) {
    made = ik_sysv_queue_get(IPC_PRIVATE, 1, 1, 0600);
    assert(made >= 0);
    return made;
}

static ik_sysv_message *new_message(ik_sysv_queue *queue) {
    ik_sysv_message *m = calloc(1, sizeof *m + ROOM);
    m->queue = queue;
    m->room = ROOM;
    return m;
}

static void drop(ik_sysv_queue *queue, ik_sysv_message *m) {
    assert(ik_sysv_queue_remove(made) == 0);
    ik_sysv_queue_free(queue);
    free(m);
}

enum { PATIENCE = 120000 }; /* milliseconds, however busy the machine is */

static int readable(const ik_sysv_helper *helper, int timeout) {
    struct pollfd one = {.fd = ik_sysv_helper_fileno(helper), .events = POLLIN};
    return poll(&one, 1, timeout);
}

static int handlers(void) {
    int count = 0;
    struct sigaction now;
    for (int number = SIGRTMIN; number <= SIGRTMAX; number++)
        count += sigaction(number, NULL, &now) == 0 && now.sa_handler != SIG_DFL;
    return count;
}

static void a_receive_ends_at_its_deadline(void) {
    ik_sysv_queue *queue = ik_sysv_queue_new(new_id());
    ik_sysv_message *m = new_message(queue);
    for (int i = 0; i < 50; i++) {
        int64_t until = ik_wait_now() + i * MILLISECOND / 10;
        assert(ik_sysv_queue_recv(m, 0, 0, until) == -ETIMEDOUT && ik_wait_now() >= until);
    }
    assert(ik_sysv_queue_recv(m, 0, 0, IK_NOW) == -ETIMEDOUT);
    assert(ik_sysv_queue_send(queue, "hello", 5, 7, IK_NOW) == 0);
    assert(ik_sysv_queue_recv(m, 0, 0, IK_FOREVER) == 5 && m->type == 7 &&
           !memcmp(m->text, "hello", 5));
    assert(handlers() == 0);
    drop(queue, m);
}

/* --- threads that wait with and without deadlines while others send and close ---------------- */

typedef struct waiting {
    ik_sysv_queue *queue;
    int64_t within; /* nanoseconds, or IK_FOREVER */
    int64_t result;
} waiting;

static void *receive(void *argument) {
    waiting *w = argument;
    ik_sysv_message *m = new_message(w->queue);
    int64_t until = w->within == IK_FOREVER ? IK_FOREVER : ik_wait_now() + w->within;
    w->result = ik_sysv_queue_recv(m, 5, 0, until);
    free(m);
    return NULL;
}

static void a_close_at_any_moment_ends_every_wait(void) {
    enum { THREADS = 6, ROUNDS = 200 };
    int id = new_id();
    for (int round = 0; round < ROUNDS; round++) {
        ik_sysv_queue *queue = ik_sysv_queue_new(id);
        int error;
        ik_sysv_helper *watch = ik_sysv_queue_watch(queue, 3, 0, &error);
        assert(watch);
        pthread_t threads[THREADS];
        waiting w[THREADS];
        for (int i = 0; i < THREADS; i++) {
            w[i] = (waiting){queue, i % 2 ? (int64_t)round * MILLISECOND / 100 : IK_FOREVER, 0};
            assert(pthread_create(&threads[i], NULL, receive, &w[i]) == 0);
        }
        while (ik_wait_now() % MILLISECOND > MILLISECOND / 2)
            ;
        ik_sysv_queue_close(queue);
        assert(readable(watch, PATIENCE) == 1);
        for (int i = 0; i < THREADS; i++) {
            pthread_join(threads[i], NULL);
            assert(w[i].result == -EBADF || (i % 2 && w[i].result == -ETIMEDOUT));
        }
        assert(ik_sysv_helper_stop(watch) == -EBADF);
        ik_sysv_queue_free(queue); /* the watch still has it */
        ik_sysv_helper_free(watch);
        assert(handlers() == 0);
    }
    drop(ik_sysv_queue_new(id), NULL);
}

static void a_watch_takes_nothing_but_empty_messages(void) {
    ik_sysv_queue *queue = ik_sysv_queue_new(new_id());
    ik_sysv_message *m = new_message(queue);
    int error;
    ik_sysv_helper *watch = ik_sysv_queue_watch(queue, -4, 0, &error);
    assert(ik_sysv_queue_send(queue, "x", 1, 5, IK_NOW) == 0 && readable(watch, 20) == 0);
    assert(ik_sysv_queue_send(queue, "y", 1, 4, IK_NOW) == 0 && readable(watch, PATIENCE) == 1);
    assert(ik_sysv_queue_recv(m, 4, 0, IK_NOW) == 1 && readable(watch, 0) == 0);
    assert(ik_sysv_queue_send(queue, "", 0, 2, IK_NOW) == 0 && readable(watch, PATIENCE) == 1);
    assert(ik_sysv_queue_recv(m, -4, 0, IK_NOW) == 0 && m->type == 2 && readable(watch, 0) == 0);
    assert(ik_sysv_queue_recv(m, 0, 0, IK_NOW) == 1 && m->type == 5);
    assert(ik_sysv_helper_stop(watch) == -EINTR);
    ik_sysv_helper_free(watch);
    drop(queue, m);
    assert(handlers() == 0);
}

static void a_sender_tells_whether_it_sent(void) {
    ik_sysv_queue *queue = ik_sysv_queue_new(new_id());
    ik_sysv_message *m = new_message(queue);
    int error;
    assert(ik_sysv_queue_set(queue, 3, -1, -1, -1) == 0);
    assert(ik_sysv_queue_send(queue, "four", 4, 1, IK_FOREVER) == -EMSGSIZE);
    assert(ik_sysv_queue_send(queue, "abc", 3, 1, IK_FOREVER) == 0);
    ik_sysv_helper *sender = ik_sysv_queue_sender(queue, "de", 2, 9, &error);
    assert(readable(sender, 20) == 0 && ik_sysv_helper_stop(sender) == -EINTR);
    ik_sysv_helper_free(sender);
    sender = ik_sysv_queue_sender(queue, "de", 2, 9, &error);
    assert(ik_sysv_queue_recv(m, 0, 0, IK_NOW) == 3 && readable(sender, PATIENCE) == 1);
    assert(ik_sysv_helper_stop(sender) == 0);
    ik_sysv_helper_free(sender);
    assert(ik_sysv_queue_recv(m, 9, 0, IK_NOW) == 2);
    drop(queue, m);
}

static void a_fork_child_has_nothing_of_the_watch(void) {
    ik_sysv_queue *queue = ik_sysv_queue_new(new_id());
    ik_sysv_message *m = new_message(queue);
    int error;
    ik_sysv_helper *watch = ik_sysv_queue_watch(queue, 0, 0, &error);
    assert(ik_sysv_queue_send(queue, "", 0, 2, IK_NOW) == 0 && readable(watch, PATIENCE) == 1);
    pid_t child = fork();
    if (child == 0) {
        assert(handlers() == 0 && ik_sysv_helper_fileno(watch) == -1);
        assert(ik_sysv_queue_recv(m, 0, 0, IK_NOW) == -ETIMEDOUT); /* the parent holds it */
        ik_sysv_helper_free(watch);
        ik_sysv_queue_free(queue);
        _exit(0);
    }
    int status;
    assert(waitpid(child, &status, 0) == child && status == 0);
    assert(ik_sysv_queue_recv(m, 0, 0, IK_NOW) == 0 && m->type == 2);
    ik_sysv_helper_free(watch);
    drop(queue, m);
}

/* That a timer can send the highest signal to one thread. */
static bool timers_of_threads(void) {
    int id;
    struct sigevent to_me = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMAX};
    to_me._sigev_un._tid = gettid();
    if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &to_me, &id) < 0)
        return false;
    return syscall(SYS_timer_delete, id) == 0;
}

int main(void) {
    if (!has("a timer for each thread", timers_of_threads()))
        return 77;
    a_receive_ends_at_its_deadline();
    a_close_at_any_moment_ends_every_wait();
    a_watch_takes_nothing_but_empty_messages();
    a_sender_tells_whether_it_sent();
    a_fork_child_has_nothing_of_the_watch();
    return 0;
}

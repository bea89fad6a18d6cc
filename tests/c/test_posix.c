/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <mqueue.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "posix.h"
#include "wait.h"

static char name[64];

static ik_posix_queue new_queue(long size) {
    struct mq_attr attr = {.mq_maxmsg = 3, .mq_msgsize = size};
    ik_posix_queue queue;
    int fd = mq_open(name, O_CREAT | O_EXCL | O_RDWR, 0600, &attr);
    assert(fd >= 0 && mq_unlink(name) == 0);
    assert(ik_posix_queue_adopt(&queue, fd) == 0);
    assert(queue.max_message == (size_t)size && queue.max_messages == 3);
    return queue;
}

static void what_is_no_queue_is_refused(void) {
    ik_posix_queue queue;
    int fd = open("/dev/null", O_RDWR);
    assert(ik_posix_queue_adopt(&queue, fd) == -EBADF);
    assert(close(fd) == 0);
}

static void *receive(void *argument) {
    ik_posix_message *message = malloc(sizeof *message + 8);
    int64_t rc = ik_posix_queue_receive(argument, message, IK_FOREVER);
    free(message);
    return (void *)(intptr_t)rc;
}

static void wait_until_inside(const ik_posix_queue *queue, int count) {
    while (__atomic_load_n(&queue->state, __ATOMIC_SEQ_CST) < count)
        usleep(100);
}

static void close_ends_the_calls_inside_and_the_last_takes_the_descriptor(void) {
    for (int round = 0; round < 200; round++) {
        ik_posix_queue queue = new_queue(8);
        pthread_t thread[4];
        for (int i = 0; i < 4; i++)
            assert(pthread_create(&thread[i], NULL, receive, &queue) == 0);
        if (round % 2)
            wait_until_inside(&queue, 4);
        int fd = queue.fd;
        ik_posix_queue_close(&queue);
        for (int i = 0; i < 4; i++) {
            void *rc;
            assert(pthread_join(thread[i], &rc) == 0 && (intptr_t)rc == -EBADF);
        }
        assert(queue.fd == -1 && queue.wake == -1 && fcntl(fd, F_GETFD) < 0);
        assert(ik_posix_queue_send(&queue, "x", 1, 0, IK_NOW) == -EBADF);
        ik_posix_queue_close(&queue);
    }
}

static void who_holds_it_has_it_beyond_close(void) {
    ik_posix_queue queue = new_queue(8);
    int wake = ik_posix_queue_enter(&queue);
    struct pollfd rung = {.fd = wake, .events = POLLIN};
    assert(wake >= 0 && poll(&rung, 1, 0) == 0);
    ik_posix_queue_close(&queue);
    assert(poll(&rung, 1, 0) == 1 && fcntl(queue.fd, F_GETFD) >= 0);
    assert(ik_posix_queue_enter(&queue) == -EBADF);
    ik_posix_queue_leave(&queue);
    assert(fcntl(wake, F_GETFD) < 0);
}

static void a_child_has_nobody_inside(void) {
    ik_posix_queue queue = new_queue(8);
    pthread_t thread;
    assert(pthread_create(&thread, NULL, receive, &queue) == 0);
    while (__atomic_load_n(&queue.wake, __ATOMIC_SEQ_CST) < 0)
        usleep(100);
    pid_t pid = fork();
    if (pid == 0) {
        ik_posix_queue_after_fork(&queue);
        int ours = queue.state == 0 && queue.wake == -1 && fcntl(queue.fd, F_GETFD) >= 0;
        ik_posix_queue_close(&queue);
        _exit(ours && queue.fd == -1 ? 0 : 1);
    }
    int status;
    assert(waitpid(pid, &status, 0) == pid && status == 0);
    assert(ik_posix_queue_send(&queue, "12345", 5, 9, IK_NOW) == 0);
    void *rc;
    assert(pthread_join(thread, &rc) == 0 && (intptr_t)rc == 5);
    ik_posix_queue_close(&queue);
}

static void nothing(int signum) {
    (void)signum;
}

static void a_signal_ends_a_wait(void) {
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGALRM, &action, NULL);
    ik_posix_queue queue = new_queue(8);
    ualarm(50000, 50000); /* again and again, because the first may come before the wait */
    assert((intptr_t)receive(&queue) == -EINTR);
    ik_posix_queue_close(&queue);
    ualarm(0, 0);
    assert(sem_close(sem_open(name, O_CREAT | O_EXCL, 0600, 0)) == 0);
    ik_posix_semaphore semaphore;
    assert(ik_posix_semaphore_open(&semaphore, name) == 0 && sem_unlink(name) == 0);
    ualarm(50000, 50000);
    assert(ik_posix_semaphore_acquire(&semaphore, IK_FOREVER) == -EINTR);
    ualarm(0, 0);
    ik_posix_semaphore_free(&semaphore);
}

static void a_semaphore(void) {
    ik_posix_semaphore semaphore;
    assert(ik_posix_semaphore_open(&semaphore, name) == -ENOENT);
    assert(sem_close(sem_open(name, O_CREAT | O_EXCL, 0600, 1)) == 0);
    assert(ik_posix_semaphore_open(&semaphore, name) == 0 && sem_unlink(name) == 0);
    assert(ik_posix_semaphore_acquire(&semaphore, IK_NOW) == 0);
    assert(ik_posix_semaphore_acquire(&semaphore, IK_NOW) == -ETIMEDOUT);
    int64_t start = ik_wait_now();
    assert(ik_posix_semaphore_acquire(&semaphore, start + 150000000) == -ETIMEDOUT);
    assert(ik_wait_now() - start >= 150000000);
    assert(ik_posix_semaphore_release(&semaphore) == 0);
    assert(ik_posix_semaphore_value(&semaphore) == 1);
    ik_posix_semaphore_close(&semaphore);
    assert(ik_posix_semaphore_acquire(&semaphore, IK_FOREVER) == -EBADF);
    ik_posix_semaphore_free(&semaphore);
}

int main(void) {
    snprintf(name, sizeof name, "/ipckit-ctest-%d", getpid());
    what_is_no_queue_is_refused();
    close_ends_the_calls_inside_and_the_last_takes_the_descriptor();
    who_holds_it_has_it_beyond_close();
    a_child_has_nobody_inside();
    a_signal_ends_a_wait();
    a_semaphore();
    return 0;
}

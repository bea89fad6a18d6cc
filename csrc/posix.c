/* SPDX-License-Identifier: MIT */
#include "posix.h"

#include <errno.h>
#include <mqueue.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "wait.h"

enum { CLOSED = IK_POSIX_CLOSED };

static int is_closed(const ik_posix_queue *queue) {
    return __atomic_load_n(&queue->state, __ATOMIC_SEQ_CST) & CLOSED;
}

static void drop(int *fd) {
    int old = __atomic_exchange_n(fd, -1, __ATOMIC_SEQ_CST);
    if (old >= 0)
        close(old);
}

static void leave(ik_posix_queue *queue) {
    if (__atomic_sub_fetch(&queue->state, 1, __ATOMIC_SEQ_CST) != CLOSED)
        return;
    drop(&queue->fd);
    drop(&queue->wake);
}

static int enter(ik_posix_queue *queue) {
    if (!(__atomic_fetch_add(&queue->state, 1, __ATOMIC_SEQ_CST) & CLOSED))
        return 0;
    leave(queue);
    return -EBADF;
}

/* The eventfd, made if this is the first that needs it. */
static int wake_of(ik_posix_queue *queue) {
    int wake = __atomic_load_n(&queue->wake, __ATOMIC_SEQ_CST);
    if (wake >= 0)
        return wake;
    int made = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (made < 0)
        return -errno;
    if (__atomic_compare_exchange_n(&queue->wake, &wake, made, 0, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST))
        return made;
    close(made);
    return wake;
}

static const struct timespec *left_until(int64_t deadline_ns, struct timespec *ret_left) {
    if (deadline_ns == IK_FOREVER)
        return NULL;
    int64_t left = deadline_ns - ik_wait_now();
    if (left < 0)
        left = 0;
    *ret_left = (struct timespec){left / 1000000000, left % 1000000000};
    return ret_left;
}

static int sleep_until_ready(ik_posix_queue *queue, short events, int64_t deadline_ns) {
    int wake = wake_of(queue);
    if (wake < 0)
        return wake;
    if (is_closed(queue)) /* after the eventfd is there to see: whoever closes now rings it */
        return -EBADF;
    struct timespec left;
    struct pollfd both[] = {{.fd = queue->fd, .events = events}, {.fd = wake, .events = POLLIN}};
    int rc = ppoll(both, 2, left_until(deadline_ns, &left), NULL);
    if (rc < 0)
        return -errno;
    return rc == 0 ? -ETIMEDOUT : both[1].revents ? -EBADF : 0;
}

enum { LOOK = 20000 /* nanoseconds */, PAUSES = 16, MOST_MISSES = 10 };

/* An answer often comes sooner than a sleeper can be woken, so look for a moment first; but after
 * looks in vain, as on a busy machine, leave it ever longer. Threads may mix up the two counts:
 * then there is a look more or less. 0, or -ETIMEDOUT. */
static int look(ik_posix_queue *queue, short events) {
    int skip = __atomic_load_n(&queue->skip, __ATOMIC_RELAXED);
    if (skip > 0) {
        __atomic_store_n(&queue->skip, skip - 1, __ATOMIC_RELAXED);
        return -ETIMEDOUT;
    }
    int rc = -ETIMEDOUT;
    for (int64_t start = ik_wait_now(); rc == -ETIMEDOUT && ik_wait_now() - start < LOOK;) {
        for (int i = 0; i < PAUSES; i++)
            ik_wait_relax();
        rc = ik_wait_fd(queue->fd, events, IK_NOW);
    }
    int misses = rc != -ETIMEDOUT ? 0 : __atomic_load_n(&queue->misses, __ATOMIC_RELAXED);
    if (rc == -ETIMEDOUT) {
        misses += misses < MOST_MISSES;
        __atomic_store_n(&queue->skip, 1 << misses, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&queue->misses, misses, __ATOMIC_RELAXED);
    return rc;
}

/* Wait until the queue has a message, or room; 0, or -ETIMEDOUT, -EINTR, -EBADF: closed. */
static int await(ik_posix_queue *queue, short events, int64_t deadline_ns) {
    if (deadline_ns == IK_NOW)
        return -ETIMEDOUT;
    int rc = look(queue, events);
    if (rc == -ETIMEDOUT)
        rc = sleep_until_ready(queue, events, deadline_ns);
    return rc < 0 ? rc : 0;
}

int ik_posix_queue_adopt(ik_posix_queue *ret_queue, int fd) {
    struct mq_attr attr, nonblocking = {.mq_flags = O_NONBLOCK};
    if (mq_setattr(fd, &nonblocking, NULL) < 0 || mq_getattr(fd, &attr) < 0)
        return -errno;
    *ret_queue = (ik_posix_queue){.fd = fd,
                                  .wake = -1,
                                  .max_message = (size_t)attr.mq_msgsize,
                                  .max_messages = attr.mq_maxmsg};
    return 0;
}

/* The calls below are inside already. */

static int send_one(ik_posix_queue *queue, const char *data, size_t len, int64_t priority,
                    int64_t deadline_ns) {
    if (priority < 0 || priority > IK_POSIX_MOST_PRIORITY)
        return -EINVAL;
    while (mq_send(queue->fd, data, len, (unsigned)priority) < 0) {
        int rc = errno == EAGAIN ? await(queue, POLLOUT, deadline_ns) : -errno;
        if (rc < 0)
            return rc;
    }
    return 0;
}

static ssize_t receive_one(ik_posix_queue *queue, char *ret_data, unsigned *ret_priority,
                           int64_t deadline_ns) {
    for (;;) {
        ssize_t len = mq_receive(queue->fd, ret_data, queue->max_message, ret_priority);
        if (len >= 0)
            return len;
        int rc = errno == EAGAIN ? await(queue, POLLIN, deadline_ns) : -errno;
        if (rc < 0)
            return rc;
    }
}

int ik_posix_queue_send(ik_posix_queue *queue, const char *data, size_t len, int64_t priority,
                        int64_t deadline_ns) {
    int rc = enter(queue);
    if (rc < 0)
        return rc;
    rc = send_one(queue, data, len, priority, deadline_ns);
    leave(queue);
    return rc;
}

int64_t ik_posix_queue_receive(ik_posix_queue *queue, ik_posix_message *ret_message,
                               int64_t deadline_ns) {
    int64_t rc = enter(queue);
    if (rc < 0)
        return rc;
    rc = receive_one(queue, ret_message->data, &ret_message->priority, deadline_ns);
    leave(queue);
    return rc;
}

int ik_posix_queue_wait(ik_posix_queue *queue, int events, int64_t deadline_ns) {
    int rc = enter(queue);
    if (rc < 0)
        return rc;
    rc = await(queue, (short)events, deadline_ns);
    leave(queue);
    return rc;
}

int ik_posix_queue_stat(ik_posix_queue *queue, ik_posix_stat *ret_stat) {
    int rc = enter(queue);
    if (rc < 0)
        return rc;
    struct mq_attr attr;
    if (mq_getattr(queue->fd, &attr) < 0)
        rc = -errno;
    else
        *ret_stat = (ik_posix_stat){attr.mq_curmsgs, attr.mq_maxmsg, attr.mq_msgsize};
    leave(queue);
    return rc;
}

int ik_posix_queue_enter(ik_posix_queue *queue) {
    int rc = enter(queue);
    if (rc < 0)
        return rc;
    rc = wake_of(queue);
    if (rc < 0)
        leave(queue);
    return rc;
}

void ik_posix_queue_leave(ik_posix_queue *queue) {
    leave(queue);
}

void ik_posix_queue_close(ik_posix_queue *queue) {
    if (enter(queue) < 0)
        return;
    __atomic_fetch_or(&queue->state, CLOSED, __ATOMIC_SEQ_CST);
    int wake = __atomic_load_n(&queue->wake, __ATOMIC_SEQ_CST);
    if (wake >= 0)
        eventfd_write(wake, 1);
    leave(queue);
}

void ik_posix_queue_after_fork(ik_posix_queue *queue) {
    drop(&queue->wake); /* it would wake the parent's */
    queue->state = (queue->state & CLOSED) + 1;
    leave(queue);
}

/* --- semaphores */

size_t ik_posix_semaphore_size(void) {
    return sizeof(sem_t);
}

int ik_posix_semaphore_open(ik_posix_semaphore *ret_semaphore, const char *name) {
    sem_t *sem = sem_open(name, 0);
    if (sem == SEM_FAILED)
        return -errno;
    *ret_semaphore = (ik_posix_semaphore){.sem = sem};
    return 0;
}

/* A sleeper in sem_clockwait can be woken by nothing but a post, which would be somebody's who took
 * it for one: so it looks up ten times a second whether its handle was closed. */
enum { LOOK_UP = 100000000 }; /* nanoseconds */

static int wait_for_one(sem_t *sem, int64_t deadline_ns) {
    int64_t now = ik_wait_now(), until = now + LOOK_UP;
    if (deadline_ns != IK_FOREVER && deadline_ns < until)
        until = deadline_ns;
    struct timespec at = {until / 1000000000, until % 1000000000};
    if (sem_clockwait(sem, CLOCK_MONOTONIC, &at) == 0)
        return 0;
    return errno == ETIMEDOUT && until != deadline_ns ? -EAGAIN : -errno;
}

int ik_posix_semaphore_acquire(ik_posix_semaphore *semaphore, int64_t deadline_ns) {
    int rc = -EAGAIN;
    while (rc == -EAGAIN) {
        if (__atomic_load_n(&semaphore->closed, __ATOMIC_SEQ_CST))
            return -EBADF;
        rc = wait_for_one(semaphore->sem, deadline_ns);
    }
    return rc;
}

int ik_posix_semaphore_release(ik_posix_semaphore *semaphore) {
    return sem_post(semaphore->sem) < 0 ? -errno : 0;
}

int ik_posix_semaphore_value(ik_posix_semaphore *semaphore) {
    int value;
    return sem_getvalue(semaphore->sem, &value) < 0 ? -errno : value;
}

void ik_posix_semaphore_close(ik_posix_semaphore *semaphore) {
    __atomic_store_n(&semaphore->closed, 1, __ATOMIC_SEQ_CST);
}

void ik_posix_semaphore_free(ik_posix_semaphore *semaphore) {
    if (semaphore->sem)
        sem_close(semaphore->sem);
    semaphore->sem = NULL;
}

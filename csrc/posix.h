/* posix.h - POSIX message queues and named semaphores. See mq_overview(7), sem_overview(7).
 *
 * Any number of threads may use one handle, also while another closes it: the last call inside
 * takes the descriptor or the mapping with it, so no call ever meets a successor of the same
 * number.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum ik_posix_limits { IK_POSIX_MOST_PRIORITY = 32767 };

/* In the state of a handle, above the count of calls inside. */
enum ik_posix_state { IK_POSIX_CLOSED = 1 << 30 };

/* A queue. The descriptor is non-blocking, and what waits does so by poll(2): the time-outs of
 * mq_timedreceive(3) are on the wall clock, which may be set, and nothing could end it on close. */
typedef struct ik_posix_queue {
    int fd;
    int wake;           /* an eventfd, made by the first wait; readable when closed. -1: none */
    int state;          /* calls inside, and whether closed */
    int misses, skip;   /* looks in vain in a row; waits to come without a look */
    size_t max_message; /* bytes */
    int64_t max_messages;
} ik_posix_queue;

typedef struct ik_posix_message {
    unsigned priority;
    char data[]; /* at least max_message bytes */
} ik_posix_message;

typedef struct ik_posix_stat {
    int64_t messages, max_messages, max_message;
} ik_posix_stat;

/* Take over the descriptor of a queue. 0, or -EBADF: it is none, and stays the caller's. */
int ik_posix_queue_adopt(ik_posix_queue *ret_queue, int fd);

/* Send one message; receive the oldest of the highest priority. 0, or its bytes; or -ETIMEDOUT,
 * -EINTR, -EMSGSIZE, -EINVAL: priority, -EBADF: closed, or opened for the other direction. */
int ik_posix_queue_send(ik_posix_queue *queue, const char *data, size_t len, int64_t priority,
                        int64_t deadline_ns);
int64_t ik_posix_queue_receive(ik_posix_queue *queue, ik_posix_message *ret_message,
                               int64_t deadline_ns);

/* Wait until there is a message (POLLIN) or room (POLLOUT), which somebody else may take first.
 * 0, or -ETIMEDOUT, -EINTR, -EBADF: closed. */
int ik_posix_queue_wait(ik_posix_queue *queue, int events, int64_t deadline_ns);

int ik_posix_queue_stat(ik_posix_queue *queue, ik_posix_stat *ret_stat);

/* Hold the descriptor open beyond a close, and an eventfd that close makes readable: that eventfd,
 * or -EBADF, -EMFILE. Each is followed by a leave, unless it failed. */
int ik_posix_queue_enter(ik_posix_queue *queue);
void ik_posix_queue_leave(ik_posix_queue *queue);

/* Ends the calls inside with -EBADF. Again does nothing. */
void ik_posix_queue_close(ik_posix_queue *queue);
/* In a child: the calls that were inside are the parent's. */
void ik_posix_queue_after_fork(ik_posix_queue *queue);

/* A semaphore. Only a thread that holds a reference to the handle calls these. */
typedef struct ik_posix_semaphore {
    void *sem;
    int closed;
} ik_posix_semaphore;

/* Bytes of the file that one is in. */
size_t ik_posix_semaphore_size(void);
/* Open the semaphore with this name. 0, or -ENOENT, -EACCES, -EINVAL: no semaphore, ... */
int ik_posix_semaphore_open(ik_posix_semaphore *ret_semaphore, const char *name);
/* Take one, waiting until there is one. 0, or -ETIMEDOUT, -EINTR, -EBADF: closed. */
int ik_posix_semaphore_acquire(ik_posix_semaphore *semaphore, int64_t deadline_ns);
/* 0, or -EOVERFLOW. */
int ik_posix_semaphore_release(ik_posix_semaphore *semaphore);
int ik_posix_semaphore_value(ik_posix_semaphore *semaphore);
/* Those inside acquire end within 100 ms; the mapping goes with free. */
void ik_posix_semaphore_close(ik_posix_semaphore *semaphore);
void ik_posix_semaphore_free(ik_posix_semaphore *semaphore);

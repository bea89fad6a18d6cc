/* sysv_queue.h - System V message queues: calls that end, and waits that don't consume.
 * See msgop(2), msgctl(2).
 *
 * A blocked msgrcv or msgsnd knows no time limit and no descriptor. Here a waiting thread is
 * interrupted by a real-time signal: from a timer at its deadline, from close() at any time. The
 * signal is one that nobody uses, its handler is there only while something waits, and it is only
 * ever sent to a thread that waits here. Nothing polls.
 *
 * Of the calls that take a handle any number may be made at a time, by any threads.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* A handle of one queue in one process. */
typedef struct ik_sysv_queue ik_sysv_queue;

/* A thread that does one blocking call in place of one that must not block. */
typedef struct ik_sysv_helper ik_sysv_helper;

/* What a receive fills. From type on it is the msgbuf of msgop(2). */
typedef struct ik_sysv_message {
    ik_sysv_queue *queue; /* the handle that it belongs to */
    size_t room;          /* bytes that text has */
    long type;
    char text[];
} ik_sysv_message;

/* msqid_ds in numbers. */
typedef struct ik_sysv_queue_info {
    uint64_t messages, bytes, max_bytes;
    int64_t send_time, receive_time, change_time;
    int send_pid, receive_pid;
    uint32_t uid, gid, creator_uid, creator_gid, mode;
    int key;
} ik_sysv_queue_info;

/* msgget(2): the id, or -errno. */
int ik_sysv_queue_get(int key, int create, int exclusive, int mode);

/* A handle, NULL without memory. free() closes it, and frees it when no helper needs it any more.
 */
ik_sysv_queue *ik_sysv_queue_new(int id);
void ik_sysv_queue_free(ik_sysv_queue *queue);

/* End every call of this process that waits on the handle (-EBADF), and all later ones. Returns
 * when they are out; empty messages that a watch took go back into the queue. Again does nothing.
 */
void ik_sysv_queue_close(ik_sysv_queue *queue);

/* 0, or -ETIMEDOUT, -EINTR, -EBADF (closed), -EMSGSIZE (more than the queue may ever hold), -EAGAIN
 * (no real-time signal is free to wait with), or what else msgsnd gives. */
int ik_sysv_queue_send(ik_sysv_queue *queue, const char *data, size_t size, int64_t type,
                       int64_t deadline_ns);
/* The size of the message. all_but: any type but that one. Errors as above; -E2BIG: it stays. */
int64_t ik_sysv_queue_recv(ik_sysv_message *message, int64_t type, int all_but,
                           int64_t deadline_ns);

/* Copy the message at that place in the queue, which stays: its size, or -ENOMSG, -ENOSYS, ... */
int64_t ik_sysv_queue_peek(ik_sysv_message *message, int64_t index);

/* Of max_bytes, mode, uid, gid those that are >= 0; needs no right to read. */
int ik_sysv_queue_set(ik_sysv_queue *queue, int64_t max_bytes, int64_t mode, int64_t uid,
                      int64_t gid);
int ik_sysv_queue_stat(ik_sysv_queue *queue, ik_sysv_queue_info *ret_info);
int ik_sysv_queue_remove(int id);

/* A helper that waits, without consuming, for a message of that type; its descriptor is readable as
 * long as the handle can receive one, or after an error for ever. NULL and *ret_error if not made.
 */
ik_sysv_helper *ik_sysv_queue_watch(ik_sysv_queue *queue, int64_t type, int all_but,
                                    int *ret_error);
/* A helper that sends one message; its descriptor is readable when that has ended. */
ik_sysv_helper *ik_sysv_queue_sender(ik_sysv_queue *queue, const char *data, size_t size,
                                     int64_t type, int *ret_error);
/* The descriptor; -1 after close() or in a child forked since. */
int ik_sysv_helper_fileno(const ik_sysv_helper *helper);
/* Interrupt it, wait for its end. Of a sender: 0 (sent), -EINTR (not sent), or another -errno. */
int ik_sysv_helper_stop(ik_sysv_helper *helper);
void ik_sysv_helper_free(ik_sysv_helper *helper);

/* spawner.h - C children from a program of our own, at the same cost however large we are.
 *
 * fork(2) copies the page tables of the whole process: 1 ms in a small Python program, 18 ms in one
 * of 180 MiB. A child that runs C only needs none of that. So a small program, the spawner, is
 * executed once; each request makes it clone itself, as a child of ours (CLONE_PARENT), in 0.1 ms.
 *
 *   we                                   spawner                        child
 *   job + descriptors, by a socket ----> clone3(CLONE_PARENT) --------> maps the shared memory,
 *   pidfd of the child  <--------------- its pid                        does the job, exits
 *
 * The kernel itself writes the pid of the child into shared memory, before the child runs
 * (CLONE_PARENT_SETTID). So a spawner that is killed at any instruction leaves no doubt: the word
 * is not 0, and there is a child, or it is 0, there is none, and nothing of the job was done.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* What the child does, and which descriptors come with the job, in this order. */
enum ik_spawner_work {
    IK_SPAWNER_CONNECTION = 1, /* an ik_connection_job: socket, counters; with a log, those of it */
    IK_SPAWNER_WORKER = 2 /* an ik_prefork_worker: board, counters, bell; with events, that pipe;
                           its listeners; with a log, those of it */
};

/* Of a log: writer, hand, wake, acked, memory. */
enum ik_spawner_limits { IK_SPAWNER_MOST_FDS = 64, IK_SPAWNER_MOST_BYTES = 2048 };

typedef struct ik_spawner_shared {
    int child; /* written by the kernel, while a request is under way */
} ik_spawner_shared;

/* A spawner, of the process that started it. */
typedef struct ik_spawner {
    int control; /* a socket of packets */
    int pidfd;
    ik_spawner_shared *shared;
} ik_spawner;

/* Tells one build of ipckit from another: a program that was replaced on the disk since is no
 * partner for us. */
const char *ik_spawner_build(void);

/* Have the spawner make a child, which dies with us. It begins with all signals blocked and default
 * actions, with nothing open but what is given and /dev/null as 0, 1 and 2, in the folder "/"; its
 * limits and environment are the spawner's. Blocks until the child is there; a spawner that stands
 * still is killed. The pid; or -ESRCH: the spawner has ended and there is no child; or -errno of
 * clone(2), recvmsg(2), pidfd_open(2): there is no child. One thread at a time. */
int ik_spawner_ask(const ik_spawner *spawner, int work, const void *job, size_t size,
                   const int *fds, size_t n_fds, int *ret_pidfd);

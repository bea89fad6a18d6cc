/* queues.h - who takes part in a queue: a table in the shared memory, before the ring.
 *
 * A process that puts or gets has a place in the table, with what tells it from all later processes
 * of its number, its roles, and what it is doing. The table is changed under a lock of its own, one
 * store at a time, so a process killed there leaves nothing half done. Who is dead is not judged
 * here: that takes /proc.
 */
#pragma once
#include "ring.h"

/* Bytes before the ring, a multiple of its alignment; and places. */
enum ik_queue_sizes { IK_QUEUE_HEADER = 128, IK_QUEUE_PLACES = 510 };
enum ik_queue_memory { IK_QUEUE_MEMORY = IK_QUEUE_HEADER + IK_QUEUE_PLACES * 64 };

enum ik_queue_roles { IK_QUEUE_PRODUCER = 1, IK_QUEUE_CONSUMER = 2 };

/* A place is free, of a process that is there, or of one that was found dead; such a place is used
 * again when there is no free one. */
enum ik_queue_state { IK_QUEUE_FREE = 0, IK_QUEUE_ALIVE = 1, IK_QUEUE_DEAD = 2 };

/* What a process is doing, told by itself: calls of its threads inside put, inside get, and of
 * those the ones that wait; and when the last one ended. */
typedef struct ik_queue_doing {
    uint32_t inside[2];
    uint32_t waiting;
    uint32_t unused;
    int64_t active_ns; /* CLOCK_MONOTONIC_COARSE; 0: never */
} ik_queue_doing;

typedef struct ik_queue_place {
    uint32_t state; /* stored last */
    uint32_t roles;
    int64_t pid;
    int64_t start;     /* of the process, ticks since boot */
    int64_t namespace; /* inode of its pid namespace */
    ik_queue_doing doing;
    int64_t unused;
} ik_queue_place;

/* In shared memory, at an address that is a multiple of a ring's alignment. */
typedef struct ik_queue_table {
    uint64_t magic; /* stored last */
    uint32_t reach; /* no place from here on was ever taken */
    uint32_t had_producer;
    uint32_t deaths;
    uint32_t done; /* tasks, modulo 2**32 */
    unsigned char unused[40];
    unsigned char lock[IK_LOCK_SIZE];
    ik_queue_place places[IK_QUEUE_PLACES];
} ik_queue_table;

/* Make a table of zeros into an empty one. 0, or -errno. */
int ik_queue_create(ik_queue_table *table);

/* 0, or -EBADMSG: this is no table of ours. */
int ik_queue_attach(const ik_queue_table *table, uint64_t size);

/* Have a place. Its index; -EUSERS: all are taken; -ETIMEDOUT, -EINTR, -ENOTRECOVERABLE. */
int ik_queue_join(ik_queue_table *table, int64_t pid, int64_t start, int64_t namespace,
                  uint32_t roles, int64_t deadline_ns);

/* Have more roles. 0, or as ik_queue_join(). */
int ik_queue_play(ik_queue_table *table, int index, uint32_t roles, int64_t deadline_ns);

/* Give the place up. 0, or as ik_queue_join(). */
int ik_queue_leave(ik_queue_table *table, int index, int64_t deadline_ns);

/* The process that was seen at the place is dead. 1; 0 if it is no longer there. */
int ik_queue_bury(ik_queue_table *table, int index, const ik_queue_place *seen,
                  int64_t deadline_ns);

/* If nobody is there, forget that there ever was a producer. 1, or 0; or as ik_queue_join(). */
int ik_queue_renew(ik_queue_table *table, int64_t deadline_ns);

/* The first place from index on that is not free, and what is in it. Its index, or -ENOENT. */
int ik_queue_read(const ik_queue_table *table, int index, ik_queue_place *ret_place);

/* Processes with that role that are there; alive, as far as anybody knows. */
int ik_queue_count(const ik_queue_table *table, uint32_t role);

/* Whether some process that has not ended has the number of a producer: no proof that it is that
 * one, but quickly asked. */
int ik_queue_producer_seems_alive(const ik_queue_table *table);

/* Was there ever a producer? */
int ik_queue_had_producer(const ik_queue_table *table);

/* How many were found dead. */
uint32_t ik_queue_deaths(const ik_queue_table *table);

ik_queue_doing *ik_queue_doing_of(ik_queue_table *table, int index);

/* --- tasks: messages that were put, less those that are said to be done ---------------------- */

/* One more is done, of sent ones. 0; -ERANGE: all were. */
int ik_queue_task_done(ik_queue_table *table, uint32_t sent);

/* All that are left are done. */
void ik_queue_tasks_dropped(ik_queue_table *table, uint32_t tasks);

uint32_t ik_queue_tasks(const ik_queue_table *table);

/* Wait for a task to be done after those. 0; -ETIMEDOUT, -EINTR. */
int ik_queue_wait_tasks(const ik_queue_table *table, uint32_t done, int64_t deadline_ns);

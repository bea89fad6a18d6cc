/* sysv_semaphore.h - one System V semaphore with undo. See semget(2), semop(2), semctl(2).
 *
 * Ours is the first of a set of two. The second is 0 until the first was given its value, which
 * happens to both in one semop: so whoever gives it, and however many try, it is given once.
 */
#pragma once
#include <stdint.h>

/* struct semid_ds, which cffi can't read, and what the first semaphore says. */
typedef struct ik_sysv_semaphore_status {
    int64_t otime; /* 0 until the first semop */
    int64_t ctime;
    uint64_t count; /* semaphores in the set */
    int key;
    int value;
    int waiting;
    int pid; /* of the last semop or SETVAL; 0 if there was none */
    uint32_t uid;
    uint32_t gid;
    uint32_t cuid;
    uint32_t cgid;
    uint32_t mode;
} ik_sysv_semaphore_status;

/* A new set of two without a value: its id, or -EEXIST, -ENOSPC (semmni, semmns), -ENOMEM. */
int ik_sysv_semaphore_create(int key, int mode);

/* The id of an existing set of any number of semaphores, or -ENOENT. */
int ik_sysv_semaphore_find(int key);

/* Give a set made by create its value. 0, or -EAGAIN: somebody did; -EACCES, -EINVAL, -EIDRM. */
int ik_sysv_semaphore_start(int id, int value);

/* Add delta; below 0, wait until there is so much to take, at most wait_ns (< 0: for ever).
 * 0, or -EAGAIN when the time is over, -EINTR, -ERANGE, -EACCES, -EINVAL (no such id), -EIDRM,
 * -ENOSPC (no memory for undo). */
int ik_sysv_semaphore_add(int id, int delta, int undo, int64_t wait_ns);

/* 0, or -EACCES, -EINVAL (no such id), -EIDRM; set_value also -ERANGE. */
int ik_sysv_semaphore_stat(int id, ik_sysv_semaphore_status *ret_status);
int ik_sysv_semaphore_set_value(int id, int value);

/* Of mode, uid, gid those that are >= 0; needs no right to read. 0, or -EPERM, -EINVAL, -EIDRM. */
int ik_sysv_semaphore_set(int id, int64_t mode, int64_t uid, int64_t gid);

/* 0, or -EPERM, -EINVAL, -EIDRM. */
int ik_sysv_semaphore_remove(int id);

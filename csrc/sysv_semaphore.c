/* SPDX-License-Identifier: MIT */
#include "sysv_semaphore.h"

#include <errno.h>
#include <stddef.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <time.h>

enum { OURS = 0, STARTED = 1, COUNT = 2 };

/* semctl(2): the caller declares it. */
union semun {
    int val;
    struct semid_ds *buf;
};

static int result(int rc) {
    return rc < 0 ? -errno : rc;
}

int ik_sysv_semaphore_create(int key, int mode) {
    return result(semget(key, COUNT, IPC_CREAT | IPC_EXCL | (mode & 0777)));
}

int ik_sysv_semaphore_find(int key) {
    return result(semget(key, 0, 0));
}

int ik_sysv_semaphore_start(int id, int value) {
    struct sembuf steps[] = {
        {.sem_num = STARTED, .sem_op = 0, .sem_flg = IPC_NOWAIT},
        {.sem_num = STARTED, .sem_op = 1},
        /* Adding 0 means: wait for 0, which it is; and the kernel notes who gave it that, too. */
        {.sem_num = OURS, .sem_op = (short)value, .sem_flg = IPC_NOWAIT},
    };
    return result(semop(id, steps, 3));
}

int ik_sysv_semaphore_add(int id, int delta, int undo, int64_t wait_ns) {
    struct timespec wait = {.tv_sec = wait_ns / 1000000000, .tv_nsec = wait_ns % 1000000000};
    struct sembuf step = {
        .sem_num = OURS,
        .sem_op = (short)delta,
        .sem_flg = (short)((undo ? SEM_UNDO : 0) | (wait_ns == 0 ? IPC_NOWAIT : 0)),
    };
    return result(semtimedop(id, &step, 1, wait_ns < 0 ? NULL : &wait));
}

int ik_sysv_semaphore_stat(int id, ik_sysv_semaphore_status *ret_status) {
    struct semid_ds ds;
    int value, waiting, pid;
    if (semctl(id, 0, IPC_STAT, (union semun){.buf = &ds}) < 0 ||
        (value = semctl(id, OURS, GETVAL)) < 0 || (waiting = semctl(id, OURS, GETNCNT)) < 0 ||
        (pid = semctl(id, OURS, GETPID)) < 0)
        return -errno;
    *ret_status = (ik_sysv_semaphore_status){
        .otime = ds.sem_otime,
        .ctime = ds.sem_ctime,
        .count = ds.sem_nsems,
        .key = ds.sem_perm.__key,
        .value = value,
        .waiting = waiting,
        .pid = pid,
        .uid = ds.sem_perm.uid,
        .gid = ds.sem_perm.gid,
        .cuid = ds.sem_perm.cuid,
        .cgid = ds.sem_perm.cgid,
        .mode = ds.sem_perm.mode,
    };
    return 0;
}

int ik_sysv_semaphore_set_value(int id, int value) {
    return result(semctl(id, OURS, SETVAL, (union semun){.val = value}));
}

int ik_sysv_semaphore_set(int id, int64_t mode, int64_t uid, int64_t gid) {
    struct semid_ds ds;
    /* See ik_sysv_memory_set(). */
    int found = semctl(id, 0, SEM_STAT_ANY, (union semun){.buf = &ds});
    if (found < 0 || found != id)
        return found < 0 ? -errno : -EIDRM;
    if (mode >= 0)
        ds.sem_perm.mode = (unsigned short)mode;
    if (uid >= 0)
        ds.sem_perm.uid = (uid_t)uid;
    if (gid >= 0)
        ds.sem_perm.gid = (gid_t)gid;
    return result(semctl(id, 0, IPC_SET, (union semun){.buf = &ds}));
}

int ik_sysv_semaphore_remove(int id) {
    return result(semctl(id, 0, IPC_RMID));
}

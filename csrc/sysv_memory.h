/* sysv_memory.h - System V shared memory segments. See shmget(2), shmop(2), shmctl(2). */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum ik_sysv_memory_page { IK_SYSV_MEMORY_USUAL = 0, IK_SYSV_MEMORY_HUGE = 1 };

/* struct shmid_ds, which cffi can't read. */
typedef struct ik_sysv_memory_status {
    uint64_t size;
    uint64_t nattch;
    int64_t atime;
    int64_t dtime;
    int64_t ctime;
    int key; /* 0: private, or removed and still attached */
    int cpid;
    int lpid;
    uint32_t uid;
    uint32_t gid;
    uint32_t cuid;
    uint32_t cgid;
    uint32_t mode;
} ik_sysv_memory_status;

/* The bits of mode that are no permissions. */
enum ik_sysv_memory_mode { IK_SYSV_MEMORY_DEST = 01000, IK_SYSV_MEMORY_LOCKED = 02000 };

/* A new segment of size bytes in pages of that kind: its id, or -EEXIST, -EINVAL (size), -ENOSPC
 * (shmmni, shmall), -ENOMEM, -EPERM (huge pages). */
int ik_sysv_memory_create(int key, size_t size, int mode, int page);

/* The id of an existing segment, or -ENOENT. */
int ik_sysv_memory_find(int key);

/* The flags for mmap(2) of a private mapping without memory, which attach then replaces. */
int ik_sysv_memory_reservation(int page);

/* Map the segment in place of what is mapped at the address where; only munmap(2) of it is needed
 * to detach. 0, or -EACCES, -EINVAL (no such id; where isn't aligned to the segment's pages),
 * -EIDRM, -ENOMEM. */
int ik_sysv_memory_attach(int id, void *where, int readonly);

/* 0, or -EACCES, -EINVAL (no such id), -EIDRM. */
int ik_sysv_memory_stat(int id, ik_sysv_memory_status *ret_status);

/* Of mode, uid, gid those that are >= 0; needs no right to read. 0, or -EPERM, -EINVAL, -EIDRM. */
int ik_sysv_memory_set(int id, int64_t mode, int64_t uid, int64_t gid);

/* 0, or -EPERM, -EINVAL, -EIDRM. */
int ik_sysv_memory_remove(int id);

/* SPDX-License-Identifier: MIT */
#include "sysv_memory.h"

#include <errno.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>

_Static_assert(IK_SYSV_MEMORY_DEST == SHM_DEST && IK_SYSV_MEMORY_LOCKED == SHM_LOCKED,
               "mode bits of the kernel");

static int result(int rc) {
    return rc < 0 ? -errno : rc;
}

int ik_sysv_memory_create(int key, size_t size, int mode, int page) {
    int huge = page == IK_SYSV_MEMORY_HUGE ? SHM_HUGETLB : 0;
    return result(shmget(key, size, IPC_CREAT | IPC_EXCL | huge | (mode & 0777)));
}

int ik_sysv_memory_find(int key) {
    return result(shmget(key, 0, 0));
}

int ik_sysv_memory_reservation(int page) {
    int huge = page == IK_SYSV_MEMORY_HUGE ? MAP_HUGETLB : 0;
    return MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | huge;
}

int ik_sysv_memory_attach(int id, void *where, int readonly) {
    void *got = shmat(id, where, SHM_REMAP | (readonly ? SHM_RDONLY : 0));
    return result(got == (void *)-1 ? -1 : 0);
}

int ik_sysv_memory_stat(int id, ik_sysv_memory_status *ret_status) {
    struct shmid_ds ds;
    if (shmctl(id, IPC_STAT, &ds) < 0)
        return -errno;
    *ret_status = (ik_sysv_memory_status){
        .size = ds.shm_segsz,
        .nattch = ds.shm_nattch,
        .atime = ds.shm_atime,
        .dtime = ds.shm_dtime,
        .ctime = ds.shm_ctime,
        .key = ds.shm_perm.__key,
        .cpid = ds.shm_cpid,
        .lpid = ds.shm_lpid,
        .uid = ds.shm_perm.uid,
        .gid = ds.shm_perm.gid,
        .cuid = ds.shm_perm.cuid,
        .cgid = ds.shm_perm.cgid,
        .mode = ds.shm_perm.mode,
    };
    return 0;
}

int ik_sysv_memory_set(int id, int64_t mode, int64_t uid, int64_t gid) {
    struct shmid_ds ds;
    /* Unlike IPC_STAT it asks for no right to read, so the answer is that of IPC_SET. It takes the
     * index in the kernel's table, which is the low part of an id, and returns whose it is. */
    int found = shmctl(id, SHM_STAT_ANY, &ds);
    if (found < 0 || found != id)
        return found < 0 ? -errno : -EIDRM;
    if (mode >= 0)
        ds.shm_perm.mode = (unsigned short)mode;
    if (uid >= 0)
        ds.shm_perm.uid = (uid_t)uid;
    if (gid >= 0)
        ds.shm_perm.gid = (gid_t)gid;
    return result(shmctl(id, IPC_SET, &ds));
}

int ik_sysv_memory_remove(int id) {
    return result(shmctl(id, IPC_RMID, NULL));
}

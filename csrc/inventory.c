/* SPDX-License-Identifier: MIT */
#include "inventory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

/* By number: the C library has these calls since glibc 2.36 only. */
#ifndef SYS_fsopen
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
enum { OPEN_CLOEXEC = 1, MOUNT_CLOEXEC = 1, CONFIG_CREATE = 6 };

static int result(long rc) {
    return rc < 0 ? -errno : (int)rc;
}

/* The descriptor of a mount can't be read, only opened in. */
static int open_root(int mount) {
    if (mount < 0)
        return mount;
    int rc = result(openat(mount, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    close(mount);
    return rc;
}

int ik_inventory_queue_folder(void) {
    int context = result(syscall(SYS_fsopen, "mqueue", OPEN_CLOEXEC));
    if (context < 0)
        return context;
    int mount = result(syscall(SYS_fsconfig, context, CONFIG_CREATE, NULL, NULL, 0));
    if (mount == 0)
        mount = result(syscall(SYS_fsmount, context, MOUNT_CLOEXEC, 0));
    close(context);
    return open_root(mount);
}

/* The system calls themselves, which take the name without its slash: mq_open is in another library
 * before glibc 2.34. */
int ik_inventory_queue_open(const char *name) {
    return result(syscall(SYS_mq_open, name + 1, O_RDONLY | O_NONBLOCK | O_CLOEXEC, 0, NULL));
}

int ik_inventory_queue_unlink(const char *name) {
    return result(syscall(SYS_mq_unlink, name + 1));
}

int ik_inventory_semaphore_pids(int id, int *ret_pids, size_t count) {
    int waiting = 0;
    for (size_t i = 0; i < count; i++) {
        int pid = semctl(id, (int)i, GETPID);
        int rising = semctl(id, (int)i, GETNCNT);
        int falling = semctl(id, (int)i, GETZCNT);
        if (pid < 0 || rising < 0 || falling < 0)
            return -errno;
        ret_pids[i] = pid;
        waiting += rising + falling;
    }
    return waiting;
}

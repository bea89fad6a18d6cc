/* inventory.h - what Python can't ask the kernel about named objects, nor tell it to remove. */
#pragma once
#include <stddef.h>

/* The POSIX queues of this ipc namespace as a folder, mounted nowhere: nobody else sees a change,
 * and it goes with the descriptor. Returns a descriptor, close-on-exec; -EPERM without
 * CAP_SYS_ADMIN, -ENOSYS, -ENODEV (a kernel without such queues), another -errno. */
int ik_inventory_queue_folder(void);

/* The POSIX queue /name, for fstat and read. Returns a descriptor, close-on-exec, or -ENOENT,
 * -EACCES, another -errno. */
int ik_inventory_queue_open(const char *name);
int ik_inventory_queue_unlink(const char *name);

/* The processes that last changed each of the first count semaphores of the System V set id; 0 for
 * nobody, or for one of a pid namespace that can't be seen from here. Returns how many processes
 * wait in those semaphores, or -EACCES, -EINVAL or -EIDRM (gone). */
int ik_inventory_semaphore_pids(int id, int *ret_pids, size_t count);

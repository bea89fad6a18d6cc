/* lock.h - a lock in shared memory that the kernel takes back from a killed holder.
 *
 * It belongs to a thread, as a robust mutex of pthreads does: the thread that took it releases it,
 * and the end of that thread, by exit, execve or SIGKILL, is the death of the holder. Who gets the
 * lock then is told so, mends what the lock guards, and says that it is mended.
 *
 * Only among processes that trust each other: the memory of the lock holds pointers of glibc's.
 */
#pragma once
#include "wait.h"

/* The size of a lock; it is aligned to as much. */
enum ik_lock_size { IK_LOCK_SIZE = 64 };

typedef struct ik_lock ik_lock;

/* Make a lock of IK_LOCK_SIZE bytes of shared memory that nobody uses. 0, or -errno. */
int ik_lock_init(ik_lock *lock);

/* Take the lock, waiting until the deadline: 0; or 1 if its holder died, and then the caller mends
 * and calls ik_lock_mended() before the release. Else -ETIMEDOUT; -EINTR: look around, call again;
 * -EDEADLK: this thread has it; -ENOTRECOVERABLE: somebody released it without mending. */
int ik_lock_take(ik_lock *lock, ik_spin *spin, int64_t deadline_ns);

/* What the lock guards is whole again. Until this call, the death of the caller is as that of the
 * first holder, so what mends must be able to run twice. */
void ik_lock_mended(ik_lock *lock);

/* 0, or -EPERM: this thread does not have it. */
int ik_lock_release(ik_lock *lock);

/* The thread id of who holds it; 0 for nobody, and for one who died. */
int ik_lock_holder(const ik_lock *lock);

/* How often it was taken from the dead. */
uint32_t ik_lock_recoveries(const ik_lock *lock);

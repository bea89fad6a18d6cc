/* process.h - fork so that no signal, status or descriptor goes astray. See fork(2), pidfd_open(2).
 */
#pragma once
#include <stddef.h>

enum ik_process_flags { IK_PROCESS_DIE_WITH_PARENT = 1 << 0 };

/* A fork is before_fork, fork(2), then begin_child in the child and after_fork in the parent, all
 * in one thread. hot_process.c makes them around a fork of Python; ik_process_fork() does it all.
 *
 * Before: see to it that the kernel keeps the child's status (SIGCHLD must not be ignored), reserve
 * the descriptor that the pidfd will take, block all signals. 0; or -EMFILE, -ENFILE, -ENOMEM,
 * -ENOSYS with nothing changed. */
int ik_process_before_fork(void);

/* The parent, with the pid, or with the -errno of a fork that failed: restore the signal mask.
 * The pidfd; or -errno, and then there is no child (any more) and nothing changed. */
int ik_process_after_fork(int pid);

/* The child: drop the reserved descriptor and do as the flags say. Signals stay blocked. */
int ik_process_begin_child(int flags);

/* The child: restore the signal mask that the parent had before the fork. In a program that was
 * executed, and its children: unblock all. */
int ik_process_unblock(void);

/* Fork a child that runs run(argument) and exits with its result. All signals are blocked there
 * until run calls ik_process_unblock(); caught ones have their default action, ignored ones stay
 * ignored. Of the descriptors above 2 only keep (ascending, each above 2) stay open. run must not
 * allocate if the parent has threads. The pid; or -errno, as above and as fork(2). */
int ik_process_fork(int (*run)(void *), void *argument, const int *keep, size_t n_keep, int flags,
                    int *ret_pidfd);

/* Execute the program at path in a child, with our environment and those of the descriptors keep
 * (each above 2); which others it gets that are not close-on-exec is up to it. Signals are blocked
 * there and have their default actions. The pid; or -errno, as above and as posix_spawn(3). */
int ik_process_execute(const char *path, char *const *argv, const int *keep, size_t n_keep,
                       int *ret_pidfd);

/* Close every descriptor above 2 but those of keep (ascending, each above 2). */
void ik_process_close_all_but(const int *keep, size_t n_keep);

/* Have the kernel send signum to this process when its parent ends, or send it now if the parent is
 * not parent (its pid, seen before the fork) any more. 0 or -EINVAL. See PR_SET_PDEATHSIG(2const).
 */
int ik_process_die_with_parent(int signum, int parent);

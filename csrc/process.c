/* SPDX-License-Identifier: MIT */
#include "process.h"

#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* C libraries older than the kernel don't know these; the numbers are the same everywhere. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

/* What before_fork leaves for after_fork and for the child, who inherits the thread's copy. */
typedef struct before {
    int reserved; /* -1: no fork is under way */
    int parent;
    sigset_t mask;
    struct sigaction sigchld;
    int sigchld_changed;
} before;

static _Thread_local before saved = {.reserved = -1};

static int open_pidfd(int pid) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    return fd < 0 ? -errno : fd;
}

/* A child of a parent that ignores SIGCHLD leaves no status: the kernel reaps it. */
static void keep_statuses(void) {
    sigaction(SIGCHLD, NULL, &saved.sigchld);
    struct sigaction keeping = saved.sigchld;
    keeping.sa_flags &= ~SA_NOCLDWAIT;
    if (keeping.sa_handler == SIG_IGN)
        keeping.sa_handler = SIG_DFL;
    saved.sigchld_changed = keeping.sa_handler != saved.sigchld.sa_handler ||
                            keeping.sa_flags != saved.sigchld.sa_flags;
    if (saved.sigchld_changed)
        sigaction(SIGCHLD, &keeping, NULL);
}

int ik_process_before_fork(void) {
    int parent = getpid();
    int reserved = open_pidfd(parent); /* any would do; this one also tells what the kernel can */
    if (reserved < 0)
        return reserved;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved.mask);
    keep_statuses();
    saved.reserved = reserved;
    saved.parent = parent;
    return 0;
}

static void release_reserved(void) {
    if (saved.reserved >= 0)
        close(saved.reserved);
    saved.reserved = -1;
}

int ik_process_after_fork(int pid) {
    if (saved.reserved < 0)
        return pid < 0 ? pid : -EINVAL;
    release_reserved();
    int rc = pid < 0 ? pid : open_pidfd(pid);
    if (rc < 0 && pid > 0) { /* a thread took the place just released: nobody could wait for it */
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    if (rc < 0 && saved.sigchld_changed)
        sigaction(SIGCHLD, &saved.sigchld, NULL);
    pthread_sigmask(SIG_SETMASK, &saved.mask, NULL);
    return rc;
}

int ik_process_begin_child(int flags) {
    release_reserved();
    return flags & IK_PROCESS_DIE_WITH_PARENT ? ik_process_die_with_parent(SIGKILL, saved.parent)
                                              : 0;
}

int ik_process_unblock(void) {
    return -pthread_sigmask(SIG_SETMASK, &saved.mask, NULL);
}

/* The parent's handlers must not run in a child that never enters Python. */
static void default_handlers(void) {
    struct sigaction action, standard = {.sa_handler = SIG_DFL};
    for (int signum = 1; signum < NSIG; signum++)
        if (sigaction(signum, NULL, &action) == 0 && action.sa_handler != SIG_DFL &&
            action.sa_handler != SIG_IGN)
            sigaction(signum, &standard, NULL);
}

/* close_range(2), or one by one where the kernel or a sandbox refuses it. */
static void close_between(unsigned first, unsigned last) {
    struct rlimit limit;
    if (first > last || syscall(SYS_close_range, first, last, 0) == 0)
        return;
    getrlimit(RLIMIT_NOFILE, &limit);
    for (unsigned fd = first; fd <= last && fd < limit.rlim_cur; fd++)
        close((int)fd);
}

void ik_process_close_all_but(const int *keep, size_t n_keep) {
    unsigned first = 3;
    for (size_t i = 0; i < n_keep; i++) {
        close_between(first, (unsigned)keep[i] - 1);
        first = (unsigned)keep[i] + 1;
    }
    close_between(first, ~0U);
}

static void be_native_child(const int *keep, size_t n_keep, int flags) {
    if (flags & IK_PROCESS_DIE_WITH_PARENT)
        ik_process_die_with_parent(SIGKILL, saved.parent);
    default_handlers();
    ik_process_close_all_but(keep, n_keep); /* the reserved one among them */
}

static int finish(int pid, int *ret_pidfd) {
    int rc = ik_process_after_fork(pid);
    if (rc < 0)
        return rc;
    *ret_pidfd = rc;
    return pid;
}

int ik_process_fork(int (*run)(void *), void *argument, const int *keep, size_t n_keep, int flags,
                    int *ret_pidfd) {
    int rc = ik_process_before_fork();
    if (rc < 0)
        return rc;
    int pid = fork();
    if (pid == 0) {
        be_native_child(keep, n_keep, flags);
        _exit(run(argument));
    }
    return finish(pid < 0 ? -errno : pid, ret_pidfd);
}

/* posix_spawn(3): no copy of our memory is made, and no handler of pthread_atfork runs. */
static int execute(const char *path, char *const *argv, const int *keep, size_t n_keep) {
    posix_spawnattr_t how;
    posix_spawn_file_actions_t files;
    sigset_t all;
    int pid;
    sigfillset(&all);
    posix_spawnattr_init(&how);
    posix_spawnattr_setflags(&how, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    posix_spawnattr_setsigmask(&how, &all);
    posix_spawnattr_setsigdefault(&how, &all);
    int rc = posix_spawn_file_actions_init(&files);
    for (size_t i = 0; i < n_keep && rc == 0; i++) /* to itself: not close-on-exec any more */
        rc = posix_spawn_file_actions_adddup2(&files, keep[i], keep[i]);
    if (rc == 0)
        rc = posix_spawn(&pid, path, &files, &how, argv, environ);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&how);
    return rc == 0 ? pid : -rc;
}

int ik_process_execute(const char *path, char *const *argv, const int *keep, size_t n_keep,
                       int *ret_pidfd) {
    int rc = ik_process_before_fork();
    return rc < 0 ? rc : finish(execute(path, argv, keep, n_keep), ret_pidfd);
}

int ik_process_die_with_parent(int signum, int parent) {
    if (prctl(PR_SET_PDEATHSIG, signum) < 0)
        return -errno;
    /* 0: the parent lives in an outer pid namespace, where it can't be compared. */
    int now = getppid();
    if (now != parent && now != 0)
        kill(getpid(), signum);
    return 0;
}

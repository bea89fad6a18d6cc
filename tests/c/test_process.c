/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "process.h"

enum { OK = 42, HIGH = 200 };

static void handler(int signum) {
    (void)signum;
}

static int disposition_is(int signum, void (*expected)(int)) {
    struct sigaction action;
    return sigaction(signum, NULL, &action) == 0 && action.sa_handler == expected;
}

static int blocked(int signum) {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    return sigismember(&mask, signum);
}

static int is_open(int fd) {
    return fcntl(fd, F_GETFD) >= 0;
}

static int n_open(void) {
    int n = 0;
    for (int fd = 0; fd <= HIGH; fd++)
        n += is_open(fd);
    return n;
}

static int status_of(int pid, int pidfd) {
    int status = -1;
    assert(pid > 0 && (fcntl(pidfd, F_GETFD) & FD_CLOEXEC));
    assert(waitpid(pid, &status, 0) == pid);
    close(pidfd);
    return status;
}

static int exit_code(int (*run)(void *), void *argument, const int *keep, size_t n_keep) {
    int pidfd, pid = ik_process_fork(run, argument, keep, n_keep, 0, &pidfd);
    int status = status_of(pid, pidfd);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int starts_clean(void *argument) {
    if (!blocked(SIGTERM) || !blocked(SIGUSR1) || !blocked(SIGRTMIN))
        return 1;
    if (!disposition_is(SIGTERM, SIG_DFL) || !disposition_is(SIGUSR2, SIG_IGN))
        return 2;
    ik_process_unblock();
    return blocked(SIGTERM) || !blocked(SIGUSR1) ? 3 : *(int *)argument;
}

static void signals_are_as_promised(void) {
    int code = OK;
    sigset_t usr1;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    signal(SIGTERM, handler);
    signal(SIGUSR2, SIG_IGN);
    pthread_sigmask(SIG_BLOCK, &usr1, NULL);
    assert(exit_code(starts_clean, &code, NULL, 0) == OK);
    assert(blocked(SIGUSR1) && !blocked(SIGTERM) && disposition_is(SIGTERM, handler));
    pthread_sigmask(SIG_UNBLOCK, &usr1, NULL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGUSR2, SIG_DFL);
}

/* Only the descriptors of the list, which -1 ends, are open. */
static int keeps(void *argument) {
    const int *kept = argument;
    for (int fd = 3; fd <= HIGH; fd++) {
        if (is_open(fd) != (fd == *kept))
            return fd;
        kept += fd == *kept;
    }
    return is_open(0) && is_open(1) && is_open(2) ? 0 : 255;
}

static void only_what_is_kept_stays_open(void) {
    for (int fd = 3; fd < 10; fd++)
        assert(dup2(0, fd) == fd);
    assert(dup2(0, HIGH) == HIGH);
    int some[] = {3, 5, 6, HIGH, -1}, none[] = {-1};
    assert(exit_code(keeps, some, some, 4) == 0);
    assert(exit_code(keeps, none, none, 0) == 0);
    for (int fd = 3; fd < 10; fd++)
        close(fd);
    close(HIGH);
}

static int without_close_range(void *argument) {
    (void)argument;
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_close_range, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    assert(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        return OK; /* a kernel without it has nothing to prove here */
    assert(syscall(SYS_close_range, HIGH, HIGH, 0) < 0 && errno == EPERM);
    only_what_is_kept_stays_open();
    return OK;
}

static void a_refused_close_range_is_made_up_for(void) {
    assert(exit_code(without_close_range, NULL, NULL, 0) == OK);
}

static int at_once(void *argument) {
    (void)argument;
    return OK;
}

static void an_ignored_sigchld_loses_no_status(void) {
    signal(SIGCHLD, SIG_IGN);
    assert(exit_code(at_once, NULL, NULL, 0) == OK);
    assert(disposition_is(SIGCHLD, SIG_DFL));
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_NOCLDWAIT | SA_RESTART};
    sigaction(SIGCHLD, &action, NULL);
    assert(exit_code(at_once, NULL, NULL, 0) == OK);
    sigaction(SIGCHLD, NULL, &action);
    assert(action.sa_handler == handler && !(action.sa_flags & SA_NOCLDWAIT) &&
           action.sa_flags & SA_RESTART);
    signal(SIGCHLD, SIG_DFL);
}

static void fails_and_changes_nothing(int expected) {
    int pidfd = -7, before = n_open();
    signal(SIGCHLD, SIG_IGN);
    assert(ik_process_fork(at_once, NULL, NULL, 0, 0, &pidfd) == expected);
    assert(pidfd == -7 && !blocked(SIGTERM) && disposition_is(SIGCHLD, SIG_IGN));
    assert(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
    signal(SIGCHLD, SIG_DFL);
    assert(n_open() == before);
}

static void limit_descriptors(void) {
    struct rlimit none = {0, 1024};
    setrlimit(RLIMIT_NOFILE, &none);
}

static int no_descriptor_before(void *argument) {
    (void)argument;
    ik_process_unblock();
    limit_descriptors();
    fails_and_changes_nothing(-EMFILE);
    return OK;
}

static int no_descriptor_after(void *argument) {
    (void)argument;
    ik_process_unblock();
    pthread_atfork(NULL, limit_descriptors, NULL);
    fails_and_changes_nothing(-EMFILE);
    return OK;
}

static int no_process(void *argument) {
    (void)argument;
    ik_process_unblock();
    struct rlimit none = {0, 0};
    assert(setrlimit(RLIMIT_NPROC, &none) == 0);
    assert(getuid() != 0 || setuid(65534) == 0); /* root is exempt */
    fails_and_changes_nothing(-EAGAIN);
    return OK;
}

static void a_fork_that_fails_changes_nothing(void) {
    assert(exit_code(no_descriptor_before, NULL, NULL, 0) == OK);
    assert(exit_code(no_descriptor_after, NULL, NULL, 0) == OK);
    assert(exit_code(no_process, NULL, NULL, 0) == OK);
}

static int of_another_parent(void *argument) {
    ik_process_unblock();
    ik_process_die_with_parent(*(int *)argument, getppid() + 1);
    return OK;
}

static int hold(void *argument) {
    assert(write(*(int *)argument, ".", 1) == 1);
    pause();
    return 0;
}

static int orphan(void *argument) {
    int pidfd;
    ik_process_fork(hold, argument, argument, 1, IK_PROCESS_DIE_WITH_PARENT, &pidfd);
    pause();
    return 0;
}

static void a_child_dies_with_its_parent(void) {
    int signum = SIGTERM, end[2], pidfd;
    assert(exit_code(of_another_parent, &signum, NULL, 0) == -SIGTERM);
    assert(ik_process_die_with_parent(12345, getppid()) == -EINVAL);
    assert(pipe2(end, O_CLOEXEC) == 0);
    int pid = ik_process_fork(orphan, &end[1], &end[1], 1, 0, &pidfd);
    close(end[1]);
    char byte;
    assert(read(end[0], &byte, 1) == 1); /* the grandchild runs */
    kill(pid, SIGKILL);
    assert(read(end[0], &byte, 1) == 0); /* and is gone, or this would wait */
    assert(WTERMSIG(status_of(pid, pidfd)) == SIGKILL);
    close(end[0]);
}

static int as_init_of_a_namespace(void *argument) {
    (void)argument;
    ik_process_unblock();
    if (unshare(CLONE_NEWPID) < 0)
        return OK; /* not allowed here */
    int pidfd, pid = ik_process_fork(at_once, NULL, NULL, 0, IK_PROCESS_DIE_WITH_PARENT, &pidfd);
    return WEXITSTATUS(status_of(pid, pidfd));
}

static void a_parent_in_an_outer_namespace_is_not_dead(void) {
    assert(exit_code(as_init_of_a_namespace, NULL, NULL, 0) == OK);
}

int main(void) {
    signals_are_as_promised();
    only_what_is_kept_stays_open();
    a_refused_close_range_is_made_up_for();
    an_ignored_sigchld_loses_no_status();
    a_fork_that_fails_changes_nothing();
    a_child_dies_with_its_parent();
    a_parent_in_an_outer_namespace_is_not_dead();
    return 0;
}

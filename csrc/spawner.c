/* SPDX-License-Identifier: MIT */
#include "spawner.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "process.h"
#include "sockets.h"
#include "spawner_impl.h"
#include "wait.h"

#ifndef IK_BUILD
#define IK_BUILD "unnamed"
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef P_PIDFD
#define P_PIDFD 3
#endif

enum { LOOK_MS = 100 };

const char *ik_spawner_build(void) {
    return IK_BUILD;
}

static int send_request(const ik_spawner *s, int work, const void *job, size_t size, const int *fds,
                        size_t n_fds) {
    ik_spawner_request request = {.work = work, .size = (uint32_t)size};
    if (size > sizeof request.job || n_fds > IK_SPAWNER_MOST_FDS)
        return -EINVAL;
    memcpy(request.job, job, size);
    size_t len = offsetof(ik_spawner_request, job) + size;
    int64_t n = ik_sockets_send_fds(s->control, &request, len, fds, n_fds, IK_FOREVER);
    return n < 0 ? (int)n : 0;
}

/* SIGSTOP, or a debugger: nothing is lost by killing it, and everything waits for it. */
static void end_if_stopped(const ik_spawner *s) {
    siginfo_t stopped = {0};
    if (waitid(P_PIDFD, (id_t)s->pidfd, &stopped, WSTOPPED | WNOHANG | WNOWAIT) == 0 &&
        stopped.si_pid != 0)
        syscall(SYS_pidfd_send_signal, s->pidfd, SIGKILL, NULL, 0);
}

/* The answer; or, if the spawner has ended without one, what it has left behind. */
static int receive_answer(const ik_spawner *s) {
    struct pollfd both[] = {{.fd = s->control, .events = POLLIN},
                            {.fd = s->pidfd, .events = POLLIN}};
    for (int answer;;) {
        if (poll(both, 2, LOOK_MS) == 0)
            end_if_stopped(s);
        if (both[0].revents & POLLIN &&
            recv(s->control, &answer, sizeof answer, MSG_DONTWAIT) == sizeof answer)
            return answer;
        if (both[0].revents & POLLHUP)
            both[0].fd = -1; /* it is about to end */
        if (both[1].revents) {
            /* Relaxed: the kernel wrote it before that process ended. */
            int child = __atomic_load_n(&s->shared->child, __ATOMIC_RELAXED);
            return child > 0 ? child : -ESRCH;
        }
    }
}

static int ask(const ik_spawner *s, int work, const void *job, size_t size, const int *fds,
               size_t n_fds) {
    __atomic_store_n(&s->shared->child, 0, __ATOMIC_RELAXED);
    int rc = send_request(s, work, job, size, fds, n_fds);
    if (rc < 0)
        return rc == -EPIPE || rc == -ECONNRESET ? -ESRCH : rc;
    return receive_answer(s);
}

int ik_spawner_ask(const ik_spawner *spawner, int work, const void *job, size_t size,
                   const int *fds, size_t n_fds, int *ret_pidfd) {
    int rc = ik_process_before_fork();
    if (rc < 0)
        return rc;
    int pid = ask(spawner, work, job, size, fds, n_fds);
    rc = ik_process_after_fork(pid);
    if (rc < 0)
        return rc;
    *ret_pidfd = rc;
    return pid;
}

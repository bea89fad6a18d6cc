/* SPDX-License-Identifier: MIT */
/* spawner_main.c - the program behind spawner.h, and the logger of a message log.
 *
 *   TITLE spawner BUILD CONTROL PIDFD MEMORY PARENT   makes children for PARENT, until that ends
 *   TITLE logger BUILD FORMAT DURABILITY READER ...   is one
 *
 * It is executed with all signals blocked and default actions. Only the descriptors that are named
 * stay open; 0, 1 and 2 are /dev/null, the folder is "/": nothing of the host is held that the host
 * may want to get rid of. Limits, priority, environment are those of the host when it started this.
 *
 * Design: why the logger is executed, and no child of a spawner. A program that has a log and no
 * server gets one process so, and not two; a logger is started seldom, so the half millisecond of
 * execve(2) is no matter.
 *
 * A child may take no robust mutex and start no thread: clone3(2) called past the C library leaves
 * the library's record of the thread's number as it was in the parent. Connections and workers do
 * neither.
 */
#include "spawner.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "connection.h"
#include "messagelog.h"
#include "prefork.h"
#include "process.h"
#include "sockets.h"
#include "spawner_impl.h"
#include "wait.h"

#ifndef SYS_clone3
#define SYS_clone3 435
#endif

enum { LOGGER_FDS = 10, LOGGER_ARGUMENTS = 5 + LOGGER_FDS };

/* Exit status: executed by another build, or by hand. */
enum { NOT_FOR_US = 125 };

/* --- what every such process is ----------------------------------------------------------------*/

static char *title;
static size_t title_size;

/* What ps and top show: the memory of the arguments, which lie one behind the other, and the name.
 * The first argument is a title itself, so that stays with NULL. */
static void set_title(const char *text, const char *name) {
    size_t kept = text ? 0 : strlen(title);
    memset(title + kept, 0, title_size - kept);
    if (text)
        strncpy(title, text, title_size - 1);
    prctl(PR_SET_NAME, name);
}

static void be_nowhere(void) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd < 3 && null >= 0; fd++)
        dup2(null, fd);
    if (null > 2)
        close(null);
    (void)!chdir("/");
}

static int by_number(const void *left, const void *right) {
    return *(const int *)left - *(const int *)right;
}

/* The numbers in the arguments, which are descriptors: all that stays open. */
static void take_descriptors(char **argv, int *ret_fds, size_t n) {
    int sorted[16]; /* LOGGER_FDS at the most */
    for (size_t i = 0; i < n; i++) {
        ret_fds[i] = sorted[i] = atoi(argv[i]);
        fcntl(ret_fds[i], F_SETFD, FD_CLOEXEC);
    }
    qsort(sorted, n, sizeof *sorted, by_number);
    ik_process_close_all_but(sorted, n);
}

/* --- the log
 * ------------------------------------------------------------------------------------*/

/* None of its descriptors but the memory, which is mapped. */
static ik_log log_of(int format, int durability, int memory) {
    ik_log log = {.reader = -1,
                  .writer = -1,
                  .handed = -1,
                  .hand = -1,
                  .staging_reader = -1,
                  .staging_writer = -1,
                  .parked = -1,
                  .park = -1,
                  .wake = -1,
                  .acked = -1,
                  .told = -1,
                  .tell = -1,
                  .file = -1,
                  .format = format,
                  .durability = durability,
                  .shared = ik_log_map(memory)};
    close(memory);
    return log;
}

static int be_logger(char **argv) {
    int fds[LOGGER_FDS];
    take_descriptors(argv + 2, fds, LOGGER_FDS);
    ik_log log = log_of(atoi(argv[0]), atoi(argv[1]), fds[9]);
    log.reader = fds[0];
    log.handed = fds[1];
    log.staging_reader = fds[2];
    log.staging_writer = fds[3];
    log.parked = fds[4];
    log.park = fds[5];
    log.wake = fds[6];
    log.acked = fds[7];
    log.told = fds[8];
    set_title(NULL, "ipckit-logger"); /* the arguments are read */
    return log.shared ? ik_log_run(&log) : ENOMEM;
}

/* --- what the children do ----------------------------------------------------------------------*/

/* All of a piece of shared memory, whose descriptor is of no more use then. NULL without memory. */
static void *map(int fd) {
    struct stat memory;
    void *at = MAP_FAILED;
    if (fstat(fd, &memory) == 0)
        at = mmap(NULL, (size_t)memory.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return at == MAP_FAILED ? NULL : at;
}

static ik_log *use_log(ik_log *log, const int *fds) {
    *log = log_of(log->format, log->durability, fds[4]);
    log->writer = fds[0];
    log->hand = fds[1];
    log->wake = fds[2];
    log->acked = fds[3];
    return log;
}

/* What both kinds of job begin with; 0 without memory. */
static int use_shared(ik_connection *c, ik_log *log, int counters, const int *log_fds) {
    c->counters = map(counters);
    if (c->log)
        c->log = use_log(log, log_fds);
    return c->counters && (!c->log || log->shared);
}

static int serve_connection(void *argument, const int *fds) {
    ik_connection_job *job = argument;
    char text[32 + sizeof job->connection.peer];
    snprintf(text, sizeof text, "ipckit connection from %s", job->connection.peer);
    set_title(text, "ipckit-conn");
    job->connection.socket = fds[0];
    if (!use_shared(&job->connection, &job->log, fds[1], fds + 2))
        return IK_END_NO_MEMORY;
    return ik_connection_child(&job->connection);
}

_Static_assert(sizeof(ik_connection_job) <= IK_SPAWNER_MOST_BYTES &&
                   sizeof(ik_prefork_worker) <= IK_SPAWNER_MOST_BYTES,
               "a job fits into a request");

static int work(void *argument, const int *fds) {
    ik_prefork_worker *worker = argument;
    char text[32];
    snprintf(text, sizeof text, "ipckit worker %d", worker->index);
    set_title(text, "ipckit-worker");
    worker->board = map(fds[0]);
    worker->bell = fds[2];
    const int *next = fds + 3;
    if (worker->events >= 0)
        worker->events = *next++;
    memcpy(worker->listeners, next, sizeof *next * (size_t)worker->n_listeners);
    if (!worker->board ||
        !use_shared(&worker->form, &worker->log, fds[1], next + worker->n_listeners))
        return ENOMEM;
    return ik_prefork_run(worker);
}

/* --- the spawner -------------------------------------------------------------------------------*/

typedef struct spawner {
    int control;
    int host; /* pidfd of the process that started us */
    int host_pid;
    ik_spawner_shared *shared;
} spawner;

/* A child of the process that started us; its pid is in shared memory before it runs. 0 in it. */
static int clone_child(const spawner *s) {
    struct clone_args args = {.flags = CLONE_PARENT | CLONE_PARENT_SETTID,
                              .parent_tid = (uint64_t)(uintptr_t)&s->shared->child};
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0 && (errno == ENOSYS || errno == EPERM)) /* a container's filter */
        pid = syscall(SYS_clone, args.flags, NULL, &s->shared->child, NULL, NULL);
    return pid < 0 ? -errno : (int)pid;
}

static _Noreturn void be_child(const spawner *s, ik_spawner_request *request, const int *fds) {
    ik_process_die_with_parent(SIGKILL, s->host_pid);
    close(s->control);
    close(s->host);
    munmap(s->shared, sizeof *s->shared);
    if (request->work == IK_SPAWNER_CONNECTION)
        _exit(serve_connection(request->job, fds));
    _exit(work(request->job, fds));
}

static int is_whole(const ik_spawner_request *request, int64_t len) {
    size_t size = request->work == IK_SPAWNER_CONNECTION ? sizeof(ik_connection_job)
                  : request->work == IK_SPAWNER_WORKER   ? sizeof(ik_prefork_worker)
                                                         : 0;
    return len == (int64_t)(offsetof(ik_spawner_request, job) + size) && request->size == size;
}

/* 0 when the host has gone. */
static int serve_request(const spawner *s) {
    ik_spawner_request request;
    ik_sockets_fds came = {0};
    int64_t len = ik_sockets_recv_fds(s->control, &request, sizeof request, &came,
                                      IK_SPAWNER_MOST_FDS, IK_NOW);
    if (len == 0)
        return 0;
    int answer = len < 0 ? (int)len : -EINVAL;
    if (len > 0 && is_whole(&request, len))
        answer = clone_child(s);
    if (answer == 0)
        be_child(s, &request, came.fd);
    while (came.count > 0)
        close(came.fd[--came.count]);
    return len == -EAGAIN || ik_sockets_send(s->control, &answer, sizeof answer, 0, IK_NOW) > 0;
}

static int be_spawner(char **argv) {
    int fds[3];
    take_descriptors(argv, fds, 3);
    spawner s = {
        .control = fds[0], .host = fds[1], .host_pid = atoi(argv[3]), .shared = map(fds[2])};
    set_title(NULL, "ipckit-spawner");
    if (s.shared == NULL)
        return ENOMEM;
    struct pollfd both[] = {{.fd = s.control, .events = POLLIN}, {.fd = s.host, .events = POLLIN}};
    do
        poll(both, 2, -1);
    while (!both[1].revents && (!both[0].revents || serve_request(&s)));
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 7 || strcmp(argv[2], ik_spawner_build()) != 0)
        return NOT_FOR_US;
    title = argv[0];
    title_size = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) + 1 - argv[0]);
    be_nowhere();
    if (strcmp(argv[1], "logger") == 0 && argc == LOGGER_ARGUMENTS)
        return be_logger(argv + 3);
    if (strcmp(argv[1], "spawner") == 0 && argc == 7)
        return be_spawner(argv + 3);
    return NOT_FOR_US;
}

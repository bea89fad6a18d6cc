/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "messagelog.h"
#include "wait.h"

static ik_log open_log(int format, int durability) {
    int fd[2], memory = memfd_create("test", MFD_CLOEXEC), file = memfd_create("log", MFD_CLOEXEC);
    assert(pipe2(fd, O_CLOEXEC) == 0 && memory >= 0 && file >= 0);
    assert(fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0 && fcntl(fd[1], F_SETPIPE_SZ, 4096) == 4096);
    assert(ftruncate(memory, (off_t)ik_log_shared_size()) == 0);
    ik_log log = {.reader = fd[0], .writer = fd[1], .file = file, .format = format};
    log.wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    log.durability = durability;
    log.shared = ik_log_map(memory);
    assert(log.shared && ik_log_shared_init(log.shared) == 0);
    close(memory);
    return log;
}

static void close_log(ik_log *log) {
    close(log->reader);
    close(log->file);
    close(log->wake);
    ik_log_unmap(log->shared);
}

static int append(ik_log *log, const char *text, size_t len, int64_t deadline_ns) {
    ik_append one = {.data = text, .len = len};
    int rc;
    do
        rc = ik_log_append(log, &one, deadline_ns);
    while (rc == -EINTR);
    ik_log_abandon(log, &one);
    return rc;
}

static int start_logger(ik_log *log) {
    int pid = fork();
    if (pid == 0) {
        close(log->writer);
        _exit(ik_log_run(log));
    }
    return pid;
}

static void a_writer_killed_in_a_long_message_frees_the_lock(void) {
    enum { LONG = 100000 };
    ik_log log = open_log(IK_LOG_RECORD, IK_LOG_NONE);
    int writer = fork();
    if (writer == 0) {
        char *text = calloc(1, LONG);
        append(&log, text, LONG, IK_FOREVER); /* the pipe holds 4096: it waits in the middle */
        _exit(0);
    }
    while (ik_log_backlog(&log) < 4096)
        ik_wait_fd(-1, 0, ik_wait_now() + 1000000);
    kill(writer, SIGKILL);
    assert(waitpid(writer, NULL, 0) == writer);
    assert(append(&log, "next\n", 5, IK_NOW) == -ETIMEDOUT); /* the pipe is full */
    int logger = start_logger(&log);
    assert(append(&log, "next\n", 5, ik_wait_now() + 20000000000) == 0);
    ik_log_counters counters;
    ik_log_read_counters(&log, &counters);
    assert(counters.torn == 1 && counters.messages == 1);
    close(log.writer);
    int status;
    assert(waitpid(logger, &status, 0) == logger && status == 0);
    char end[7];
    assert(lseek(log.file, -6, SEEK_END) >= 4096 && read(log.file, end, 6) == 6);
    assert(memcmp(end, "\nnext\n", 6) == 0);
    close_log(&log);
}

static void acknowledged_is_in_the_file(int durability) {
    ik_log log = open_log(IK_LOG_RAW, durability);
    int logger = start_logger(&log);
    char byte;
    for (int i = 0; i < 200; i++) {
        byte = (char)i;
        assert(append(&log, &byte, 1, ik_wait_now() + 20000000000) == 0);
        assert(pread(log.file, &byte, 1, i) == 1 && byte == (char)i);
    }
    close(log.writer);
    int status;
    assert(waitpid(logger, &status, 0) == logger && status == 0);
    close_log(&log);
}

/* Every length and content stays within the bound, and within PIPE_BUF as the servers need it. */
static void records_stay_within_their_bound(void) {
    static unsigned char data[5000];
    srand(1);
    for (size_t len = 0; len < sizeof data; len = len * 5 / 4 + 1)
        for (int kind = 0; kind < 4; kind++) {
            for (size_t i = 0; i < len; i++)
                data[i] = (unsigned char)(kind == 0   ? rand()
                                          : kind == 1 ? '\x01'
                                          : kind == 2 ? 'a'
                                          : i % 2     ? 0x80
                                                      : 0xc2);
            const char *peer = "[0123:4567:89ab:cdef:0123:4567:89ab:cdef]:65535";
            size_t bound = ik_log_record_bound(len, peer);
            char *line = malloc(bound); /* exactly: a checker sees any byte beyond */
            size_t n = ik_log_format_record(line, data, len, peer, UINT64_MAX);
            assert(n <= bound && line[n - 1] == '\n' && memchr(line, '\n', n) == line + n - 1);
            assert(len > 2880 || n <= PIPE_BUF);
            free(line);
        }
}

int main(void) {
    a_writer_killed_in_a_long_message_frees_the_lock();
    acknowledged_is_in_the_file(IK_LOG_WRITTEN);
    acknowledged_is_in_the_file(IK_LOG_SYNCED);
    records_stay_within_their_bound();
    return 0;
}

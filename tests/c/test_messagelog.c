/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
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
    log.acked = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    int ends[2];
    assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    log.told = ends[0];
    log.tell = ends[1];
    assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    log.handed = ends[0];
    log.hand = ends[1];
    assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    log.parked = ends[0];
    log.park = ends[1];
    assert(pipe2(fd, O_CLOEXEC) == 0 && fcntl(fd[1], F_SETPIPE_SZ, 4096) == 4096);
    log.staging_reader = fd[0];
    log.staging_writer = fd[1];
    log.durability = durability;
    log.shared = ik_log_map(memory);
    assert(log.shared && ik_log_park(&log, file) == 0);
    close(memory);
    return log;
}

static void close_log(ik_log *log) {
    const int all[] = {
        log->reader, log->file, log->staging_reader, log->staging_writer, log->handed,
        log->parked, log->park};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        close(all[i]);
    close(log->wake);
    close(log->acked);
    close(log->told);
    close(log->tell);
    ik_log_unmap(log->shared);
}

static int append(ik_log *log, const char *text, size_t len, int64_t deadline_ns) {
    ik_append one = {.data = text, .len = len};
    int rc;
    do
        rc = ik_log_append(log, &one, deadline_ns);
    while (rc == -EINTR);
    return rc;
}

static int start_logger(ik_log *log) {
    int pid = fork();
    if (pid == 0) {
        close(log->writer);
        close(log->hand);
        close(log->tell);
        _exit(ik_log_run(log));
    }
    return pid;
}

/* The last writer goes; all is in the file then. */
static void end_logger(ik_log *log, int logger) {
    int status;
    close(log->writer);
    close(log->hand);
    assert(waitpid(logger, &status, 0) == logger && status == 0);
}

static int64_t soon(void) {
    return ik_wait_now() + 120000000000; /* however busy the machine is */
}

/* At any moment: the message is whole in the file, or nothing of it. Loggers are killed too. */
static void a_writer_killed_in_a_long_message_leaves_all_or_nothing(void) {
    enum { LONG = 100000, TIMES = 40 };
    ik_log log = open_log(IK_LOG_RAW, IK_LOG_NONE);
    static char text[LONG];
    memset(text, 'x', sizeof text);
    int logger = start_logger(&log), appended = 0;
    for (int i = 0; i < TIMES; i++) {
        int writer = fork(), status;
        if (writer == 0)
            _exit(append(&log, text, LONG, IK_FOREVER) != 0);
        ik_wait_fd(-1, 0, ik_wait_now() + rand() % 400000);
        kill(i % 2 ? logger : writer, SIGKILL);
        assert(waitpid(writer, &status, 0) == writer);
        appended += status == 0;
        if (i % 2) {
            assert(waitpid(logger, NULL, 0) == logger);
            logger = start_logger(&log);
        }
        assert(append(&log, "|", 1, soon()) == 0);
    }
    end_logger(&log, logger);
    int64_t size = lseek(log.file, 0, SEEK_END), whole = size / LONG;
    assert(whole >= appended && whole <= TIMES && size % LONG == TIMES);
    char *all = malloc((size_t)size);
    assert(pread(log.file, all, (size_t)size, 0) == size);
    for (int64_t i = 0, since = 0; i < size; i++)
        if (all[i] == '|') {
            assert((i - since) % LONG == 0);
            since = i + 1;
        }
    free(all);
    close_log(&log);
}

static void acknowledged_is_in_the_file(int durability) {
    ik_log log = open_log(IK_LOG_RAW, durability);
    int logger = start_logger(&log);
    char byte;
    for (int i = 0; i < 200; i++) {
        byte = (char)i;
        assert(append(&log, &byte, 1, soon()) == 0);
        assert(pread(log.file, &byte, 1, i) == 1 && byte == (char)i);
    }
    end_logger(&log, logger);
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

/* --- event loops -------------------------------------------------------------------------------*/

static int is_readable(int fd) {
    return ik_wait_fd(fd, POLLIN, IK_NOW) > 0;
}

static void hear(const ik_log *log) {
    uint64_t drained;
    assert(ik_wait_fd(log->acked, POLLIN, soon()) > 0);
    assert(read(log->acked, &drained, sizeof drained) == sizeof drained);
}

/* Fill the pipe of 4096 bytes, so that nothing of more than no bytes has room. */
static void fill(ik_log *log, char byte) {
    char page[4096];
    memset(page, byte, sizeof page);
    assert(append(log, page, sizeof page, IK_NOW) == 0);
}

/* What had no room is not held anywhere: it may be given up, or be another text next time. */
static void a_full_pipe_holds_nothing_of_a_short_message(void) {
    ik_log log = open_log(IK_LOG_RAW, IK_LOG_NONE);
    fill(&log, 'x');
    char text[] = "first";
    ik_append waits = {.data = text, .len = 5}, given_up = {.data = text, .len = 5};
    for (int i = 0; i < 3; i++) {
        assert(ik_log_append(&log, &waits, IK_NOW) == -ETIMEDOUT);
        assert(waits.full && !waits.appended && !waits.asked);
        assert(ik_log_append(&log, &given_up, IK_NOW) == -ETIMEDOUT);
    }
    assert(ik_wait_fd(log.writer, POLLOUT, IK_NOW) == -ETIMEDOUT);
    memset(text, 0, sizeof text);
    int logger = start_logger(&log);
    assert(ik_wait_fd(log.writer, POLLOUT, soon()) == POLLOUT);
    waits.data = "second";
    waits.len = 6;
    assert(ik_log_append(&log, &waits, IK_NOW) == 0 && !waits.full);
    end_logger(&log, logger);
    char end[8];
    assert(pread(log.file, end, sizeof end, 4095) == 7 && memcmp(end, "xsecond", 7) == 0);
    close_log(&log);
}

static void one_ring_acknowledges_many(int durability) {
    enum { MANY = 100 };
    ik_log log = open_log(IK_LOG_RAW, durability);
    ik_append many[MANY] = {0};
    for (int i = 0; i < MANY; i++) {
        many[i].data = "0123456789";
        many[i].len = 10;
        assert(ik_log_append(&log, &many[i], IK_NOW) == -ETIMEDOUT);
        assert(many[i].asked && !many[i].full && many[i].appended);
    }
    assert(!is_readable(log.acked));
    int logger = start_logger(&log);
    hear(&log); /* it may be that of the beginning */
    if (ik_log_append(&log, &many[0], IK_NOW) != 0)
        hear(&log);
    for (int i = 0; i < MANY; i++)
        assert(ik_log_append(&log, &many[i], IK_NOW) == 0);
    assert(lseek(log.file, 0, SEEK_END) == MANY * 10);
    end_logger(&log, logger);
    close_log(&log);
}

/* A logger killed with tickets unanswered, or between its answer and its ring: the next one rings.
 */
static void the_next_logger_rings(void) {
    ik_log log = open_log(IK_LOG_RAW, IK_LOG_WRITTEN);
    for (int i = 0; i < 20; i++) {
        ik_append waits = {.data = "x", .len = 1};
        assert(ik_log_append(&log, &waits, IK_NOW) == -ETIMEDOUT);
        for (int deaths = 0; deaths < 3; deaths++) {
            int victim = start_logger(&log);
            ik_wait_fd(-1, 0, ik_wait_now() + rand() % 1000000);
            kill(victim, SIGKILL);
            assert(waitpid(victim, NULL, 0) == victim);
        }
        uint64_t drained;
        while (read(log.acked, &drained, sizeof drained) > 0)
            ;
        int logger = start_logger(&log);
        hear(&log);
        if (ik_log_append(&log, &waits, IK_NOW) != 0) {
            hear(&log);
            assert(ik_log_append(&log, &waits, IK_NOW) == 0);
        }
        kill(logger, SIGKILL);
        assert(waitpid(logger, NULL, 0) == logger);
    }
    int logger = start_logger(&log);
    end_logger(&log, logger);
    assert(lseek(log.file, 0, SEEK_END) == 20);
    close_log(&log);
}

/* --- another file ------------------------------------------------------------------------------*/

static void an_offered_file_gets_what_comes_later(int durability, int flags) {
    ik_log log = open_log(IK_LOG_RAW, durability);
    assert(fcntl(log.file, F_SETFL, flags) == 0); /* O_APPEND: splice refuses it */
    int logger = start_logger(&log), files[4];
    for (int i = 0; i < 4; i++) {
        char text[9], byte;
        assert(append(&log, "message", 7, soon()) == 0);
        files[i] = memfd_create("next", MFD_CLOEXEC);
        assert(ik_log_offer(&log, files[i], soon()) == 0);
        assert(ik_wait_fd(log.tell, POLLIN, soon()) > 0);
        assert(read(log.tell, &byte, 1) == 1 && ik_log_withdraw(&log) == (uint32_t)i + 1);
        assert(pread(i ? files[i - 1] : log.file, text, sizeof text, 0) == 7);
    }
    assert(append(&log, "the end", 7, soon()) == 0);
    end_logger(&log, logger);
    assert(lseek(files[3], 0, SEEK_END) == 7);
    for (int i = 0; i < 4; i++)
        close(files[i]);
    close_log(&log);
}

/* A late logger finds offers that are withdrawn, and the one that stands is taken. */
static void a_withdrawn_offer_is_not_taken(void) {
    ik_log log = open_log(IK_LOG_RAW, IK_LOG_WRITTEN);
    int files[3];
    for (int i = 0; i < 3; i++)
        files[i] = memfd_create("next", MFD_CLOEXEC);
    assert(ik_log_offer(&log, files[0], soon()) == 0 && ik_log_withdraw(&log) == 0);
    int logger = start_logger(&log);
    assert(append(&log, "a", 1, soon()) == 0);
    assert(ik_log_withdraw(&log) == 0 && lseek(log.file, 0, SEEK_END) == 1);
    kill(logger, SIGSTOP);
    assert(waitpid(logger, NULL, WUNTRACED) == logger);
    assert(ik_log_offer(&log, files[1], soon()) == 0);
    assert(ik_log_offer(&log, files[2], soon()) == 0);
    kill(logger, SIGCONT);
    assert(ik_wait_fd(log.tell, POLLIN, soon()) > 0 && ik_log_withdraw(&log) == 3);
    assert(append(&log, "b", 1, soon()) == 0);
    end_logger(&log, logger);
    assert(lseek(files[0], 0, SEEK_END) == 0 && lseek(files[1], 0, SEEK_END) == 0);
    assert(lseek(files[2], 0, SEEK_END) == 1);
    for (int i = 0; i < 3; i++)
        close(files[i]);
    close_log(&log);
}

/* Those that came before and after it stay so; it is in one file, whatever is offered meanwhile. */
static void a_long_message_stays_whole_and_in_its_place(void) {
    enum { LONG = 1 << 20 };
    ik_log log = open_log(IK_LOG_RAW, IK_LOG_NONE);
    static char text[LONG];
    assert(append(&log, "before", 6, soon()) == 0 && append(&log, text, LONG, soon()) == 0);
    assert(ik_log_backlog(&log) == LONG + 6);
    ik_append after = {.data = "after", .len = 5};
    assert(ik_log_append(&log, &after, IK_NOW) == -ETIMEDOUT && !after.full && !after.appended);
    int next = memfd_create("next", MFD_CLOEXEC);
    assert(ik_log_offer(&log, next, soon()) == 0);
    int logger = start_logger(&log);
    assert(ik_wait_fd(log.tell, POLLIN, soon()) > 0 && ik_log_withdraw(&log) == 1);
    assert(lseek(log.file, 0, SEEK_END) == LONG + 6 && lseek(next, 0, SEEK_END) == 0);
    while (ik_log_append(&log, &after, IK_NOW) != 0)
        ik_wait_fd(log.acked, POLLIN, ik_wait_now() + 1000000);
    end_logger(&log, logger);
    assert(lseek(next, 0, SEEK_END) == 5 && ik_log_backlog(&log) == 0);
    ik_log_counters counters;
    ik_log_read_counters(&log, &counters);
    assert(counters.split == 0 && counters.messages == 3 && counters.bytes == LONG + 11);
    close(next);
    close_log(&log);
}

int main(void) {
    a_writer_killed_in_a_long_message_leaves_all_or_nothing();
    acknowledged_is_in_the_file(IK_LOG_WRITTEN);
    acknowledged_is_in_the_file(IK_LOG_SYNCED);
    records_stay_within_their_bound();
    a_full_pipe_holds_nothing_of_a_short_message();
    one_ring_acknowledges_many(IK_LOG_WRITTEN);
    one_ring_acknowledges_many(IK_LOG_SYNCED);
    the_next_logger_rings();
    an_offered_file_gets_what_comes_later(IK_LOG_NONE, 0);
    an_offered_file_gets_what_comes_later(IK_LOG_WRITTEN, 0);
    an_offered_file_gets_what_comes_later(IK_LOG_SYNCED, O_APPEND);
    a_withdrawn_offer_is_not_taken();
    a_long_message_stays_whole_and_in_its_place();
    return 0;
}

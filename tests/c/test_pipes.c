/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "pipes.h"
#include "wait.h"

enum { SIZE = 1 << 17 };
static char memory[SIZE];

static ik_pipes_writer writer;
static ik_pipes_reader reader;

static void open_pipe(void) {
    int fd[2];
    assert(pipe2(fd, O_NONBLOCK | O_CLOEXEC) == 0);
    reader = (ik_pipes_reader){.fd = fd[0], .largest = 1 << 20, .buffer = memory, .size = SIZE};
    writer = (ik_pipes_writer){.fd = fd[1]};
}

static void close_pipe(void) {
    close(reader.fd);
    close(writer.fd);
}

static int pending(void) {
    int n;
    assert(ioctl(reader.fd, FIONREAD, &n) == 0);
    return n;
}

static void a_small_message_is_one_chunk(void) {
    open_pipe();
    assert(ik_pipes_send(&writer, "hello", 5, NULL, IK_FOREVER) == 0);
    assert(ik_pipes_send(&writer, "", 0, NULL, IK_FOREVER) == 0);
    assert(pending() == 2 * sizeof(ik_pipes_chunk) + 5);
    assert(ik_pipes_next(&reader, 1, IK_NOW) == IK_PIPES_WHOLE);
    assert(reader.length == 5 && memcmp(memory + reader.at, "hello", 5) == 0);
    assert(pending() == sizeof(ik_pipes_chunk)); /* the next is still where select sees it */
    assert(ik_pipes_next(&reader, 1, IK_NOW) == IK_PIPES_WHOLE && reader.length == 0);
    assert(ik_pipes_next(&reader, 1, ik_wait_now() + 1000000) == -ETIMEDOUT);
    close(writer.fd);
    assert(ik_pipes_next(&reader, 1, IK_FOREVER) == -ENODATA);
    close(reader.fd);
}

static void a_large_message_goes_on_after_a_timeout(void) {
    open_pipe();
    size_t len = 500000;
    char *out = malloc(len), *in = calloc(1, len);
    for (size_t i = 0; i < len; i++)
        out[i] = (char)(i * 7);
    ik_pipes_part sent = {.pid = 1, .lane = 2, .total = (uint32_t)len}, got;
    int rc, came, turns = 0;
    do {
        rc = ik_pipes_send(&writer, out, len, &sent, IK_NOW);
        assert(rc == 0 || rc == -ETIMEDOUT);
        came = ik_pipes_next(&reader, 1, IK_NOW);
        if (came == IK_PIPES_LANE) {
            ik_pipes_begin(&reader, &got, in);
            came = ik_pipes_next(&reader, 1, IK_NOW);
        }
        turns++;
    } while (came == -ETIMEDOUT);
    assert(came == IK_PIPES_PART && turns > 1 && memcmp(in, out, len) == 0);
    free(out);
    free(in);
    close_pipe();
}

static void one_write_takes_many_small_ones_and_each_fits_atomically(void) {
    open_pipe();
    uint32_t lengths[1000];
    for (int i = 0; i < 1000; i++)
        lengths[i] = (uint32_t)(i % 20);
    char data[20 * 1000];
    memset(data, 'x', sizeof data);
    ik_pipes_batch batch = {.data = data, .lengths = lengths, .count = 1000};
    assert(ik_pipes_send_many(&writer, &batch, IK_NOW) == 0 && batch.next == 1000);
    for (int i = 0; i < 1000; i++) {
        assert(ik_pipes_next(&reader, 1000, IK_NOW) == IK_PIPES_WHOLE);
        assert(reader.length == lengths[i]);
    }
    close_pipe();
}

static void no_reader_is_epipe_and_not_a_signal(void) {
    open_pipe();
    assert(signal(SIGPIPE, SIG_DFL) != SIG_ERR);
    close(reader.fd);
    assert(ik_pipes_send(&writer, "x", 1, NULL, IK_FOREVER) == -EPIPE);
    assert(ik_pipes_write(writer.fd, "x", 1) == -EPIPE);
    sigset_t left;
    assert(sigpending(&left) == 0 && !sigismember(&left, SIGPIPE));
    close(writer.fd);
}

/* Any bytes at all: an error or a message, but nothing outside of the buffers. */
static void noise(void) {
    srand(1);
    for (int round = 0; round < 20000; round++) {
        open_pipe();
        char bytes[120];
        for (size_t i = 0; i < sizeof bytes; i++)
            bytes[i] = (char)(rand() % 3 ? rand() % 5 : rand());
        for (size_t i = 0; i + 2 < sizeof bytes; i += (size_t)(24 + rand() % 8))
            memcpy(bytes + i, "\x69\x6b", 2);
        assert(write(writer.fd, bytes, sizeof bytes) == sizeof bytes);
        ik_pipes_part part = {0};
        char *into = NULL;
        int came;
        while ((came = ik_pipes_next(&reader, (uint32_t)(rand() % 3), IK_NOW)) > 0) {
            if (came != IK_PIPES_LANE)
                continue;
            if (reader.head.offset > 0)
                break;
            free(into);
            into = malloc(reader.head.total);
            ik_pipes_begin(&reader, &part, into);
        }
        free(into);
        close_pipe();
    }
}

int main(void) {
    a_small_message_is_one_chunk();
    a_large_message_goes_on_after_a_timeout();
    one_write_takes_many_small_ones_and_each_fits_atomically();
    no_reader_is_epipe_and_not_a_signal();
    noise();
    return 0;
}

/* messagelog_impl.h - what the writers' and the logger's half of a message log share. */
#pragma once
#include <errno.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "messagelog.h"
#include "sockets.h"
#include "wait.h"

/* No internal wait is longer than this before it looks again whether it still makes sense. */
enum { SLICE_NS = 100000000, MOVE_MAX = 1 << 20, SMALL_MOVE = 1 << 15, MOMENT_NS = 1000000 };

struct ik_log_shared {
    _Atomic uint64_t messages;
    _Atomic uint64_t bytes;
    /* Messages that were handed over, or were about to be when their writer was killed. */
    _Atomic uint32_t handed;
    /* Acknowledgements: writers count asked up after their write, the logger sets done to the value
     * of asked that it read before it moved all that there was. */
    _Atomic uint32_t asked;
    _Atomic uint32_t done;
    /* An event loop wants acked to be rung when done changes. */
    _Atomic uint32_t awaits_done;
    /* The number of the file in use, which is that of its offer, and that of the open offer, or 0:
     * one word, because a file is taken if and only if its offer is still open. */
    _Atomic uint64_t turn;
    _Atomic uint32_t offers;
    _Atomic uint32_t split;
    /* The logger's. */
    _Atomic uint32_t received; /* of what was handed over */
    _Atomic int64_t staged;    /* bytes in the second pipe, or more at the moment */
    _Atomic int error;
    /* The last file of which fdatasync failed, and its errno; 0: it never did. */
    _Atomic uint64_t unsynced;
};

/* The packet that brings a file. */
typedef struct packet {
    uint32_t number; /* of its offer; 0: the first file */
    int64_t until_ns;
} packet;

/* Two numbers in one word. */
static inline uint64_t pair(uint32_t high, uint32_t low) {
    return (uint64_t)high << 32 | low;
}

static inline uint32_t high(uint64_t word) {
    return (uint32_t)(word >> 32);
}

static inline uint32_t low(uint64_t word) {
    return (uint32_t)word;
}

static inline int64_t earlier(int64_t deadline_ns, int64_t other_ns) {
    return deadline_ns == IK_FOREVER || deadline_ns > other_ns ? other_ns : deadline_ns;
}

/* Of the file in use: with another one the disk has another chance. */
static inline int sync_error(const ik_log_shared *shared) {
    uint64_t unsynced = atomic_load_explicit(&shared->unsynced, memory_order_relaxed);
    uint64_t turn = atomic_load_explicit(&shared->turn, memory_order_relaxed);
    return high(unsynced) == high(turn) ? (int)low(unsynced) : 0;
}

/* The descriptor in the packet at the head, which stays there, or -1. size bytes come with it. */
static inline int peek_file(int socket, void *ret_data, size_t size) {
    ik_sockets_fds came = {0};
    int64_t n = ik_sockets_peek_fds(socket, ret_data, size, &came, 1);
    if (n == (int64_t)size && came.count == 1)
        return came.fd[0];
    while (came.count > 0)
        close(came.fd[--came.count]);
    return -1;
}

static inline int64_t queued_in(int pipe) {
    int queued;
    return ioctl(pipe, FIONREAD, &queued) < 0 ? -errno : queued;
}

/* Bytes of a long message that are not moved yet. */
static inline int64_t rest_of(int file) {
    struct stat info;
    return fstat(file, &info) < 0 ? 0 : info.st_size - lseek(file, 0, SEEK_CUR);
}

static inline int send_file(int socket, const packet *with, int file) {
    int64_t n = ik_sockets_send_fds(socket, with, sizeof *with, &file, 1, IK_NOW);
    return n < 0 ? (int)n : 0;
}

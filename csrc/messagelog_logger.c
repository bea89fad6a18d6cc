/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>

#include "messagelog_impl.h"
#include "process.h"

/* --- from the writers to the second pipe -------------------------------------------------------*/

/* The logger process's own. */
static struct {
    int copying;    /* the file system can't splice */
    int message;    /* the long message that is next, or -1 */
    int64_t before; /* bytes of the pipe that came before it */
} logger = {.message = -1};

/* Remove the packet at the head. Only the logger does. */
static void drop_head(int socket) {
    packet ignored;
    ik_sockets_fds came = {0};
    ik_sockets_recv_fds(socket, &ignored, sizeof ignored, &came, 1, IK_NOW);
    while (came.count > 0)
        close(came.fd[--came.count]);
}

static int64_t staged(const ik_log *log) {
    return atomic_load_explicit(&log->shared->staged, memory_order_relaxed);
}

static void set_staged(ik_log *log, int64_t n) {
    atomic_store_explicit(&log->shared->staged, n, memory_order_relaxed);
}

static int64_t lesser(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Move up to most bytes to the second pipe, which is empty: references to pages, so nobody waits
 * for a disk. Bytes, 0 at end of file, or -errno. They count as staged before they are, or a kill
 * in between would hide them. */
static int64_t stage_from(ik_log *log, int from, int64_t most) {
    set_staged(log, most);
    ssize_t n = splice(from, NULL, log->staging_writer, NULL, (size_t)(most > 0 ? most : 1),
                       SPLICE_F_NONBLOCK);
    int64_t rc = n < 0 ? -errno : n;
    set_staged(log, n < 0 ? 0 : n);
    return rc;
}

static int64_t stage_pipe(ik_log *log, int64_t most) {
    int64_t n = stage_from(log, log->reader, lesser(most, queued_in(log->reader)));
    if (n > 0)
        logger.before -= lesser(n, logger.before);
    return n;
}

/* The position of the message's file tells how much of it is moved; it is the file's own, so the
 * next logger goes on from there. */
static int64_t stage_message(ik_log *log) {
    int64_t rest = rest_of(logger.message);
    int64_t n = rest > 0 ? stage_from(log, logger.message, lesser(rest, MOVE_MAX)) : 0;
    if (n != 0)
        return n;
    drop_head(log->handed);
    close(logger.message);
    logger.message = -1;
    atomic_fetch_add_explicit(&log->shared->received, 1, memory_order_relaxed);
    return 0;
}

/* Whether a long message has come, after logger.before bytes of the pipe. */
static int look_for_message(ik_log *log) {
    char mark;
    logger.message = peek_file(log->handed, &mark, sizeof mark);
    if (logger.message < 0)
        return 0;
    /* Asked for after the packet was seen: what its writer appended before is in the pipe. */
    logger.before = lseek(logger.message, 0, SEEK_CUR) > 0 ? 0 : queued_in(log->reader);
    return 1;
}

static int have_message(ik_log *log) {
    /* Acquire: it was counted before it was sent. */
    return logger.message >= 0 ||
           (atomic_load_explicit(&log->shared->handed, memory_order_acquire) &&
            look_for_message(log));
}

/* Have the next bytes in the second pipe, which is empty. Bytes, 0 at the end, -EAGAIN: there are
 * none. */
static int64_t stage(ik_log *log) {
    while (have_message(log)) {
        if (logger.before > 0)
            return stage_pipe(log, lesser(logger.before, MOVE_MAX));
        int64_t n = stage_message(log);
        if (n != 0)
            return n;
    }
    return stage_pipe(log, MOVE_MAX);
}

/* --- from the second pipe to the file ----------------------------------------------------------*/

static void nap(int64_t ns) {
    struct timespec slice = {0, ns > 0 ? ns : 0};
    nanosleep(&slice, NULL);
}

/* Full disk, quota, file size limit, I/O error: wait and try again; the pipe keeps the rest and
 * makes the writers wait. */
static void pause_for(ik_log *log, int64_t rc, int64_t until_ns) {
    int64_t now = ik_wait_now(), until = earlier(until_ns, now + SLICE_NS);
    if (rc == -EINTR)
        return;
    if (rc == -EAGAIN) { /* no file, but a stream that is full; a file never is */
        ik_wait_fd(log->file, POLLOUT, until);
        return;
    }
    atomic_store_explicit(&log->shared->error, (int)-rc, memory_order_relaxed);
    nap(until - now);
}

/* Where the file system can't splice, bytes pass through here, and a kill between the read and the
 * write loses them. */
static int64_t copy_some(ik_log *log, int64_t most) {
    char block[65536];
    ssize_t n = read(log->staging_reader, block, (size_t)lesser(most, sizeof block));
    for (ssize_t done = 0; done < n;) {
        ssize_t w = write(log->file, block + done, (size_t)(n - done));
        if (w < 0)
            pause_for(log, -errno, IK_FOREVER);
        else
            done += w;
    }
    return n < 0 ? -errno : n;
}

/* Move what is staged to the end of the file, or some of it: bytes, or -errno. */
static int64_t store(ik_log *log) {
    int64_t most = staged(log);
    /* The end, each time: somebody may have truncated the file to rotate it. */
    if (lseek(log->file, 0, SEEK_END) < 0 && errno != ESPIPE)
        return -errno;
    int64_t n = logger.copying ? copy_some(log, most)
                               : splice(log->staging_reader, NULL, log->file, NULL, (size_t)most,
                                        SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (n < 0 && !logger.copying && errno == EINVAL) {
        logger.copying = 1;
        return store(log);
    }
    n = n < 0 && !logger.copying ? -errno : n;
    set_staged(log, n > 0 ? most - n : queued_in(log->staging_reader));
    if (n <= 0)
        return n;
    atomic_store_explicit(&log->shared->error, 0, memory_order_relaxed);
    return n;
}

static void sync_file(ik_log *log) {
    /* EINVAL: such a file has nothing to sync. */
    if (fdatasync(log->file) == 0 || errno == EINVAL)
        return;
    /* The kernel may have dropped the dirty pages and would say "fine" next time: the first failure
     * is the last word on this file. */
    uint32_t file = high(atomic_load_explicit(&log->shared->turn, memory_order_relaxed));
    if (!sync_error(log->shared))
        atomic_store_explicit(&log->shared->unsynced, pair(file, (uint32_t)errno),
                              memory_order_relaxed);
}

/* All that was in the log at one moment. */
typedef struct goal {
    uint32_t handed;
    int64_t queued; /* of the pipe, still to be moved; -1: not asked yet */
} goal;

static goal all_till_now(const ik_log *log) {
    /* Acquire: as in have_message(). */
    return (goal){atomic_load_explicit(&log->shared->handed, memory_order_acquire), -1};
}

/* What is handed over before what the pipe has then; one that is begun in any case. A writer that
 * was killed counts, though it sent nothing: then what comes later takes its place, if it comes. */
static int is_message_due(ik_log *log, const goal *to) {
    uint32_t received = atomic_load_explicit(&log->shared->received, memory_order_relaxed);
    return logger.message >= 0 || ((int32_t)(to->handed - received) > 0 && have_message(log));
}

/* One step: positive; 0 when all is in the file; -errno when that can't be now. Then the log stands
 * between two messages: each write of the pipe is a whole one, so what it held at one moment is. */
static int64_t approach(ik_log *log, goal *to) {
    if (staged(log) > 0)
        return store(log);
    if (is_message_due(log, to)) {
        int64_t n = stage(log);
        return n == 0 ? 1 : n;
    }
    if (to->queued < 0)
        to->queued = queued_in(log->reader);
    if (to->queued <= 0)
        return 0;
    int64_t n = stage_pipe(log, to->queued);
    to->queued = n > 0 ? to->queued - n : 0; /* it has less: look_for_offer() moved some */
    return n;
}

/* --- over to another file ----------------------------------------------------------------------*/

static int is_open(const ik_log *log, const packet *offered) {
    return low(atomic_load_explicit(&log->shared->turn, memory_order_relaxed)) == offered->number;
}

static int is_over(int64_t deadline_ns) {
    return deadline_ns != IK_FOREVER && ik_wait_now() >= deadline_ns;
}

/* Between two messages, and all is in the file. 0 if the time or the offer is over. */
static int reach_boundary(ik_log *log, const packet *offered) {
    goal all = all_till_now(log);
    for (int64_t n; (n = approach(log, &all)) != 0;) {
        if (is_over(offered->until_ns) || !is_open(log, offered))
            return 0;
        if (n < 0)
            pause_for(log, n, offered->until_ns);
    }
    return 1;
}

/* The offer is taken in one instant, with the old file finished. A logger killed before leaves the
 * old one in use, one killed after it the new one, and no byte is between. */
static int take(ik_log *log, const packet *offered) {
    uint64_t now = atomic_load_explicit(&log->shared->turn, memory_order_relaxed);
    return low(now) == offered->number && atomic_compare_exchange_strong_explicit(
                                              &log->shared->turn, &now, pair(offered->number, 0),
                                              memory_order_release, memory_order_relaxed);
}

/* The lock of a file goes with it, even if somebody still has a copy of it. */
static void let_go(int file) {
    flock(file, LOCK_UN);
    close(file);
}

/* Open the file in use, and have it alone parked. It may still be where it was offered: a logger
 * that is killed at any moment of this is followed by one that goes on. */
static int open_parked(ik_log *log) {
    uint32_t in_use = high(atomic_load_explicit(&log->shared->turn, memory_order_relaxed));
    packet with;
    for (int file; (file = peek_file(log->parked, &with, sizeof with)) >= 0;) {
        if (with.number == in_use) {
            if (log->file >= 0)
                close(log->file);
            log->file = file;
            return 0;
        }
        drop_head(log->parked);
        let_go(file);
    }
    int file = peek_file(log->told, &with, sizeof with);
    if (file < 0)
        return -ENOENT;
    int rc = with.number == in_use ? send_file(log->park, &with, file) : 0;
    close(file);
    if (rc < 0)
        return rc;
    drop_head(log->told);
    return open_parked(log);
}

static void switch_file(ik_log *log, const packet *offered) {
    int whole = reach_boundary(log, offered);
    if (log->durability == IK_LOG_SYNCED)
        sync_file(log); /* whose bytes are here may ask only when the next file is in use */
    if (!take(log, offered))
        return;
    logger.copying = 0;
    atomic_store_explicit(&log->shared->error, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&log->shared->split, !whole, memory_order_relaxed);
    int rc = open_parked(log);
    if (rc < 0)
        _exit(-rc); /* nothing is lost: the next logger tries again */
    ik_sockets_send(log->told, ".", 1, 0, IK_NOW);
}

/* Look whether a file is offered; end of file: the supervisor is gone. */
static void look_for_offer(ik_log *log) {
    packet offered;
    int64_t n = 0;
    while (log->told >= 0 && (n = ik_sockets_recv(log->told, &offered, sizeof offered, MSG_PEEK,
                                                  IK_NOW)) == sizeof offered) {
        if (is_open(log, &offered))
            switch_file(log, &offered);
        else
            drop_head(log->told); /* it was withdrawn */
    }
    if (n == 0 && log->told >= 0) {
        log->told = -1;
        ik_log_withdraw(log); /* one that was opened and not sent */
    }
}

/* --- its work ----------------------------------------------------------------------------------*/

static void ring(const ik_log *log) {
    uint64_t one = 1;
    ssize_t ignored = log->acked < 0 ? 0 : write(log->acked, &one, sizeof one);
    (void)ignored; /* EAGAIN: it is readable as it is */
}

static void ring_whom(const ik_log *log) {
    _Atomic uint32_t *awaits = &log->shared->awaits_done;
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(awaits, memory_order_relaxed) && log->acked >= 0 &&
        atomic_exchange_explicit(awaits, 0, memory_order_relaxed))
        ring(log);
}

static void futex_wake_all(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static int somebody_asked(ik_log *log) {
    return atomic_load_explicit(&log->shared->asked, memory_order_acquire) !=
           atomic_load_explicit(&log->shared->done, memory_order_relaxed);
}

/* Acknowledge: all that was in the log when asked was read is moved, then done says so. */
static void acknowledge(ik_log *log) {
    /* Acquire: the bytes of every writer counted in asked are in the log already. */
    uint32_t asked = atomic_load_explicit(&log->shared->asked, memory_order_acquire);
    goal all = all_till_now(log);
    for (int64_t n; (n = approach(log, &all)) != 0;)
        if (n < 0) {
            pause_for(log, n, IK_FOREVER);
            look_for_offer(log); /* of a file on a disk that is not full; may move some */
            all.queued = lesser(all.queued, queued_in(log->reader));
        }
    if (log->durability == IK_LOG_SYNCED)
        sync_file(log);
    /* Release: whoever sees done sees sync_error too. */
    atomic_store_explicit(&log->shared->done, asked, memory_order_release);
    futex_wake_all(&log->shared->done);
    ring_whom(log);
}

static int is_under_way(const ik_log *log) {
    return staged(log) > 0 || logger.message >= 0;
}

/* Wait for bytes, the end of the last writer, somebody who asks or an offer, which is seen to: what
 * poll says of the pipe. */
static int await_work(ik_log *log) {
    struct pollfd all[] = {{.fd = log->reader, .events = POLLIN},
                           {.fd = log->wake, .events = POLLIN},
                           {.fd = log->told, .events = POLLIN},
                           {.fd = log->handed, .events = POLLIN}};
    uint64_t drained;
    if (poll(all, 4, is_under_way(log) ? 0 : -1) < 0)
        return 0;
    if (all[2].revents) {
        look_for_offer(log); /* and the pipe may be empty now */
        return 0;
    }
    if (all[3].revents && logger.message < 0 && !look_for_message(log) && all[3].revents & POLLHUP)
        log->handed = -1; /* no writer of long messages is left */
    /* Drained before asked is read again, so a later asker makes it readable again. */
    if (all[1].revents && read(log->wake, &drained, sizeof drained) < 0)
        return 0;
    return all[0].revents;
}

/* Move what there is: bytes, or -errno when there is nothing, or nothing can be written now. */
static int64_t move(ik_log *log) {
    int64_t n = staged(log) > 0 ? 1 : stage(log);
    if (n > 0)
        n = store(log);
    if (n < 0)
        pause_for(log, n, IK_FOREVER);
    return n;
}

/* Never sleeps but in await_work: an asker whose bytes are moved already sends no more of them.
 * But where nobody asks, it waits a moment after a small move for more to come: to be woken for
 * each message would cost the writers' processor more than the writes do. */
static void run(ik_log *log) {
    for (;;) {
        if (somebody_asked(log))
            acknowledge(log);
        int ready = await_work(log);
        int64_t n = ready & POLLIN || is_under_way(log) ? move(log) : 0;
        if (log->durability == IK_LOG_NONE && n > 0 && n < SMALL_MOVE && !somebody_asked(log))
            ik_wait_fd(log->wake, POLLIN, ik_wait_now() + MOMENT_NS); /* or for one who asks */
        if (!(ready & POLLIN) && ready & POLLHUP && !is_under_way(log) && !have_message(log))
            return;
    }
}

static void ignore_what_is_meant_for_others(void) {
    /* A terminal's Ctrl-C and a group's SIGTERM reach the logger too, but it is the last to leave:
     * it ends when the last writer has gone. */
    const int ignored[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGXFSZ, SIGUSR1, SIGUSR2};
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        signal(ignored[i], SIG_IGN);
}

/* Go on where the logger before was killed. */
static int begin(ik_log *log) {
    set_staged(log, queued_in(log->staging_reader));
    log->file = -1;
    return open_parked(log);
}

int ik_log_run(void *argument) {
    ik_log *log = argument;
    ignore_what_is_meant_for_others();
    ik_process_unblock();
    int rc = begin(log);
    if (rc < 0)
        return -rc;
    ring(log); /* the one before may have been killed before it could */
    run(log);
    sync_file(log);
    return sync_error(log->shared);
}

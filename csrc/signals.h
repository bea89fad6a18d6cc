/* signals.h - signals with their payload: sigaction, masks, sigqueue, signalfd, the self-pipe. See
 * signal(7).
 *
 * The handler in C only stores the siginfo in a ring of its signal and then calls CPython's own
 * handler, which makes the interpreter call signals.py. That looks with the calls below:
 * enter, (next, begin)*, leave. A set of signals is a uint64_t: bit n - 1 is signal n.
 */
#pragma once
#include <stdint.h>

extern const int IK_SA_RESTART;
extern const int IK_SA_NOCLDSTOP;
extern const int IK_SA_NOCLDWAIT;
extern const int IK_SA_RESETHAND;
extern const int IK_SA_NODEFER;

enum ik_signals_sizes { IK_SIGNALS_READ_MAX = 64 };

/* What has no meaning for the signal is 0. */
typedef struct ik_signals_info {
    int signo;
    int code;
    int pid;
    uint32_t uid;
    int status;
    int value;
    uint64_t addr;
    int64_t band;
} ik_signals_info;

/* The kernel's disposition of a signal, to be put back exactly. */
typedef struct ik_signals_action {
    void *handler;
    uint64_t mask;
    int flags;
} ik_signals_action;

/* One look at what has arrived; zeroed by the caller. */
typedef struct ik_signals_look {
    ik_signals_info info; /* of the signal to handle */
    uint64_t limit;       /* what arrives after the look began is for the next one */
    uint64_t held;        /* as it was before the handler that runs */
    uint64_t added;       /* what the handler that runs has blocked */
    int entered;
    int running;
} ik_signals_look;

/* The present disposition, and setting one. 0, -EINVAL. */
int ik_signals_action_get(int signum, ik_signals_action *ret_action);
int ik_signals_action_set(int signum, const ik_signals_action *action);

/* Main thread. Before signal.signal(): what catch will install. 0, -ENOMEM. */
int ik_signals_prepare(int signum, int flags);
/* After signal.signal(): put our handler before CPython's. 0, -EINVAL. */
int ik_signals_catch(int signum);
/* Drop what has arrived. 0: nothing had. */
int ik_signals_forget(int signum);

/* Main thread. 0: a look in progress was interrupted, it will look again. */
int ik_signals_enter(int signum, ik_signals_look *look);
/* Ends the handler that ran, and shows the oldest signal that no running handler holds off in
 * look->info. 0: none is left. */
int ik_signals_next(ik_signals_look *look);
/* Takes that signal out and holds mask off, until next or leave. */
void ik_signals_begin(ik_signals_look *look, uint64_t mask);
/* Ends the look. If something is left, CPython is made to look once more. */
void ik_signals_leave(ik_signals_look *look);

/* The self-pipe: a handler in C that notes the signal and rings an eventfd, whichever thread it
 * runs in. Main thread, in this order: displace, signal.signal(), bell, note.
 *
 * displace: remember the disposition, for who gets the signal when there is no bell. */
int ik_signals_displace(int signum);
/* Put our handler before CPython's. 0, -EINVAL. */
int ik_signals_note(int signum);
/* Have fd rung from now on, at once if the signal is noted already; -1: none. When this returns no
 * thread rings the former one any more, and it may be closed. The former one, or -1. */
int ik_signals_bell(int signum, int fd);
/* CPython's handler got it: note it, and be the handler again. */
void ik_signals_note_again(int signum);
/* Those of set that were noted since the last call. */
uint64_t ik_signals_take(uint64_t set);
/* A forked child: nothing is noted, no bell. */
void ik_signals_forget_notes(void);

/* Block set in the calling thread; *ret_added are those that were not blocked. */
void ik_signals_block(uint64_t set, uint64_t *ret_added);
void ik_signals_unblock(uint64_t set);

/* Around fork: all signals blocked; the child starts with nothing arrived. */
void ik_signals_before_fork(void);
void ik_signals_after_fork(int in_child);

/* 0, -EAGAIN (RLIMIT_SIGPENDING), -ESRCH, -EPERM, -EINVAL. */
int ik_signals_queue(int pid, int signum, int value);
int ik_signals_queue_pidfd(int pidfd, int signum, int value);

/* A signalfd: close-on-exec, non-blocking. The descriptor, or -EMFILE, ... */
int ik_signals_open(uint64_t set);
/* Up to max (at most IK_SIGNALS_READ_MAX) signals. How many, or -EAGAIN, ... */
int ik_signals_read(int fd, ik_signals_info *ret_infos, int max);

/* SPDX-License-Identifier: MIT */
#include "signals.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

const int IK_SA_RESTART = SA_RESTART;
const int IK_SA_NOCLDSTOP = SA_NOCLDSTOP;
const int IK_SA_NOCLDWAIT = SA_NOCLDWAIT;
const int IK_SA_RESETHAND = SA_RESETHAND;
const int IK_SA_NODEFER = SA_NODEFER;

enum { SIGNALS = 64, CAPACITY = 4096, HIGH = 3072 };

/* --- sets ------------------------------------------------------------------------------------ */

static uint64_t bit(int signum) {
    return UINT64_C(1) << (signum - 1);
}

static sigset_t to_sigset(uint64_t set) {
    sigset_t result;
    sigemptyset(&result);
    for (int s = 1; s <= SIGNALS; s++)
        if (set & bit(s))
            sigaddset(&result, s);
    return result;
}

static uint64_t from_sigset(const sigset_t *set) {
    uint64_t result = 0;
    for (int s = 1; s <= SIGNALS; s++)
        if (sigismember(set, s) == 1)
            result |= bit(s);
    return result;
}

/* --- what has arrived ------------------------------------------------------------------------ */

/* One ring per signal, written by the handler in any thread and read by the main thread. Writers
 * claim, fill and publish. A thread that dies between cannot be, other than in another process:
 * the whole process dies with it. */
typedef struct slot {
    _Atomic uint64_t published; /* its position + 1 */
    uint64_t order;             /* over all signals */
    ik_signals_info info;
} slot;

typedef struct ring {
    _Atomic uint64_t head;
    _Atomic uint64_t tail;
    slot slots[CAPACITY];
} ring;

static ring *rings[SIGNALS + 1]; /* made on first use, kept for good: a handler may be in it */
static struct sigaction caught[SIGNALS + 1];
static _Atomic uint64_t next_order = 1;
static void (*python_handler)(int);
static pthread_t main_thread;

/* Of the main thread: */
static _Atomic uint64_t paused; /* blocked by arrive() because their rings are nearly full */
static uint64_t held;           /* held off by the Python handlers that run */
static int looking;

static int is_main_thread(void) {
    return pthread_equal(pthread_self(), main_thread);
}

static int nearly_full(ring *r) {
    return atomic_load(&r->tail) - atomic_load(&r->head) >= HIGH;
}

static void fill(ik_signals_info *to, const siginfo_t *from) {
    *to = (ik_signals_info){.signo = from->si_signo, .code = from->si_code};
    if (from->si_code == SI_KERNEL)
        return;
    if (from->si_code <= 0) {
        if (from->si_code != SI_TIMER) {
            to->pid = from->si_pid;
            to->uid = from->si_uid;
        }
        if (from->si_code != SI_USER && from->si_code != SI_TKILL)
            to->value = from->si_value.sival_int;
        return;
    }
    switch (from->si_signo) {
    case SIGCHLD:
        to->pid = from->si_pid;
        to->uid = from->si_uid;
        to->status = from->si_status;
        break;
    case SIGILL:
    case SIGFPE:
    case SIGSEGV:
    case SIGBUS:
    case SIGTRAP:
        to->addr = (uint64_t)(uintptr_t)from->si_addr;
        break;
    default: /* SIGIO, or what F_SETSIG made of it */
        to->band = from->si_band;
    }
}

static int record(ring *r, const siginfo_t *info) {
    uint64_t at = atomic_load(&r->tail);
    do {
        if (at - atomic_load(&r->head) == CAPACITY)
            return 0;
    } while (!atomic_compare_exchange_weak(&r->tail, &at, at + 1));
    slot *s = &r->slots[at % CAPACITY];
    s->order = atomic_fetch_add(&next_order, 1);
    fill(&s->info, info);
    atomic_store_explicit(&s->published, at + 1, memory_order_release);
    return 1;
}

/* Block the signal in the interrupted thread, so that the kernel keeps the next ones in its own
 * queue and their sender sees EAGAIN when that is full. In the main thread unblock_where_room()
 * undoes it; another thread just leaves the signal to the main thread from then on. */
static void pause_signal(int signum, ucontext_t *context) {
    sigaddset(&context->uc_sigmask, signum);
    if (is_main_thread())
        atomic_fetch_or(&paused, bit(signum));
}

/* Only what signal-safety(7) allows. All signals are blocked meanwhile, so order is kept and
 * nothing nests. Publishing comes before CPython's handler: who is woken finds the entry. */
static void arrive(int signum, siginfo_t *info, void *context) {
    int saved = errno;
    ring *r = rings[signum];
    if (!record(r, info)) {
        /* Threads, each of which brings one more after the ring is nearly full, filled it. The
         * kernel lets a thread send itself any siginfo, and takes it first from there. */
        pause_signal(signum, context);
        syscall(SYS_rt_tgsigqueueinfo, getpid(), (int)syscall(SYS_gettid), signum, info);
    } else if (nearly_full(r)) {
        pause_signal(signum, context);
    }
    python_handler(signum);
    errno = saved;
}

/* --- dispositions ---------------------------------------------------------------------------- */

int ik_signals_action_get(int signum, ik_signals_action *ret_action) {
    struct sigaction now;
    if (sigaction(signum, NULL, &now) < 0)
        return -errno;
    *ret_action = (ik_signals_action){
        .handler = (void *)now.sa_sigaction,
        .mask = from_sigset(&now.sa_mask),
        .flags = now.sa_flags,
    };
    return 0;
}

int ik_signals_action_set(int signum, const ik_signals_action *action) {
    struct sigaction new = {.sa_flags = action->flags, .sa_mask = to_sigset(action->mask)};
    *(void **)&new.sa_sigaction = action->handler;
    return sigaction(signum, &new, NULL) < 0 ? -errno : 0;
}

int ik_signals_prepare(int signum, int flags) {
    if (rings[signum] == NULL && (rings[signum] = calloc(1, sizeof(ring))) == NULL)
        return -ENOMEM;
    main_thread = pthread_self();
    caught[signum] = (struct sigaction){.sa_sigaction = arrive};
    sigfillset(&caught[signum].sa_mask);
    /* SA_NODEFER is about the handler in Python: for ours it would mix up the order. */
    caught[signum].sa_flags = (flags & ~SA_NODEFER) | SA_SIGINFO | SA_ONSTACK;
    return 0;
}

int ik_signals_catch(int signum) {
    struct sigaction former;
    if (sigaction(signum, NULL, &former) < 0)
        return -errno;
    if (former.sa_sigaction != arrive)
        python_handler = former.sa_handler;
    return sigaction(signum, &caught[signum], NULL) < 0 ? -errno : 0;
}

int ik_signals_forget(int signum) {
    ring *r = rings[signum];
    if (r == NULL)
        return 0;
    uint64_t tail = atomic_load(&r->tail);
    return atomic_exchange(&r->head, tail) != tail;
}

/* --- the self-pipe ---------------------------------------------------------------------------- */

/* A bit a signal, as the kernel has it for the standard ones: it can't overflow, so none is lost
 * behind many of another kind. */
static _Atomic uint64_t noted;
static _Atomic int bells[SIGNALS + 1]; /* descriptor + 1; 0: none */
static _Atomic int ringing;            /* handlers, in all threads, that may know a bell */
static _Atomic int bells_of;           /* the process */
static struct sigaction displaced[SIGNALS + 1];

static int bell_of(int signum) {
    return getpid() == atomic_load(&bells_of) ? atomic_load(&bells[signum]) - 1 : -1;
}

static void ring_bell(int fd) {
    const uint64_t one = 1;
    ssize_t n = write(fd, &one, sizeof one);
    (void)n; /* EAGAIN: it is ringing already */
}

/* All signals are blocked in the handler: this one comes once more when it has returned. */
static void hand_back(int signum, siginfo_t *info) {
    sigaction(signum, &displaced[signum], NULL);
    syscall(SYS_rt_tgsigqueueinfo, getpid(), (int)syscall(SYS_gettid), signum, info);
}

/* Only what signal-safety(7) allows. Noting comes before ringing: the thread that is woken finds
 * it. Without a bell (in a child that was forked behind Python's back; or somebody put this handler
 * back after its time) the signal is as if we had never been. */
static void note(int signum, siginfo_t *info, void *context) {
    (void)context;
    int saved = errno;
    atomic_fetch_add(&ringing, 1);
    int fd = bell_of(signum);
    if (fd >= 0) {
        atomic_fetch_or(&noted, bit(signum));
        ring_bell(fd);
    }
    atomic_fetch_sub(&ringing, 1);
    if (fd < 0)
        hand_back(signum, info);
    errno = saved;
}

int ik_signals_displace(int signum) {
    struct sigaction now;
    if (sigaction(signum, NULL, &now) < 0)
        return -errno;
    if (now.sa_sigaction != note)
        displaced[signum] = now;
    return 0;
}

int ik_signals_note(int signum) {
    struct sigaction ours = {.sa_sigaction = note}, former;
    sigfillset(&ours.sa_mask);
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART; /* other threads need not know */
    if (sigaction(signum, &ours, &former) < 0)
        return -errno;
    if (former.sa_sigaction != note)
        python_handler = former.sa_handler;
    return 0;
}

int ik_signals_bell(int signum, int fd) {
    atomic_store(&bells_of, getpid());
    int former = atomic_exchange(&bells[signum], fd + 1) - 1;
    while (atomic_load(&ringing)) /* a few instructions of another thread */
        sched_yield();
    if (fd >= 0 && atomic_load(&noted) & bit(signum))
        ring_bell(fd);
    return former;
}

void ik_signals_note_again(int signum) {
    struct sigaction now;
    if (sigaction(signum, NULL, &now) == 0 && now.sa_handler == python_handler)
        ik_signals_note(signum);
    int fd = bell_of(signum);
    if (fd < 0)
        return;
    atomic_fetch_or(&noted, bit(signum));
    ring_bell(fd);
}

uint64_t ik_signals_take(uint64_t set) {
    return atomic_fetch_and(&noted, ~set) & set;
}

void ik_signals_forget_notes(void) {
    atomic_store(&noted, 0);
    atomic_store(&ringing, 0); /* of threads that are not in this process */
    for (int s = 1; s <= SIGNALS; s++)
        atomic_store(&bells[s], 0);
}

/* --- masks ----------------------------------------------------------------------------------- */

void ik_signals_block(uint64_t set, uint64_t *ret_added) {
    sigset_t blocking = to_sigset(set), former;
    pthread_sigmask(SIG_BLOCK, &blocking, &former);
    uint64_t was = from_sigset(&former);
    if (is_main_thread()) /* what was only paused is the caller's from now on */
        was &= ~atomic_fetch_and(&paused, ~set);
    *ret_added = set & ~was;
}

void ik_signals_unblock(uint64_t set) {
    if (is_main_thread()) {
        for (int s = 1; s <= SIGNALS; s++)
            if (set & bit(s) && rings[s] != NULL && nearly_full(rings[s])) {
                atomic_fetch_or(&paused, bit(s));
                set &= ~bit(s);
            }
    }
    sigset_t unblocking = to_sigset(set);
    pthread_sigmask(SIG_UNBLOCK, &unblocking, NULL);
}

/* --- looking --------------------------------------------------------------------------------- */

/* Somebody put signal.signal()'s former result back: Python's table knows us, the kernel does
 * not. This signal came without its siginfo; the next ones bring it. */
static void catch_again(int signum) {
    struct sigaction now;
    if (sigaction(signum, NULL, &now) == 0 && now.sa_handler == python_handler) {
        siginfo_t unknown = {.si_signo = signum, .si_code = SI_USER};
        record(rings[signum], &unknown);
        sigaction(signum, &caught[signum], NULL);
    }
}

int ik_signals_enter(int signum, ik_signals_look *look) {
    catch_again(signum);
    if (looking)
        return 0;
    looking = look->entered = 1;
    look->limit = atomic_load(&next_order);
    return 1;
}

static slot *oldest_of(int signum) {
    ring *r = rings[signum];
    if (r == NULL || held & bit(signum))
        return NULL;
    uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
    slot *s = &r->slots[head % CAPACITY];
    return atomic_load_explicit(&s->published, memory_order_acquire) == head + 1 ? s : NULL;
}

static const slot *oldest(void) {
    const slot *found = NULL;
    for (int s = 1; s <= SIGNALS; s++) {
        const slot *candidate = oldest_of(s);
        if (candidate != NULL && (found == NULL || candidate->order < found->order))
            found = candidate;
    }
    return found;
}

static void end(ik_signals_look *look) {
    if (!look->running)
        return;
    looking = 1; /* before the signals come back: what arrives now is for the loop */
    look->running = 0;
    held = look->held;
    ik_signals_unblock(look->added | atomic_exchange(&paused, 0));
}

int ik_signals_next(ik_signals_look *look) {
    end(look);
    const slot *found = oldest();
    if (found == NULL || found->order >= look->limit)
        return 0;
    look->info = found->info;
    return 1;
}

void ik_signals_begin(ik_signals_look *look, uint64_t mask) {
    look->held = held;
    ik_signals_block(mask, &look->added);
    held |= mask;
    atomic_fetch_add(&rings[look->info.signo]->head, 1);
    look->running = 1;
    looking = 0;
}

void ik_signals_leave(ik_signals_look *look) {
    if (!look->entered)
        return;
    end(look);
    looking = 0;
    const slot *left = oldest();
    if (left != NULL)
        python_handler(left->info.signo);
}

/* --- fork ------------------------------------------------------------------------------------ */

static _Thread_local uint64_t blocked_for_fork;

void ik_signals_before_fork(void) {
    ik_signals_block(~UINT64_C(0), &blocked_for_fork);
}

void ik_signals_after_fork(int in_child) {
    if (in_child) {
        for (int s = 1; s <= SIGNALS; s++)
            ik_signals_forget(s);
        if (!is_main_thread()) { /* the main thread's loop is not in this process */
            main_thread = pthread_self();
            paused = held = 0;
            looking = 0;
        }
    }
    ik_signals_unblock(blocked_for_fork);
}

/* --- sigqueue -------------------------------------------------------------------------------- */

int ik_signals_queue(int pid, int signum, int value) {
    return sigqueue(pid, signum, (union sigval){.sival_int = value}) < 0 ? -errno : 0;
}

int ik_signals_queue_pidfd(int pidfd, int signum, int value) {
    siginfo_t info = {.si_signo = signum, .si_code = SI_QUEUE};
    info.si_pid = getpid();
    info.si_uid = getuid();
    info.si_value.sival_int = value;
    return syscall(SYS_pidfd_send_signal, pidfd, signum, &info, 0) < 0 ? -errno : 0;
}

/* --- signalfd -------------------------------------------------------------------------------- */

int ik_signals_open(uint64_t set) {
    sigset_t wanted = to_sigset(set);
    int fd = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

int ik_signals_read(int fd, ik_signals_info *ret_infos, int max) {
    struct signalfd_siginfo records[IK_SIGNALS_READ_MAX];
    if (max > IK_SIGNALS_READ_MAX)
        max = IK_SIGNALS_READ_MAX;
    ssize_t got = read(fd, records, (size_t)max * sizeof *records);
    if (got < 0)
        return -errno;
    int count = (int)(got / (ssize_t)sizeof *records);
    for (int i = 0; i < count; i++)
        ret_infos[i] = (ik_signals_info){
            .signo = (int)records[i].ssi_signo,
            .code = records[i].ssi_code,
            .pid = (int)records[i].ssi_pid,
            .uid = records[i].ssi_uid,
            .status = records[i].ssi_status,
            .value = records[i].ssi_int,
            .addr = records[i].ssi_addr,
            .band = records[i].ssi_band,
        };
    return count;
}

/* SPDX-License-Identifier: MIT */
#include "sysv_queue.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/msg.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "wait.h"

_Static_assert(offsetof(ik_sysv_message, text) - offsetof(ik_sysv_message, type) == sizeof(long),
               "type and text must be a msgbuf");

enum { MILLISECOND = 1000000 };

/* One msgsnd or msgrcv. */
typedef struct call {
    bool sends, all_but;
    void *buffer; /* a msgbuf */
    size_t size;
    long type;
} call;

/* A thread of a caller that waits, or may begin to at any moment. Lives on its stack. */
typedef struct waiter {
    struct waiter *next;
    ik_sysv_queue *queue;
    pthread_t thread;
    sigset_t before;
} waiter;

struct ik_sysv_queue {
    int id; /* -1: closed */
    int references;
    int watches;
    bool closed;
    int64_t spin[2]; /* how long a receive, a send looks before it sleeps, in nanoseconds */
    int64_t quiet, quiet_until; /* for how long, and until when, they don't look */
    /* The types of empty messages that a watch took out of the queue, oldest first. */
    long *held;
    size_t held_count, held_room;
    unsigned generation; /* the process that held them */
};

struct ik_sysv_helper {
    ik_sysv_helper *next;
    ik_sysv_queue *queue;
    pthread_t thread;
    call what;
    int id, fd, result;
    bool running; /* the thread is in our code, and may be interrupted */
    bool armed;   /* a watch: waits, or may begin to; else its descriptor is readable */
    bool stop, joined;
    ik_sysv_message message; /* of a sender: followed by its text */
};

/* All that follows belongs to the lock, and so do the fields of handles and helpers that change. It
 * is never held while something blocks. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved; /* a waiter left, a helper changed its state */
static waiter *waiters;
static ik_sysv_helper *helpers;
static int users; /* of the signal: waiters, and helpers that weren't joined yet */
static int wake_signal;
static struct sigaction former;
static unsigned generation; /* counts forks, so that a child knows what was its parent's */

/* --- the signal ------------------------------------------------------------------------------ */

static void interrupt(int number) {
    (void)number; /* that it is delivered ends the system call */
}

static bool has_handler(int number) {
    struct sigaction now;
    return sigaction(number, NULL, &now) < 0 || now.sa_handler != SIG_DFL;
}

/* One that was free when last used most likely is free now: so see afterwards what was there. */
static bool take_signal(int number) {
    struct sigaction ours = {.sa_handler = interrupt};
    sigaction(number, &ours, &former);
    if (former.sa_handler == SIG_DFL)
        return true;
    sigaction(number, &former, NULL);
    return false;
}

/* The highest that has no handler, and isn't blocked, as it is by who takes it by sigwait; of a
 * thread that blocks all, the highest without a handler. */
static int choose_signal(const sigset_t *blocked) {
    for (int any = 0; any <= 1; any++)
        for (int number = SIGRTMAX; number >= SIGRTMIN; number--)
            if ((any || !sigismember(blocked, number)) && !has_handler(number) &&
                take_signal(number))
                return number;
    return 0;
}

static int use_signal(sigset_t *ret_blocked) {
    pthread_sigmask(SIG_BLOCK, NULL, ret_blocked);
    bool again = wake_signal && !sigismember(ret_blocked, wake_signal);
    if (users == 0 && !(again && take_signal(wake_signal)))
        wake_signal = choose_signal(ret_blocked);
    if (wake_signal == 0)
        return -EAGAIN;
    users++;
    return 0;
}

static void restore_signal(void) {
    struct sigaction now;
    sigaction(wake_signal, &former, &now);
    if (now.sa_handler != interrupt) /* somebody took it meanwhile, and may keep it */
        sigaction(wake_signal, &now, NULL);
}

static void release_signal(void) {
    if (--users == 0)
        restore_signal();
}

static sigset_t only_our_signal(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, wake_signal);
    return set;
}

/* --- timers: each thread that ever waited with a deadline has one ------------------------------
 */

typedef struct timer {
    bool made;
    int id, number; /* the timer, the signal that it sends */
    unsigned generation;
} timer;

static __thread timer own_timer;
static pthread_key_t timers; /* for what is to be done when a thread ends */

/* By system calls, because up to glibc 2.33 the functions are in a library of their own. A timer is
 * not inherited by fork. */
static void drop_timer(void *argument) {
    timer *t = argument;
    if (t->made && t->generation == generation)
        syscall(SYS_timer_delete, t->id);
    t->made = false;
}

static int make_timer(timer *t) {
    drop_timer(t);
    struct sigevent to_me = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = wake_signal};
    to_me._sigev_un._tid = (pid_t)syscall(SYS_gettid);
    if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &to_me, &t->id) < 0)
        return -errno;
    t->made = true;
    t->number = wake_signal;
    t->generation = generation;
    return -pthread_setspecific(timers, t);
}

/* It goes on after the deadline, or an expiry just before the thread enters the kernel were lost.
 */
static int start_timer(timer *t, int64_t deadline_ns) {
    bool fits = t->made && t->number == wake_signal && t->generation == generation;
    int rc = fits ? 0 : make_timer(t);
    if (rc < 0)
        return rc;
    struct itimerspec when = {
        .it_interval = {.tv_nsec = MILLISECOND},
        .it_value = {.tv_sec = deadline_ns / 1000000000, .tv_nsec = deadline_ns % 1000000000}};
    return syscall(SYS_timer_settime, t->id, TIMER_ABSTIME, &when, NULL) < 0 ? -errno : 0;
}

/* What it sent is delivered when this returns. */
static void stop_timer(const timer *t) {
    struct itimerspec never = {0};
    syscall(SYS_timer_settime, t->id, 0, &never, NULL);
}

/* --- fork ------------------------------------------------------------------------------------ */

static void init_moved(void) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&moved, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

static void before_fork(void) {
    pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void) {
    pthread_mutex_unlock(&lock);
}

/* None of the parent's threads is here, and what they waited for is the parent's. */
static void after_fork_in_child(void) {
    for (ik_sysv_helper *h = helpers; h; h = h->next) {
        close(h->fd);
        h->fd = -1;
        h->running = false;
        h->joined = true;
        h->queue->watches = 0;
    }
    if (users > 0)
        restore_signal();
    users = 0;
    waiters = NULL;
    helpers = NULL;
    generation++;
    init_moved();
    pthread_mutex_init(&lock, NULL);
}

__attribute__((constructor)) static void set_up(void) {
    init_moved();
    pthread_key_create(&timers, drop_timer);
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

/* --- empty messages that a watch took -------------------------------------------------------- */

static bool wants(const call *c, long type) {
    if (c->type < 0)
        return type <= (c->type == LONG_MIN ? LONG_MAX : -c->type);
    return c->type == 0 || (type == c->type) != c->all_but;
}

static void set_held(ik_sysv_queue *q, size_t count) {
    __atomic_store_n(&q->held_count, count, __ATOMIC_RELAXED);
}

/* Those of the parent are not ours. */
static size_t held_count(ik_sysv_queue *q) {
    if (q->generation != generation)
        set_held(q, 0);
    q->generation = generation;
    return q->held_count;
}

static size_t find_held(ik_sysv_queue *q, const call *c) {
    size_t i = 0;
    while (i < held_count(q) && !wants(c, q->held[i]))
        i++;
    return i;
}

static void hold(ik_sysv_queue *q, long type) {
    size_t count = held_count(q);
    if (count == q->held_room) {
        long *larger = realloc(q->held, (2 * count + 16) * sizeof *larger);
        if (!larger)
            return; /* it is lost: there is no memory left for 8 bytes */
        q->held = larger;
        q->held_room = 2 * count + 16;
    }
    q->held[count] = type;
    set_held(q, count + 1);
}

static void set_type(const call *c, long type) {
    memcpy(c->buffer, &type, sizeof type);
}

static int64_t take_held(ik_sysv_queue *q, const call *c) {
    pthread_mutex_lock(&lock);
    size_t i = find_held(q, c);
    bool found = i < held_count(q);
    if (found) {
        set_type(c, q->held[i]);
        set_held(q, q->held_count - 1);
        memmove(q->held + i, q->held + i + 1, (q->held_count - i) * sizeof *q->held);
    }
    pthread_mutex_unlock(&lock);
    return found ? 0 : -EAGAIN;
}

static void give_back_held(ik_sysv_queue *q) {
    for (size_t i = 0; i < held_count(q); i++)
        msgsnd(q->id, &q->held[i], 0, IPC_NOWAIT);
    set_held(q, 0);
}

/* --- one call -------------------------------------------------------------------------------- */

static int id_of(const ik_sysv_queue *q) {
    return __atomic_load_n(&q->id, __ATOMIC_RELAXED);
}

static int64_t make_call(int id, const call *c, int flags) {
    if (c->all_but)
        flags |= MSG_EXCEPT;
    int64_t rc = c->sends ? msgsnd(id, c->buffer, c->size, flags)
                          : msgrcv(id, c->buffer, c->size, c->type, flags);
    return rc >= 0 ? rc : errno == ENOMSG ? -EAGAIN : -errno;
}

static int64_t try_call(ik_sysv_queue *q, const call *c) {
    if (!c->sends && __atomic_load_n(&q->held_count, __ATOMIC_RELAXED) && take_held(q, c) == 0)
        return 0;
    return make_call(id_of(q), c, IPC_NOWAIT);
}

/* Would it wait for ever? Without the right to look nobody knows. */
static bool never_fits(const ik_sysv_queue *q, size_t size) {
    struct msqid_ds now;
    return msgctl(id_of(q), IPC_STAT, &now) == 0 && (size > now.msg_qbytes || now.msg_qbytes == 0);
}

/* --- waiting --------------------------------------------------------------------------------- */

static int begin_wait(waiter *w, ik_sysv_queue *q) {
    w->queue = q;
    w->thread = pthread_self();
    pthread_mutex_lock(&lock);
    int rc = q->closed ? -EBADF : use_signal(&w->before);
    if (rc == 0) {
        w->next = waiters;
        waiters = w;
    }
    pthread_mutex_unlock(&lock);
    sigset_t ours = only_our_signal();
    if (rc == 0 && sigismember(&w->before, wake_signal))
        pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
    return rc;
}

static void forget_waiter(const waiter *w) {
    waiter **link = &waiters;
    while (*link != w)
        link = &(*link)->next;
    *link = w->next;
}

/* What close() sent us must have been delivered before the handler goes, or the signal is blocked
 * again: it is when the next system call returns, since it was sent before we got the lock. */
static void take_delivery(const ik_sysv_queue *q) {
    if (q->closed) {
        pthread_cond_broadcast(&moved);
        pthread_mutex_unlock(&lock);
        syscall(SYS_gettid);
        pthread_mutex_lock(&lock);
    }
}

static void end_wait(const waiter *w) {
    pthread_mutex_lock(&lock);
    forget_waiter(w);
    take_delivery(w->queue);
    if (sigismember(&w->before, wake_signal))
        pthread_sigmask(SIG_SETMASK, &w->before, NULL);
    release_signal();
    pthread_mutex_unlock(&lock);
}

static int64_t wait_with_timer(ik_sysv_queue *q, const call *c, int64_t deadline_ns) {
    if (deadline_ns == IK_FOREVER)
        return make_call(id_of(q), c, 0);
    int64_t rc = start_timer(&own_timer, deadline_ns);
    if (rc < 0)
        return rc;
    rc = make_call(id_of(q), c, 0);
    stop_timer(&own_timer);
    return rc;
}

static int64_t wait_asleep(ik_sysv_queue *q, const call *c, int64_t deadline_ns) {
    waiter w;
    int64_t rc = begin_wait(&w, q);
    if (rc < 0)
        return rc;
    rc = wait_with_timer(q, c, deadline_ns);
    end_wait(&w);
    if (rc == -EINTR && deadline_ns != IK_FOREVER && ik_wait_now() >= deadline_ns)
        return -ETIMEDOUT;
    return rc;
}

/* Nanoseconds: how long to look, what is long for a moment, and how long at most not to look. */
enum { SPIN = 50000, LONG = 100000, LEAST = 1000, QUIET = 256 * MILLISECOND };

/* Somebody else took the processor for long, and a sleeper would have been back sooner: don't look
 * for a while, and longer each time. */
static void keep_quiet(ik_sysv_queue *q, int64_t now) {
    int64_t quiet = 2 * __atomic_load_n(&q->quiet, __ATOMIC_RELAXED) + MILLISECOND;
    quiet = quiet < QUIET ? quiet : QUIET;
    __atomic_store_n(&q->quiet, quiet, __ATOMIC_RELAXED);
    __atomic_store_n(&q->quiet_until, now + quiet, __ATOMIC_RELAXED);
}

/* Look for a message, or room, until then, giving the processor away each time. */
static int64_t look(ik_sysv_queue *q, const call *c, int64_t until) {
    int64_t rc = -EAGAIN, now = ik_wait_now(), before = now;
    while (rc == -EAGAIN && now < until) {
        before = now;
        sched_yield();
        rc = try_call(q, c);
        now = ik_wait_now();
    }
    if (now - before > LONG)
        keep_quiet(q, now);
    else if (rc != -EAGAIN)
        __atomic_store_n(&q->quiet, __atomic_load_n(&q->quiet, __ATOMIC_RELAXED) / 2,
                         __ATOMIC_RELAXED);
    return rc;
}

/* An answer often comes sooner than a sleeper can be woken, so look first; but only as long as that
 * has lately paid. */
static int64_t wait_for(ik_sysv_queue *q, const call *c, int64_t deadline_ns) {
    int64_t start = ik_wait_now();
    if (start < __atomic_load_n(&q->quiet_until, __ATOMIC_RELAXED))
        return wait_asleep(q, c, deadline_ns);
    int64_t *spin = &q->spin[c->sends], patience = __atomic_load_n(spin, __ATOMIC_RELAXED);
    int64_t until = start + patience;
    int64_t rc = look(q, c, deadline_ns != IK_FOREVER && deadline_ns < until ? deadline_ns : until);
    int64_t next = SPIN;
    if (rc == -EAGAIN) {
        rc = wait_asleep(q, c, deadline_ns);
        bool soon = ik_wait_now() - start < LONG;
        next = patience > LEAST ? patience / 2 : soon ? SPIN : 0;
    }
    __atomic_store_n(spin, next, __ATOMIC_RELAXED);
    return rc;
}

/* After a try that found it would have to wait. */
static int64_t go_on(ik_sysv_queue *q, const call *c, int64_t deadline_ns) {
    if (c->sends && never_fits(q, c->size))
        return -EMSGSIZE;
    return deadline_ns == IK_NOW ? -ETIMEDOUT : wait_for(q, c, deadline_ns);
}

static int64_t do_call(ik_sysv_queue *q, const call *c, int64_t deadline_ns) {
    int64_t rc = try_call(q, c);
    return rc == -EAGAIN ? go_on(q, c, deadline_ns) : rc;
}

/* --- watches: readable, but nothing is consumed ---------------------------------------------- */

/* Can the handle receive such a message now? To look for one of a certain type is to receive into
 * no room, which leaves all but empty messages where they are. */
static bool is_ready(ik_sysv_helper *h) {
    ik_sysv_queue *q = h->queue;
    if (find_held(q, &h->what) < held_count(q))
        return true;
    struct msqid_ds now;
    if (h->what.type == 0)
        return msgctl(h->id, IPC_STAT, &now) < 0 || now.msg_qnum > 0;
    int64_t rc = make_call(h->id, &h->what, IPC_NOWAIT);
    if (rc == 0)
        hold(q, h->message.type);
    return rc != -EAGAIN;
}

/* After a receive: a watch that told of a message that is gone waits for the next one. */
static void look_again(ik_sysv_queue *q) {
    eventfd_t count;
    pthread_mutex_lock(&lock);
    for (ik_sysv_helper *h = helpers; h; h = h->next)
        if (h->queue == q && h->running && !h->what.sends && !h->armed && !is_ready(h)) {
            eventfd_read(h->fd, &count);
            h->armed = true;
            pthread_cond_broadcast(&moved);
        }
    pthread_mutex_unlock(&lock);
}

static int64_t received(ik_sysv_queue *q, int64_t rc) {
    if (__atomic_load_n(&q->watches, __ATOMIC_RELAXED))
        look_again(q);
    return rc;
}

/* --- helpers --------------------------------------------------------------------------------- */

static bool must_end(const ik_sysv_helper *h) {
    return h->stop || h->queue->closed;
}

/* The blocking call, made without the lock. */
static int64_t call_unlocked(ik_sysv_helper *h) {
    pthread_mutex_unlock(&lock);
    int64_t rc = make_call(h->id, &h->what, 0);
    pthread_mutex_lock(&lock);
    return rc;
}

static int watch(ik_sysv_helper *h) {
    while (!must_end(h)) {
        if (!h->armed) {
            pthread_cond_wait(&moved, &lock);
            continue;
        }
        int64_t rc = call_unlocked(h); /* -E2BIG: there is one */
        if (rc == 0)
            hold(h->queue, h->message.type);
        else if (rc != -E2BIG && rc != -EINTR)
            return (int)rc;
        if (rc != -EINTR && is_ready(h)) { /* else another receiver was faster */
            h->armed = false;
            eventfd_write(h->fd, 1);
        }
    }
    return h->queue->closed ? -EBADF : -EINTR;
}

static int send_one(ik_sysv_helper *h) {
    int64_t rc = -EINTR;
    while (rc == -EINTR && !must_end(h))
        rc = call_unlocked(h);
    return rc == -EINTR && h->queue->closed ? -EBADF : (int)rc;
}

static void *help(void *argument) {
    ik_sysv_helper *h = argument;
    sigset_t ours = only_our_signal();
    pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
    pthread_mutex_lock(&lock);
    h->result = h->what.sends ? send_one(h) : watch(h);
    h->running = false;
    eventfd_write(h->fd, 1);
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&lock);
    return NULL;
}

/* A thread that no other signal reaches. */
static int start_thread(ik_sysv_helper *h) {
    sigset_t all, before;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 128 * 1024);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&h->thread, &small, help, h);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&small);
    return -error;
}

static int start_helper(ik_sysv_helper *h) {
    ik_sysv_queue *q = h->queue;
    sigset_t blocked;
    pthread_mutex_lock(&lock);
    int rc = q->closed ? -EBADF : use_signal(&blocked);
    if (rc == 0 && (rc = start_thread(h)) < 0)
        release_signal();
    if (rc == 0) {
        h->running = h->armed = true;
        h->next = helpers;
        helpers = h;
        q->references++;
        __atomic_add_fetch(&q->watches, !h->what.sends, __ATOMIC_RELAXED);
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

static ik_sysv_helper *new_helper(ik_sysv_queue *q, const call *what, size_t size, int *ret_error) {
    ik_sysv_helper *h = calloc(1, sizeof *h + size);
    int fd = h ? eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) : -1;
    *ret_error = h ? -errno : -ENOMEM;
    if (fd >= 0) {
        h->queue = q;
        h->id = q->id;
        h->fd = fd;
        h->what = *what;
        h->what.buffer = &h->message.type;
        if (what->sends) {
            h->message.type = what->type;
            memcpy(h->message.text, what->buffer, size);
        }
        *ret_error = start_helper(h);
        if (*ret_error == 0)
            return h;
        close(fd);
    }
    free(h);
    return NULL;
}

ik_sysv_helper *ik_sysv_queue_watch(ik_sysv_queue *queue, int64_t type, int all_but,
                                    int *ret_error) {
    call what = {.all_but = all_but, .type = type};
    return new_helper(queue, &what, 0, ret_error);
}

ik_sysv_helper *ik_sysv_queue_sender(ik_sysv_queue *queue, const char *data, size_t size,
                                     int64_t type, int *ret_error) {
    call what = {.sends = true, .buffer = (void *)data, .size = size, .type = type};
    return new_helper(queue, &what, size, ret_error);
}

int ik_sysv_helper_fileno(const ik_sysv_helper *helper) {
    return helper->fd;
}

static void wait_moved(void) {
    int64_t until = ik_wait_now() + MILLISECOND;
    struct timespec when = {until / 1000000000, until % 1000000000};
    pthread_cond_timedwait(&moved, &lock, &when);
}

static void forget_helper(const ik_sysv_helper *h) {
    ik_sysv_helper **link = &helpers;
    while (*link != h)
        link = &(*link)->next;
    *link = h->next;
}

int ik_sysv_helper_stop(ik_sysv_helper *h) {
    if (h->joined)
        return h->result;
    pthread_mutex_lock(&lock);
    h->stop = true;
    pthread_cond_broadcast(&moved);
    while (h->running) { /* again, as it may not have been in its call yet */
        pthread_kill(h->thread, wake_signal);
        wait_moved();
    }
    forget_helper(h);
    __atomic_sub_fetch(&h->queue->watches, !h->what.sends, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&lock);
    pthread_join(h->thread, NULL);
    h->joined = true;
    close(h->fd);
    h->fd = -1;
    pthread_mutex_lock(&lock);
    release_signal();
    pthread_mutex_unlock(&lock);
    return h->result;
}

static void release_queue(ik_sysv_queue *q) {
    pthread_mutex_lock(&lock);
    bool last = --q->references == 0;
    pthread_mutex_unlock(&lock);
    if (last) {
        free(q->held);
        free(q);
    }
}

void ik_sysv_helper_free(ik_sysv_helper *h) {
    ik_sysv_helper_stop(h);
    release_queue(h->queue);
    free(h);
}

/* --- the handle ------------------------------------------------------------------------------ */

int ik_sysv_queue_get(int key, int create, int exclusive, int mode) {
    int flags = (mode & 0777) | (create ? IPC_CREAT : 0) | (exclusive ? IPC_EXCL : 0);
    int id = msgget(key, flags);
    return id < 0 ? -errno : id;
}

ik_sysv_queue *ik_sysv_queue_new(int id) {
    ik_sysv_queue *q = calloc(1, sizeof *q);
    if (q) {
        q->id = id;
        q->references = 1;
        q->generation = generation;
    }
    return q;
}

/* Interrupt all that wait on the handle; is anything left? */
static bool interrupt_all(const ik_sysv_queue *q) {
    bool left = false;
    for (const waiter *w = waiters; w; w = w->next)
        if (w->queue == q) {
            left = true;
            pthread_kill(w->thread, wake_signal);
        }
    for (const ik_sysv_helper *h = helpers; h; h = h->next)
        if (h->queue == q && h->running) {
            left = true;
            pthread_kill(h->thread, wake_signal);
        }
    return left;
}

void ik_sysv_queue_close(ik_sysv_queue *q) {
    pthread_mutex_lock(&lock);
    __atomic_store_n(&q->closed, true, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&moved);
    while (interrupt_all(q))
        wait_moved();
    give_back_held(q);
    __atomic_store_n(&q->id, -1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&lock);
}

void ik_sysv_queue_free(ik_sysv_queue *q) {
    ik_sysv_queue_close(q);
    release_queue(q);
}

/* A call that an interruption by close() ended, or that came after it. */
static int64_t told(const ik_sysv_queue *q, int64_t rc) {
    bool ended = rc == -EINTR || rc == -EINVAL;
    return ended && __atomic_load_n(&q->closed, __ATOMIC_RELAXED) ? -EBADF : rc;
}

/* --- sending --------------------------------------------------------------------------------- */

enum { SMALL = 8192 };

static int64_t send_from(ik_sysv_queue *q, char *memory, const char *data, size_t size, long type,
                         int64_t deadline_ns) {
    call c = {.sends = true, .buffer = memory, .size = size};
    set_type(&c, type);
    memcpy(memory + sizeof type, data, size);
    return do_call(q, &c, deadline_ns);
}

static int64_t send_large(ik_sysv_queue *q, const char *data, size_t size, long type,
                          int64_t deadline_ns) {
    char *memory = malloc(sizeof type + size);
    int64_t rc = memory ? send_from(q, memory, data, size, type, deadline_ns) : -ENOMEM;
    free(memory);
    return rc;
}

int ik_sysv_queue_send(ik_sysv_queue *queue, const char *data, size_t size, int64_t type,
                       int64_t deadline_ns) {
    char memory[sizeof(long) + SMALL] __attribute__((aligned(sizeof(long))));
    int64_t rc = size <= SMALL ? send_from(queue, memory, data, size, type, deadline_ns)
                               : send_large(queue, data, size, type, deadline_ns);
    return (int)told(queue, rc);
}

/* --- receiving ------------------------------------------------------------------------------- */

static call receive_into(ik_sysv_message *m, int64_t type, int all_but) {
    return (call){.all_but = all_but, .buffer = &m->type, .size = m->room, .type = type};
}

int64_t ik_sysv_queue_recv(ik_sysv_message *message, int64_t type, int all_but,
                           int64_t deadline_ns) {
    ik_sysv_queue *q = message->queue;
    call c = receive_into(message, type, all_but);
    return told(q, received(q, do_call(q, &c, deadline_ns)));
}

int64_t ik_sysv_queue_peek(ik_sysv_message *message, int64_t index) {
    ik_sysv_queue *queue = message->queue;
    pthread_mutex_lock(&lock);
    int64_t held = (int64_t)held_count(queue);
    if (index < held)
        message->type = queue->held[index];
    pthread_mutex_unlock(&lock);
    if (index < held)
        return 0;
    int64_t rc =
        msgrcv(id_of(queue), &message->type, message->room, index - held, MSG_COPY | IPC_NOWAIT);
    return rc < 0 ? told(queue, -errno) : rc;
}

/* --- the queue itself ------------------------------------------------------------------------ */

int ik_sysv_queue_stat(ik_sysv_queue *queue, ik_sysv_queue_info *ret_info) {
    struct msqid_ds now;
    if (msgctl(id_of(queue), IPC_STAT, &now) < 0)
        return (int)told(queue, -errno);
    const struct ipc_perm *perm = &now.msg_perm;
    *ret_info = (ik_sysv_queue_info){.messages = now.msg_qnum,
                                     .bytes = now.__msg_cbytes,
                                     .max_bytes = now.msg_qbytes,
                                     .send_time = now.msg_stime,
                                     .receive_time = now.msg_rtime,
                                     .change_time = now.msg_ctime,
                                     .send_pid = now.msg_lspid,
                                     .receive_pid = now.msg_lrpid,
                                     .uid = perm->uid,
                                     .gid = perm->gid,
                                     .creator_uid = perm->cuid,
                                     .creator_gid = perm->cgid,
                                     .mode = perm->mode,
                                     .key = perm->__key};
    return 0;
}

int ik_sysv_queue_set(ik_sysv_queue *queue, int64_t max_bytes, int64_t mode, int64_t uid,
                      int64_t gid) {
    struct msqid_ds now;
    /* See ik_sysv_memory_set(). */
    int id = id_of(queue), found = msgctl(id, MSG_STAT_ANY, &now);
    if (found < 0 || found != id)
        return (int)told(queue, found < 0 ? -errno : -EINVAL);
    if (max_bytes >= 0)
        now.msg_qbytes = (msglen_t)max_bytes;
    if (mode >= 0)
        now.msg_perm.mode = (unsigned short)mode;
    if (uid >= 0)
        now.msg_perm.uid = (uid_t)uid;
    if (gid >= 0)
        now.msg_perm.gid = (gid_t)gid;
    return msgctl(id, IPC_SET, &now) < 0 ? -errno : 0;
}

int ik_sysv_queue_remove(int id) {
    return msgctl(id, IPC_RMID, NULL) < 0 ? -errno : 0;
}

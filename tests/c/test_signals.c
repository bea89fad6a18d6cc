/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel.h"
#include "signals.h"

static volatile int python_calls;

static void like_cpython(int signum) {
    (void)signum;
    python_calls++;
    errno = ENOTTY; /* must not be seen by who was interrupted */
}

static void catch(int signum) {
    assert(ik_signals_prepare(signum, 0) == 0);
    signal(signum, like_cpython);
    assert(ik_signals_catch(signum) == 0);
}

static ik_signals_info only_one(int signum) {
    ik_signals_look look = {0};
    assert(ik_signals_enter(signum, &look) == 1);
    assert(ik_signals_next(&look) == 1);
    ik_signals_begin(&look, 0);
    ik_signals_info info = look.info;
    assert(ik_signals_next(&look) == 0);
    ik_signals_leave(&look);
    return info;
}

/* The kernel lets a thread send itself any siginfo. */
static void forge(siginfo_t *info) {
    assert(syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), info->si_signo, info) == 0);
}

static void each_kind_has_its_fields_and_zero_in_the_others(void) {
    catch(SIGSEGV);
    siginfo_t fault = {.si_signo = SIGSEGV, .si_code = SEGV_MAPERR};
    fault.si_addr = (void *)0x1234;
    forge(&fault);
    ik_signals_info got = only_one(SIGSEGV);
    assert(got.addr == 0x1234 && got.pid == 0 && got.status == 0 && got.band == 0);

    catch(SIGIO);
    siginfo_t io = {.si_signo = SIGIO, .si_code = POLL_IN};
    io.si_band = 65;
    forge(&io);
    got = only_one(SIGIO);
    assert(got.band == 65 && got.addr == 0 && got.pid == 0);

    catch(SIGCHLD);
    siginfo_t child = {.si_signo = SIGCHLD, .si_code = CLD_EXITED};
    child.si_pid = 77;
    child.si_uid = 5;
    child.si_status = 3;
    forge(&child);
    got = only_one(SIGCHLD);
    assert(got.pid == 77 && got.uid == 5 && got.status == 3 && got.value == 0);

    catch(SIGALRM);
    siginfo_t timer = {.si_signo = SIGALRM, .si_code = SI_TIMER};
    timer.si_value.sival_int = -9;
    forge(&timer);
    got = only_one(SIGALRM);
    assert(got.code == SI_TIMER && got.value == -9 && got.pid == 0);

    siginfo_t kernel = {.si_signo = SIGALRM, .si_code = SI_KERNEL};
    forge(&kernel);
    got = only_one(SIGALRM);
    assert(got.code == SI_KERNEL && got.band == 0 && got.pid == 0);
}

static int is_blocked(int signum) {
    sigset_t now;
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    return sigismember(&now, signum);
}

static int is_pending(int signum) {
    sigset_t now;
    sigpending(&now);
    return sigismember(&now, signum);
}

static void unblock(int signum) {
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, signum);
    pthread_sigmask(SIG_UNBLOCK, &one, NULL);
}

static void a_full_ring_leaves_the_rest_to_the_kernel(void) {
    int signum = SIGRTMIN, sent = 0;
    catch(signum);
    while (!is_blocked(signum))
        assert(ik_signals_queue(getpid(), signum, sent++) == 0);
    assert(sent > 1000);
    /* What other threads would do: bring more although the main thread takes none. */
    while (!is_pending(signum)) {
        assert(ik_signals_queue(getpid(), signum, sent++) == 0);
        unblock(signum);
    }
    assert(sent > 4000 && is_blocked(signum));
    assert(ik_signals_queue(getpid(), signum, sent++) == 0);

    ik_signals_look look = {0};
    int expected = 0;
    for (python_calls = 1; python_calls > 0;) { /* as CPython: look until nobody trips */
        python_calls = 0;
        look = (ik_signals_look){0};
        assert(ik_signals_enter(signum, &look) == 1);
        while (ik_signals_next(&look)) {
            ik_signals_begin(&look, UINT64_C(1) << (signum - 1));
            assert(look.info.value == expected++);
        }
        ik_signals_leave(&look);
    }
    assert(expected == sent);
    assert(!is_blocked(signum) && !is_pending(signum));
}

static void what_is_held_back_can_be_blocked_for_good(void) {
    int signum = SIGRTMIN + 1;
    catch(signum);
    while (!is_blocked(signum))
        assert(ik_signals_queue(getpid(), signum, 0) == 0);
    uint64_t set = UINT64_C(1) << (signum - 1), added;
    ik_signals_block(set, &added);
    assert(added == set);
    ik_signals_look look = {0};
    assert(ik_signals_enter(signum, &look) == 1);
    while (ik_signals_next(&look))
        ik_signals_begin(&look, set);
    ik_signals_leave(&look);
    assert(is_blocked(signum)); /* room again, but now it is the caller's */
    ik_signals_unblock(added);
    assert(!is_blocked(signum));
}

static void the_interrupted_code_keeps_its_errno(void) {
    catch(SIGUSR1);
    errno = EXDEV;
    raise(SIGUSR1);
    assert(errno == EXDEV);
    assert(only_one(SIGUSR1).pid == getpid());
}

static void a_look_within_a_look_waits_for_the_outer_one(void) {
    catch(SIGUSR1);
    raise(SIGUSR1);
    ik_signals_look outer = {0}, inner = {0};
    assert(ik_signals_enter(SIGUSR1, &outer) == 1);
    assert(ik_signals_enter(SIGUSR1, &inner) == 0);
    ik_signals_leave(&inner);
    python_calls = 0;
    ik_signals_leave(&outer);
    assert(python_calls == 1); /* it did not look, so CPython must again */
    only_one(SIGUSR1);
}

static void end_well(int signum) {
    _exit(signum == SIGSEGV ? 0 : 1);
}

/* That a thread can send itself a fault, as if the kernel had: qemu-user dies of it. */
static bool forged_faults(void) {
    int pid = fork(), status;
    if (pid == 0) {
        siginfo_t fault = {.si_signo = SIGSEGV, .si_code = SEGV_MAPERR};
        close(1);
        close(2); /* what the emulator has to say */
        signal(SIGSEGV, end_well);
        syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGSEGV, &fault);
        _exit(1);
    }
    return waitpid(pid, &status, 0) == pid && status == 0;
}

static const uint64_t TERM = UINT64_C(1) << (SIGTERM - 1);

static void note(int signum, int fd) {
    assert(ik_signals_displace(signum) == 0);
    signal(signum, like_cpython);
    assert(ik_signals_bell(signum, fd) == -1);
    assert(ik_signals_note(signum) == 0);
}

static uint64_t rung(int fd) {
    uint64_t count = 0;
    assert(read(fd, &count, sizeof count) == sizeof count || errno == EAGAIN);
    return count;
}

static void *raise_here(void *signum) {
    raise(*(int *)signum);
    return NULL;
}

static void a_signal_is_noted_whichever_thread_gets_it(void) {
    int fd = eventfd(0, EFD_NONBLOCK), signum = SIGTERM;
    note(SIGTERM, fd);
    pthread_t thread;
    pthread_create(&thread, NULL, raise_here, &signum);
    pthread_join(thread, NULL);
    assert(rung(fd) == 1);
    errno = EXDEV;
    raise(SIGTERM);
    assert(errno == EXDEV);
    raise(SIGTERM);
    assert(rung(fd) == 2);
    assert(ik_signals_take(~TERM) == 0 && ik_signals_take(TERM) == TERM);
    assert(ik_signals_take(~UINT64_C(0)) == 0);

    raise(SIGTERM); /* a bell that comes later rings for it too */
    assert(rung(fd) == 1);
    assert(ik_signals_bell(SIGTERM, fd) == fd && rung(fd) == 1);
    assert(ik_signals_take(TERM) == TERM);
    close(fd);
}

static void cpython_s_handler_gives_way(void) {
    int fd = eventfd(0, EFD_NONBLOCK);
    assert(ik_signals_bell(SIGTERM, fd) >= 0);
    python_calls = 0;
    signal(SIGTERM, like_cpython);
    raise(SIGTERM);
    assert(python_calls == 1 && rung(fd) == 0);
    ik_signals_note_again(SIGTERM);
    assert(rung(fd) == 1);
    raise(SIGTERM);
    assert(python_calls == 1 && rung(fd) == 1);
    close(fd);
}

static volatile int theirs;

static void their_handler(int signum, siginfo_t *info, void *context) {
    (void)context;
    theirs += signum == SIGUSR2 && info->si_code == SI_QUEUE && info->si_value.sival_int == 42;
}

static void without_a_bell_it_is_as_if_it_had_never_been(void) {
    struct sigaction action = {.sa_sigaction = their_handler, .sa_flags = SA_SIGINFO}, now;
    sigaction(SIGUSR2, &action, NULL);
    note(SIGUSR2, -1);
    assert(ik_signals_queue(getpid(), SIGUSR2, 42) == 0);
    assert(theirs == 1);
    sigaction(SIGUSR2, NULL, &now);
    assert(now.sa_sigaction == their_handler && now.sa_flags & SA_SIGINFO);
}

static void so_in_a_forked_child(void) {
    int fd = eventfd(0, EFD_NONBLOCK), status;
    signal(SIGTERM, SIG_DFL);
    note(SIGHUP, fd);
    int pid = fork();
    if (pid == 0) {
        raise(SIGHUP);
        _exit(1);
    }
    assert(waitpid(pid, &status, 0) == pid);
    assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGHUP && rung(fd) == 0);
    raise(SIGHUP);
    assert(rung(fd) == 1);
    close(fd);
}

int main(void) {
    if (has("forged faults", forged_faults()))
        each_kind_has_its_fields_and_zero_in_the_others();
    a_full_ring_leaves_the_rest_to_the_kernel();
    what_is_held_back_can_be_blocked_for_good();
    the_interrupted_code_keeps_its_errno();
    a_look_within_a_look_waits_for_the_outer_one();
    a_signal_is_noted_whichever_thread_gets_it();
    cpython_s_handler_gives_way();
    without_a_bell_it_is_as_if_it_had_never_been();
    so_in_a_forked_child();
    return 0;
}

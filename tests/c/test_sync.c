/* SPDX-License-Identifier: MIT
 *
 * Above all: each operation is killed before each of its instructions, by ptrace, beside a process
 * that sleeps in the same thing; who lives must go on. That is done with IPCKIT_SLICES=1 for a
 * slice of the instructions, and with IPCKIT_PROOF=1 for all of them.
 */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernel.h"
#include "sync.h"

/* Every so many instructions one is where the kill comes; a sanitizer makes many more of them. */
#ifdef __SANITIZE_ADDRESS__
enum { SLICE = 1499 };
#else
enum { SLICE = 47 };
#endif

static void *memory;  /* what is tested */
static int *sleeping; /* how many children are about to sleep */
static ik_spin no_spin;

static int64_t in(int64_t milliseconds) {
    return ik_wait_now() + milliseconds * 1000000;
}

static void make(int kind, uint32_t number) {
    assert(ik_sync_create(memory, kind, number, IK_SYNC_LARGEST) == 0);
    assert(ik_sync_attach(memory, kind) == 0);
    __atomic_store_n(sleeping, 0, __ATOMIC_SEQ_CST);
}

/* --- children -------------------------------------------------------------------------------- */

static pid_t start(void (*body)(void)) {
    pid_t pid = fork();
    assert(pid >= 0);
    if (pid == 0) {
        body();
        _exit(0);
    }
    return pid;
}

/* The children before it are where they say. */
static pid_t start_sleeper(void (*body)(void)) {
    int before = __atomic_load_n(sleeping, __ATOMIC_SEQ_CST);
    pid_t pid = start(body);
    while (__atomic_load_n(sleeping, __ATOMIC_SEQ_CST) == before)
        usleep(10);
    return pid;
}

static void about_to_sleep(void) {
    __atomic_fetch_add(sleeping, 1, __ATOMIC_SEQ_CST);
}

/* Its exit code. It ends, and two minutes are enough for that on any machine. */
static int code_of(pid_t pid) {
    int status = 0;
    for (int64_t end = in(120000); waitpid(pid, &status, WNOHANG) == 0; usleep(50))
        assert(ik_wait_now() < end);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void end_of(pid_t pid) {
    assert(kill(pid, SIGKILL) == 0);
    assert(code_of(pid) == -SIGKILL);
}

/* --- what they do ---------------------------------------------------------------------------- */

static int again(int rc) {
    return rc == -EINTR;
}

static void use_lock(void) {
    int rc;
    while (again(rc = ik_sync_lock_take(memory, &no_spin, IK_FOREVER))) {
    }
    assert(rc == IK_SYNC_TAKEN || rc == IK_SYNC_RECOVERED);
    assert(ik_sync_lock_depth(memory) == 1);
    assert(ik_sync_lock_release(memory) == 0);
}

static void use_lock_twice(void) {
    assert(ik_sync_lock_take(memory, &no_spin, IK_FOREVER) >= 0);
    assert(ik_sync_lock_take(memory, &no_spin, IK_FOREVER) == IK_SYNC_AGAIN);
    assert(ik_sync_lock_release(memory) == 0);
    assert(ik_sync_lock_release(memory) == 0);
}

static void set_event(void) {
    ik_sync_event_set(memory);
}

static void wait_for_event(void) {
    uint32_t sets = ik_sync_event_sets(memory);
    about_to_sleep();
    while (again(ik_sync_event_wait(memory, sets, &no_spin, IK_FOREVER))) {
    }
}

static void take_semaphore(void) {
    about_to_sleep();
    while (again(ik_sync_semaphore_take(memory, &no_spin, IK_FOREVER))) {
    }
}

static void take_semaphore_at_once(void) {
    ik_sync_semaphore_take(memory, &no_spin, IK_NOW);
}

static void release_semaphore(void) {
    ik_sync_semaphore_release(memory);
}

/* The tests have no lock for the condition: what is behind the guard needs none. */
static void wait_for_condition(void) {
    int seat = ik_sync_condition_enter(memory);
    about_to_sleep();
    while (again(ik_sync_condition_sleep(memory, seat, &no_spin, IK_FOREVER))) {
    }
    assert(ik_sync_condition_leave(memory, seat, 0) == 1);
}

static void sit_in_condition(void) {
    ik_sync_condition_enter(memory);
    about_to_sleep();
    pause();
}

static void try_condition(void) {
    int seat = ik_sync_condition_enter(memory);
    ik_sync_condition_sleep(memory, seat, &no_spin, IK_NOW);
    ik_sync_condition_leave(memory, seat, 0);
}

static void notify_condition(void) {
    ik_sync_condition_notify(memory, 1);
}

/* As who waits and is notified, and dies or gives up. */
static void be_notified_and_pass_on(void) {
    int seat = ik_sync_condition_enter(memory);
    ik_sync_condition_notify(memory, 2);
    ik_sync_condition_leave(memory, seat, 1);
}

static void pass_barrier(void) {
    ik_sync_party party;
    int rc;
    while (again(rc = ik_sync_barrier_enter(memory, &party, IK_FOREVER))) {
    }
    if (rc < 0)
        _exit(1);
    about_to_sleep();
    if (rc == 1)
        rc = ik_sync_barrier_pass(memory);
    else
        while (again(rc = ik_sync_barrier_sleep(memory, &party, &no_spin, IK_FOREVER))) {
        }
    assert(ik_sync_barrier_leave(memory, &party) == 0);
    if (rc < 0)
        _exit(1);
}

static void enter_and_leave_barrier(void) {
    ik_sync_party party;
    if (ik_sync_barrier_enter(memory, &party, IK_NOW) >= 0)
        ik_sync_barrier_leave(memory, &party);
}

static void look_at_barrier(void) {
    ik_sync_barrier_waiting(memory);
}

static void abort_barrier(void) {
    ik_sync_barrier_break(memory);
}

static void reset_barrier(void) {
    ik_sync_barrier_reset(memory);
}

/* --- before and after the kill --------------------------------------------------------------- */

static pid_t sleeper;

static void a_lock(void) {
    make(IK_SYNC_LOCK, 0);
}

static void an_rlock(void) {
    make(IK_SYNC_RLOCK, 0);
}

static void the_lock_is_usable(void) {
    assert(code_of(start(use_lock)) == 0);
    assert(ik_sync_lock_holder(memory) == 0);
}

static void an_event(void) {
    make(IK_SYNC_EVENT, 0);
    sleeper = start_sleeper(wait_for_event);
}

static void the_event_wakes(void) {
    if (!ik_sync_event_is_set(memory))
        ik_sync_event_set(memory);
    assert(code_of(sleeper) == 0);
}

static void a_semaphore(void) {
    make(IK_SYNC_SEMAPHORE, 0);
    sleeper = start_sleeper(take_semaphore);
}

static void one_or_none_was_released(void) {
    ik_sync_semaphore_release(memory);
    assert(code_of(sleeper) == 0);
    assert(ik_sync_semaphore_value(memory) <= 1);
}

static void a_semaphore_of_one(void) {
    make(IK_SYNC_SEMAPHORE, 1);
}

static void one_or_none_was_taken(void) {
    assert(ik_sync_semaphore_value(memory) <= 1);
}

static void a_condition(void) {
    make(IK_SYNC_CONDITION, 0);
    sleeper = start_sleeper(wait_for_condition);
}

static void one_notify_is_enough(void) {
    assert(ik_sync_condition_notify(memory, 1) <= 1);
    assert(code_of(sleeper) == 0);
    assert(ik_sync_condition_notify(memory, 5) == 0);
}

/* So that he doesn't look around himself, before who is to be killed does. */
static void stop_the_sleeper(void) {
    int status;
    assert(kill(sleeper, SIGSTOP) == 0);
    assert(waitpid(sleeper, &status, WUNTRACED) == sleeper && WIFSTOPPED(status));
}

/* The dead one was told what the living one waits for. */
static void a_condition_to_inherit(void) {
    make(IK_SYNC_CONDITION, 0);
    pid_t dead = start_sleeper(sit_in_condition);
    sleeper = start_sleeper(wait_for_condition);
    stop_the_sleeper();
    assert(ik_sync_condition_notify(memory, 1) == 1);
    end_of(dead);
}

static void it_was_inherited(void) {
    assert(kill(sleeper, SIGCONT) == 0);
    assert(code_of(sleeper) == 0);
    assert(ik_sync_condition_notify(memory, 5) == 0);
}

static void a_barrier(void) {
    make(IK_SYNC_BARRIER, 2);
    sleeper = start_sleeper(pass_barrier);
}

static void it_is_usable(void) {
    assert(ik_sync_barrier_waiting(memory) == 0);
    if (ik_sync_barrier_is_broken(memory))
        assert(ik_sync_barrier_reset(memory) == 0);
    pid_t other = start(pass_barrier);
    assert(code_of(start(pass_barrier)) == 0 && code_of(other) == 0);
}

static void an_empty_barrier(void) {
    make(IK_SYNC_BARRIER, 2);
}

/* One of three is dead, one sleeps. */
static void a_barrier_with_a_dead_party(void) {
    make(IK_SYNC_BARRIER, 3);
    pid_t dead = start_sleeper(pass_barrier);
    sleeper = start_sleeper(pass_barrier);
    stop_the_sleeper();
    end_of(dead);
}

static void the_death_was_noticed(void) {
    assert(kill(sleeper, SIGCONT) == 0);
    assert(code_of(sleeper) == 1);
    assert(ik_sync_barrier_is_broken(memory) == 1);
}

/* Or killed before it did anything. */
static void broken_or_passed(void) {
    if (!ik_sync_barrier_is_broken(memory) && ik_sync_barrier_waiting(memory) == 1)
        assert(ik_sync_barrier_break(memory) == 0);
    code_of(sleeper);
    it_is_usable();
}

/* --- by threads, for the thread sanitizer too: plain variables, ordered by what is tested ------
 */

enum { THREADS = 4, ROUNDS = 200 };

static char *places[5];
static int cells[THREADS], counter, told;

static void lie_at(int number, int kind, uint32_t value) {
    places[number] = (char *)memory + number * IK_SYNC_SEATED_SIZE;
    assert(ik_sync_create(places[number], kind, value, IK_SYNC_LARGEST) == 0);
}

static void pass(void) {
    ik_sync_barrier *barrier = (ik_sync_barrier *)places[0];
    ik_sync_party party;
    ik_spin spin = {0};
    int rc;
    while (again(rc = ik_sync_barrier_enter(barrier, &party, IK_FOREVER))) {
    }
    if (rc == 1)
        rc = ik_sync_barrier_pass(barrier);
    else
        while (again(rc = ik_sync_barrier_sleep(barrier, &party, &spin, IK_FOREVER))) {
        }
    assert(rc == 0 && ik_sync_barrier_leave(barrier, &party) == 0);
}

static void count_by_semaphore(void) {
    ik_spin spin = {0};
    while (again(ik_sync_semaphore_take((ik_sync_semaphore *)places[1], &spin, IK_FOREVER))) {
    }
    counter++;
    assert(ik_sync_semaphore_release((ik_sync_semaphore *)places[1]) == 0);
}

static void lock(void) {
    ik_spin spin = {0};
    while (again(ik_sync_lock_take((ik_sync_lock *)places[2], &spin, IK_FOREVER))) {
    }
}

static void unlock(void) {
    assert(ik_sync_lock_release((ik_sync_lock *)places[2]) == 0);
}

/* The first tells, the others wait to be told, of this round. */
static void tell(int round) {
    lock();
    told = round;
    assert(ik_sync_condition_notify((ik_sync_condition *)places[3], THREADS) >= 0);
    unlock();
}

static void be_told(int round) {
    ik_sync_condition *condition = (ik_sync_condition *)places[3];
    ik_spin spin = {0};
    lock();
    while (told != round) {
        int seat = ik_sync_condition_enter(condition);
        unlock();
        while (again(ik_sync_condition_sleep(condition, seat, &spin, IK_FOREVER))) {
        }
        lock();
        assert(ik_sync_condition_leave(condition, seat, 0) == 1);
    }
    unlock();
}

static void *use_all(void *argument) {
    int me = (int)(intptr_t)argument;
    ik_sync_event *event = (ik_sync_event *)places[4];
    ik_spin spin = {0};
    for (int round = 1; round <= ROUNDS; round++) {
        cells[me] = round;
        pass();
        for (int i = 0; i < THREADS; i++)
            assert(cells[i] == round);
        count_by_semaphore();
        me == 0 ? tell(round) : be_told(round);
        pass();
    }
    if (me == 0)
        ik_sync_event_set(event);
    while (again(ik_sync_event_wait(event, 0, &spin, IK_FOREVER))) {
    }
    return NULL;
}

static void test_threads(void) {
    pthread_t threads[THREADS];
    lie_at(0, IK_SYNC_BARRIER, THREADS);
    lie_at(1, IK_SYNC_SEMAPHORE, 1);
    lie_at(2, IK_SYNC_LOCK, 0);
    lie_at(3, IK_SYNC_CONDITION, 0);
    lie_at(4, IK_SYNC_EVENT, 0);
    for (intptr_t i = 0; i < THREADS; i++)
        assert(pthread_create(&threads[i], NULL, use_all, (void *)i) == 0);
    for (int i = 0; i < THREADS; i++)
        assert(pthread_join(threads[i], NULL) == 0);
    assert(counter == THREADS * ROUNDS);
}

/* --- killed at each instruction -------------------------------------------------------------- */

typedef struct {
    const char *name;
    void (*before)(void);
    void (*killed)(void);
    void (*after)(void);
} scenario;

static const scenario scenarios[] = {
    {"lock: take, release", a_lock, use_lock, the_lock_is_usable},
    {"rlock: take twice, release twice", an_rlock, use_lock_twice, the_lock_is_usable},
    {"event: set", an_event, set_event, the_event_wakes},
    {"semaphore: release", a_semaphore, release_semaphore, one_or_none_was_released},
    {"semaphore: take", a_semaphore_of_one, take_semaphore_at_once, one_or_none_was_taken},
    {"condition: wait in vain", a_condition, try_condition, one_notify_is_enough},
    {"condition: notify", a_condition, notify_condition, one_notify_is_enough},
    {"condition: give up a notification", a_condition, be_notified_and_pass_on,
     one_notify_is_enough},
    {"condition: inherit", a_condition_to_inherit, try_condition, it_was_inherited},
    {"barrier: the first, leaving", an_empty_barrier, enter_and_leave_barrier, it_is_usable},
    {"barrier: the last", a_barrier, pass_barrier, broken_or_passed},
    {"barrier: find a dead party", a_barrier_with_a_dead_party, look_at_barrier,
     the_death_was_noticed},
    {"barrier: abort", a_barrier, abort_barrier, broken_or_passed},
    {"barrier: reset", a_barrier, reset_barrier, broken_or_passed},
};

static void be_traced(void) {
    ptrace(PTRACE_TRACEME, 0, NULL, NULL);
    raise(SIGSTOP);
}

/* Kill it after so many instructions; false if it was over before. */
static bool kill_after(const scenario *one, long instructions) {
    pid_t pid = fork();
    if (pid == 0) {
        be_traced();
        one->killed();
        _exit(0);
    }
    int status;
    assert(waitpid(pid, &status, 0) == pid);
    for (long i = 0; i < instructions && WIFSTOPPED(status); i++) {
        assert(ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0);
        assert(waitpid(pid, &status, 0) == pid);
    }
    if (!WIFSTOPPED(status))
        return false;
    assert(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid);
    return true;
}

static void step_through(const scenario *one, long stride) {
    long points = 0, at = 0;
    for (bool alive = true; alive; at += stride, points++) {
        one->before();
        alive = kill_after(one, at);
        one->after();
    }
    printf("%-36s %5ld points of %ld\n", one->name, points, at);
    fflush(stdout);
}

static bool can_trace(void) {
    int status;
    pid_t pid = start(be_traced);
    assert(waitpid(pid, &status, WUNTRACED) == pid);
    bool stopped = WIFSTOPPED(status);
    end_of(pid);
    return stopped;
}

/* --- without killing ------------------------------------------------------------------------- */

static void test_attach(void) {
    for (int kind = IK_SYNC_LOCK; kind <= IK_SYNC_BARRIER; kind++) {
        make(kind, 1);
        for (int other = IK_SYNC_LOCK; other <= IK_SYNC_BARRIER; other++)
            assert(ik_sync_attach(memory, other) == (other == kind ? 0 : -EBADMSG));
    }
}

static void test_all_seats(void) {
    make(IK_SYNC_CONDITION, 0);
    for (int i = 0; i < IK_SYNC_SEATS; i++)
        assert(ik_sync_condition_enter(memory) == i);
    assert(ik_sync_condition_enter(memory) == -EUSERS);
    assert(ik_sync_condition_notify(memory, 1000) == IK_SYNC_SEATS);
    for (int i = 0; i < IK_SYNC_SEATS; i++)
        assert(ik_sync_condition_leave(memory, i, 0) == 1);
    assert(ik_sync_condition_enter(memory) == 0);
    assert(ik_sync_condition_leave(memory, 0, 0) == 0);
}

static void sit_a_hundred_times(void) {
    for (int i = 0; i < 100; i++)
        assert(ik_sync_condition_enter(memory) >= 0);
}

static void test_seats_of_the_dead_are_free(void) {
    make(IK_SYNC_CONDITION, 0);
    for (int i = 0; i < 10; i++)
        assert(code_of(start(sit_a_hundred_times)) == 0);
    assert(ik_sync_condition_notify(memory, 1000) == 0);
}

static void test_first_come_first_notified(void) {
    make(IK_SYNC_CONDITION, 0);
    for (int i = 0; i < 3; i++)
        ik_sync_condition_enter(memory);
    assert(ik_sync_condition_leave(memory, 0, 0) == 0);
    assert(ik_sync_condition_enter(memory) == 0); /* the last to come, on the first seat */
    assert(ik_sync_condition_notify(memory, 2) == 2);
    assert(ik_sync_condition_sleep(memory, 1, &no_spin, IK_NOW) == 0);
    assert(ik_sync_condition_leave(memory, 1, 1) == 1); /* gives it to the one that is left */
    assert(ik_sync_condition_leave(memory, 2, 0) == 1);
    assert(ik_sync_condition_leave(memory, 0, 0) == 1);
}

static void test_time_out_in_a_barrier(void) {
    make(IK_SYNC_BARRIER, 2);
    ik_sync_party party;
    int64_t end = in(20);
    assert(ik_sync_barrier_enter(memory, &party, end) == 0);
    assert(ik_sync_barrier_waiting(memory) == 1);
    int rc;
    while (again(rc = ik_sync_barrier_sleep(memory, &party, &no_spin, end))) {
    }
    assert(rc == -EPIPE && ik_wait_now() >= end);
    assert(ik_sync_barrier_leave(memory, &party) == 0);
    assert(ik_sync_barrier_enter(memory, &party, end) == -EPIPE);
}

static void test_the_former_round_must_leave(void) {
    make(IK_SYNC_BARRIER, 2);
    ik_sync_party first, second, third;
    assert(ik_sync_barrier_enter(memory, &first, IK_NOW) == 0);
    assert(ik_sync_barrier_enter(memory, &second, IK_NOW) == 1);
    assert(ik_sync_barrier_enter(memory, &third, IK_NOW) == -ETIMEDOUT);
    assert(ik_sync_barrier_pass(memory) == 0);
    assert(ik_sync_barrier_enter(memory, &third, in(5)) == -ETIMEDOUT);
    assert(ik_sync_barrier_break(memory) == 0); /* who has passed has passed */
    assert(ik_sync_barrier_sleep(memory, &first, &no_spin, IK_NOW) == 0);
    assert(ik_sync_barrier_reset(memory) == 0);
    assert(ik_sync_barrier_sleep(memory, &second, &no_spin, IK_NOW) == 0);
    assert(ik_sync_barrier_leave(memory, &first) == 0);
    assert(ik_sync_barrier_leave(memory, &second) == 0);
    assert(ik_sync_barrier_enter(memory, &third, IK_NOW) == 0);
    assert(third.round == 1 && third.index == 0);
    assert(ik_sync_barrier_leave(memory, &third) == 0);
}

/* The loader's work at the first call of each function is not what is to be stepped through. */
static void bind_now(char **arguments) {
    if (getenv("LD_BIND_NOW"))
        return;
    setenv("LD_BIND_NOW", "1", 1);
    execv("/proc/self/exe", arguments);
}

static bool asked_for(const char *name) {
    const char *value = getenv(name);
    return value && *value;
}

/* With "threads": only those. */
int main(int count, char **arguments) {
    bind_now(arguments);
    memory = mmap(NULL, 5 * IK_SYNC_SEATED_SIZE + sizeof *sleeping, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert(memory != MAP_FAILED);
    sleeping = (int *)((char *)memory + 5 * IK_SYNC_SEATED_SIZE);
    test_threads();
    if (count > 1 && strcmp(arguments[1], "threads") == 0)
        return 0;
    test_attach();
    test_all_seats();
    if (has("robust futexes", robust_futexes()))
        test_seats_of_the_dead_are_free();
    test_first_come_first_notified();
    test_time_out_in_a_barrier();
    test_the_former_round_must_leave();
    long stride = asked_for("IPCKIT_PROOF") ? 1 : asked_for("IPCKIT_SLICES") ? SLICE : 0;
    if (stride == 0)
        return 0;
    if (!can_trace())
        return 77;
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        step_through(&scenarios[i], stride);
    return 0;
}

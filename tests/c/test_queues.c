/* SPDX-License-Identifier: MIT
 *
 * The table of who takes part. Each change of it is killed before each of its instructions, by
 * ptrace; who lives must be able to go on, and find a table that is whole. A slice of the
 * instructions; all of them with IPCKIT_PROOF=1.
 */
#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "queues.h"

enum { START = 5, NAMESPACE = 7 };
static ik_queue_table *table;

static int64_t soon(void) {
    return ik_wait_now() + 120000000000; /* however busy the machine is */
}

static void make(void) {
    memset(table, 0, IK_QUEUE_MEMORY);
    assert(ik_queue_create(table) == 0);
    assert(ik_queue_attach(table, IK_QUEUE_MEMORY) == 0);
}

static int join(int64_t pid, uint32_t roles) {
    return ik_queue_join(table, pid, START, NAMESPACE, roles, soon());
}

static ik_queue_place place_at(int index) {
    ik_queue_place place;
    assert(ik_queue_read(table, index, &place) == index);
    return place;
}

static int bury(int index) {
    ik_queue_place seen = place_at(index);
    return ik_queue_bury(table, index, &seen, soon());
}

/* --- what each does -------------------------------------------------------------------------- */

static void roles_are_counted(void) {
    make();
    assert(!ik_queue_had_producer(table));
    assert(join(10, 0) == 0 && join(11, IK_QUEUE_CONSUMER) == 1);
    assert(!ik_queue_had_producer(table));
    assert(ik_queue_play(table, 1, IK_QUEUE_PRODUCER, soon()) == 0);
    assert(ik_queue_had_producer(table));
    assert(ik_queue_count(table, IK_QUEUE_PRODUCER) == 1);
    assert(ik_queue_count(table, IK_QUEUE_CONSUMER) == 1);
    assert(place_at(1).pid == 11 && place_at(1).roles == 3);
    assert(ik_queue_leave(table, 1, soon()) == 0);
    assert(ik_queue_count(table, IK_QUEUE_PRODUCER) == 0 && ik_queue_had_producer(table));
    assert(join(12, 0) == 1); /* where that one was */
}

static void the_dead_are_shown_and_counted_once(void) {
    make();
    assert(join(10, IK_QUEUE_PRODUCER) == 0);
    ik_queue_place seen = place_at(0);
    assert(ik_queue_bury(table, 0, &seen, soon()) == 1);
    assert(ik_queue_bury(table, 0, &seen, soon()) == 0);
    assert(ik_queue_deaths(table) == 1 && place_at(0).state == IK_QUEUE_DEAD);
    assert(ik_queue_count(table, IK_QUEUE_PRODUCER) == 0);
    seen.pid = 99; /* somebody else is there by now */
    assert(join(11, 0) == 1 && ik_queue_bury(table, 1, &seen, soon()) == 0);
}

static void places_are_used_again(void) {
    make();
    for (int i = 0; i < IK_QUEUE_PLACES; i++)
        assert(join(10 + i, 0) == i);
    assert(join(9, 0) == -EUSERS);
    assert(bury(17) == 1);
    assert(join(9, 0) == 17 && place_at(17).pid == 9);
    assert(ik_queue_leave(table, 3, soon()) == 0);
    assert(join(8, 0) == 3);
}

static void nobody_there_is_as_new(void) {
    make();
    assert(join(10, IK_QUEUE_PRODUCER) == 0);
    assert(ik_queue_renew(table, soon()) == 0 && ik_queue_had_producer(table));
    assert(bury(0) == 1);
    assert(ik_queue_renew(table, soon()) == 1 && !ik_queue_had_producer(table));
}

static void what_is_no_table_is_refused(void) {
    make();
    assert(ik_queue_attach(table, IK_QUEUE_MEMORY - 1) == -EBADMSG);
    for (int i = 0; i < 12; i++) {
        if (i == 8) /* the low byte of the reach may be smaller */
            continue;
        ((unsigned char *)table)[i] ^= 0xff;
        assert(ik_queue_attach(table, IK_QUEUE_MEMORY) == -EBADMSG);
        ((unsigned char *)table)[i] ^= 0xff;
    }
}

static void tasks_are_done_once(void) {
    make();
    assert(ik_queue_task_done(table, 0) == -ERANGE);
    assert(ik_queue_task_done(table, 2) == 0 && ik_queue_tasks(table) == 1);
    assert(ik_queue_wait_tasks(table, 0, soon()) == 0);
    assert(ik_queue_wait_tasks(table, 1, ik_wait_now() + 1000000) == -ETIMEDOUT);
    ik_queue_tasks_dropped(table, 1);
    assert(ik_queue_tasks(table) == 2 && ik_queue_task_done(table, 2) == -ERANGE);
}

/* --- killed at every instruction ------------------------------------------------------------- */

enum { SURVIVOR = 0, VICTIM = 1, OTHER = 2 }; /* places */

static void do_join(void) {
    join(101, IK_QUEUE_PRODUCER);
}

static void do_play(void) {
    ik_queue_play(table, VICTIM, IK_QUEUE_PRODUCER, soon());
}

static void do_leave(void) {
    ik_queue_leave(table, VICTIM, soon());
}

static void do_bury(void) {
    bury(OTHER);
}

static void do_renew(void) {
    ik_queue_renew(table, soon());
}

/* A child does it, n instructions of it at most. False if that was all of it. */
static int killed_after(void (*operation)(void), long n) {
    pid_t pid = fork();
    int status;
    assert(pid >= 0);
    if (pid == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        operation();
        raise(SIGSTOP);
        _exit(0);
    }
    assert(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
    int over = 0;
    for (long done = 0; done < n && !over; done++) {
        ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL);
        assert(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
        over = WSTOPSIG(status) == SIGSTOP;
    }
    kill(pid, SIGKILL);
    assert(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    return !over;
}

static void check_what_is_left(void (*operation)(void)) {
    ik_queue_place place;
    int victims = 0, next = join(103, IK_QUEUE_CONSUMER);
    assert(next >= 0);
    for (int i = 0; (i = ik_queue_read(table, i, &place)) >= 0; i++) {
        assert(place.pid >= 100 && place.pid <= 103);
        assert(place.start == START && place.namespace == NAMESPACE && place.roles <= 3);
        victims += place.pid == 101;
        if (place.pid == 101)
            assert(bury(i) == 1);
    }
    assert(operation == do_join || operation == do_leave ? victims <= 1 : victims == 1);
    int others = operation != do_bury || place_at(OTHER).state == IK_QUEUE_ALIVE;
    assert(ik_queue_count(table, IK_QUEUE_PRODUCER) == 1 + others);
    assert(ik_queue_had_producer(table));
    assert(ik_queue_leave(table, next, soon()) == 0);
}

static bool asked_for(const char *name) {
    const char *value = getenv(name);
    return value && *value;
}

/* Every so many instructions one is where the kill comes: all of them with IPCKIT_PROOF=1, a slice
 * with IPCKIT_SLICES=1, or none. */
static long every(void) {
    return asked_for("IPCKIT_PROOF") ? 1 : asked_for("IPCKIT_SLICES") ? 7 : 0;
}

static long kill_at_each(void (*operation)(void)) {
    for (long n = 0;; n += every()) {
        make();
        assert(join(100, IK_QUEUE_PRODUCER) == SURVIVOR && join(101, 0) == VICTIM);
        assert(join(102, IK_QUEUE_PRODUCER) == OTHER);
        if (operation == do_join)
            assert(ik_queue_leave(table, VICTIM, soon()) == 0);
        int killed = killed_after(operation, n);
        check_what_is_left(operation);
        if (!killed)
            return n / every();
    }
}

int main(void) {
    table = mmap(NULL, IK_QUEUE_MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert(table != MAP_FAILED);
    roles_are_counted();
    the_dead_are_shown_and_counted_once();
    places_are_used_again();
    nobody_there_is_as_new();
    what_is_no_table_is_refused();
    tasks_are_done_once();
    if (!every())
        return 0;
    void (*operations[])(void) = {do_join, do_play, do_leave, do_bury, do_renew};
    long points = 0;
    for (int i = 0; i < 5; i++)
        points += kill_at_each(operations[i]);
    printf("table of a queue: killed at %ld instructions\n", points);
}

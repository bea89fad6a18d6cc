/* SPDX-License-Identifier: MIT */
#include "queues.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "killpoint_impl.h"

static const uint64_t MAGIC = 0x0001657565756b69; /* "ikueue", version 1 */

_Static_assert(offsetof(ik_queue_table, lock) == 64, "the lock is aligned to its size");
_Static_assert(sizeof(ik_queue_place) == 64, "a place is a cache line");
_Static_assert(sizeof(ik_queue_table) == IK_QUEUE_MEMORY, "the places begin behind the header");
_Static_assert(IK_QUEUE_MEMORY % IK_RING_ALIGNMENT == 0, "the ring begins behind the table");

static ik_lock *lock_of(ik_queue_table *table) {
    return (ik_lock *)table->lock;
}

static uint32_t load(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void store(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

int ik_queue_create(ik_queue_table *table) {
    int rc = ik_lock_init(lock_of(table));
    if (rc < 0)
        return rc;
    /* Release: who sees the magic sees the lock. */
    __atomic_store_n(&table->magic, MAGIC, __ATOMIC_RELEASE);
    return 0;
}

int ik_queue_attach(const ik_queue_table *table, uint64_t size) {
    if (size < sizeof *table || __atomic_load_n(&table->magic, __ATOMIC_ACQUIRE) != MAGIC)
        return -EBADMSG;
    return load(&table->reach) <= IK_QUEUE_PLACES ? 0 : -EBADMSG;
}

/* --- places ---------------------------------------------------------------------------------- */

static int enter(ik_queue_table *table, int64_t deadline_ns) {
    ik_spin spin = {0};
    int rc = ik_lock_take(lock_of(table), &spin, deadline_ns);
    if (rc == 1) /* whatever was being done is done by its one store, or not at all */
        ik_lock_mended(lock_of(table));
    return rc < 0 ? rc : 0;
}

static void leave(ik_queue_table *table) {
    ik_lock_release(lock_of(table));
}

static uint32_t state_of(const ik_queue_place *place) {
    /* Acquire: what was written before the state is seen. */
    return __atomic_load_n(&place->state, __ATOMIC_ACQUIRE);
}

static void set_state(ik_queue_place *place, enum ik_queue_state state) {
    /* Release: who sees the state sees what was written before it. */
    __atomic_store_n(&place->state, state, __ATOMIC_RELEASE);
}

static int find_place(ik_queue_table *table, enum ik_queue_state state) {
    int reach = (int)load(&table->reach);
    for (int i = 0; i < reach; i++)
        if (state_of(&table->places[i]) == state)
            return i;
    return -EUSERS;
}

/* A free one, a new one, or at last one of the dead. */
static int pick_place(ik_queue_table *table) {
    int index = find_place(table, IK_QUEUE_FREE);
    uint32_t reach = load(&table->reach);
    if (index < 0 && reach < IK_QUEUE_PLACES) {
        store(&table->reach, reach + 1);
        return (int)reach;
    }
    return index < 0 ? find_place(table, IK_QUEUE_DEAD) : index;
}

static void note_producer(ik_queue_table *table, uint32_t roles) {
    /* Release: who sees that there was a producer sees the place of this one. */
    if (roles & IK_QUEUE_PRODUCER)
        __atomic_store_n(&table->had_producer, 1, __ATOMIC_RELEASE);
}

int ik_queue_join(ik_queue_table *table, int64_t pid, int64_t start, int64_t namespace,
                  uint32_t roles, int64_t deadline_ns) {
    int rc = enter(table, deadline_ns);
    if (rc < 0)
        return rc;
    int index = pick_place(table);
    if (index >= 0) {
        ik_queue_place *place = &table->places[index];
        set_state(place, IK_QUEUE_FREE); /* until it is whole */
        place->roles = roles;
        place->pid = pid;
        place->start = start;
        place->namespace = namespace;
        place->doing = (ik_queue_doing){0};
        IK_KILLPOINT("queues.join");
        set_state(place, IK_QUEUE_ALIVE);
        note_producer(table, roles);
    }
    leave(table);
    return index;
}

int ik_queue_play(ik_queue_table *table, int index, uint32_t roles, int64_t deadline_ns) {
    int rc = enter(table, deadline_ns);
    if (rc < 0)
        return rc;
    ik_queue_place *place = &table->places[index];
    __atomic_fetch_or(&place->roles, roles, __ATOMIC_RELAXED);
    note_producer(table, roles);
    leave(table);
    return 0;
}

int ik_queue_leave(ik_queue_table *table, int index, int64_t deadline_ns) {
    int rc = enter(table, deadline_ns);
    if (rc < 0)
        return rc;
    set_state(&table->places[index], IK_QUEUE_FREE);
    leave(table);
    return 0;
}

static bool is_same(const ik_queue_place *place, const ik_queue_place *seen) {
    return state_of(place) == IK_QUEUE_ALIVE && place->pid == seen->pid &&
           place->start == seen->start && place->namespace == seen->namespace;
}

int ik_queue_bury(ik_queue_table *table, int index, const ik_queue_place *seen,
                  int64_t deadline_ns) {
    int rc = enter(table, deadline_ns);
    if (rc < 0)
        return rc;
    ik_queue_place *place = &table->places[index];
    rc = is_same(place, seen);
    if (rc == 1) {
        set_state(place, IK_QUEUE_DEAD);
        store(&table->deaths, load(&table->deaths) + 1);
    }
    leave(table);
    return rc;
}

int ik_queue_renew(ik_queue_table *table, int64_t deadline_ns) {
    int rc = enter(table, deadline_ns);
    if (rc < 0)
        return rc;
    rc = find_place(table, IK_QUEUE_ALIVE) < 0;
    if (rc == 1)
        store(&table->had_producer, 0);
    leave(table);
    return rc;
}

int ik_queue_read(const ik_queue_table *table, int index, ik_queue_place *ret_place) {
    int reach = (int)load(&table->reach);
    for (; index >= 0 && index < reach && index < IK_QUEUE_PLACES; index++) {
        const ik_queue_place *place = &table->places[index];
        uint32_t state = state_of(place);
        if (state == IK_QUEUE_FREE)
            continue;
        *ret_place = *place;
        ret_place->state = state;
        return index;
    }
    return -ENOENT;
}

int ik_queue_count(const ik_queue_table *table, uint32_t role) {
    int count = 0, reach = (int)load(&table->reach);
    for (int i = 0; i < reach && i < IK_QUEUE_PLACES; i++) {
        const ik_queue_place *place = &table->places[i];
        count += state_of(place) == IK_QUEUE_ALIVE && (load(&place->roles) & role);
    }
    return count;
}

static bool is_running(int pid) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0)
        return false;
    struct pollfd end = {.fd = fd, .events = POLLIN}; /* also of a zombie */
    bool running = poll(&end, 1, 0) == 0;
    close(fd);
    return running;
}

int ik_queue_producer_seems_alive(const ik_queue_table *table) {
    ik_queue_place place;
    for (int i = 0; (i = ik_queue_read(table, i, &place)) >= 0; i++)
        if (place.state == IK_QUEUE_ALIVE && (place.roles & IK_QUEUE_PRODUCER) &&
            is_running((int)place.pid))
            return 1;
    return 0;
}

int ik_queue_had_producer(const ik_queue_table *table) {
    /* Acquire: see note_producer(); who asks counts after this. */
    return __atomic_load_n(&table->had_producer, __ATOMIC_ACQUIRE) != 0;
}

uint32_t ik_queue_deaths(const ik_queue_table *table) {
    return load(&table->deaths);
}

ik_queue_doing *ik_queue_doing_of(ik_queue_table *table, int index) {
    return &table->places[index].doing;
}

/* --- tasks ----------------------------------------------------------------------------------- */

int ik_queue_task_done(ik_queue_table *table, uint32_t sent) {
    uint32_t done = load(&table->done);
    do {
        if (done == sent)
            return -ERANGE;
        /* Release: what was done for the task is seen by who sees that it is done. */
    } while (!__atomic_compare_exchange_n(&table->done, &done, done + 1, false, __ATOMIC_RELEASE,
                                          __ATOMIC_RELAXED));
    if (done + 1 == sent) /* who joins waits for all, and looks at the word each slice anyway */
        ik_wake_word(&table->done, INT_MAX);
    return 0;
}

void ik_queue_tasks_dropped(ik_queue_table *table, uint32_t tasks) {
    __atomic_fetch_add(&table->done, tasks, __ATOMIC_RELEASE);
    ik_wake_word(&table->done, INT_MAX);
}

uint32_t ik_queue_tasks(const ik_queue_table *table) {
    return __atomic_load_n(&table->done, __ATOMIC_ACQUIRE); /* see ik_queue_task_done() */
}

int ik_queue_wait_tasks(const ik_queue_table *table, uint32_t done, int64_t deadline_ns) {
    return ik_wait_word(&table->done, done, deadline_ns);
}

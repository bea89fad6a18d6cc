/* SPDX-License-Identifier: MIT */
#include "sync.h"

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* --- making and attaching -------------------------------------------------------------------- */

/* Comes first, and says what is there once it is complete; the last byte is the version. */
typedef struct {
    uint64_t magic;
} head;

static uint64_t magic_of(int kind) {
    return 0x69706b73796e0001 + ((uint64_t)kind << 8);
}

/* A lock of lock.h, of which only the size is known. */
typedef struct {
    _Alignas(IK_LOCK_SIZE) unsigned char bytes[IK_LOCK_SIZE];
} robust;

static ik_lock *lock_of(const robust *place) {
    return (ik_lock *)place->bytes;
}

struct ik_sync_lock {
    head head;
    uint32_t recursive;
    uint32_t depth; /* how often the holder has it; written by him */
    robust lock;
};

struct ik_sync_event {
    head head;
    uint32_t word;
};

struct ik_sync_semaphore {
    head head;
    uint32_t word;
    uint32_t most;
};

/* A place to wait. It is taken by its lock; the state tells what for. */
typedef struct {
    uint64_t ticket; /* who sat down first has the lowest */
    uint32_t state;
    uint32_t unused;
} seat;

enum { FREE, WAITING, NOTIFIED };

typedef struct {
    robust guard; /* all of this, but for the state that its sitter waits for, is read behind it */
    uint64_t tickets;
    uint32_t used; /* seats behind these were never taken */
    _Alignas(64) seat seats[IK_SYNC_SEATS];
    robust taken[IK_SYNC_SEATS];
} seating;

struct ik_sync_condition {
    head head;
    seating seating;
};

struct ik_sync_barrier {
    head head;
    uint32_t word;
    uint32_t parties;
    seating seating;
};

_Static_assert(sizeof(ik_sync_lock) == IK_SYNC_LOCK_SIZE, "");
_Static_assert(sizeof(ik_sync_event) <= IK_SYNC_EVENT_SIZE, "");
_Static_assert(sizeof(ik_sync_semaphore) <= IK_SYNC_SEMAPHORE_SIZE, "");
_Static_assert(sizeof(ik_sync_condition) == IK_SYNC_SEATED_SIZE, "");
_Static_assert(sizeof(ik_sync_barrier) == IK_SYNC_SEATED_SIZE, "");

int64_t ik_sync_size(int kind) {
    switch (kind) {
    case IK_SYNC_LOCK:
    case IK_SYNC_RLOCK:
        return IK_SYNC_LOCK_SIZE;
    case IK_SYNC_EVENT:
        return IK_SYNC_EVENT_SIZE;
    case IK_SYNC_SEMAPHORE:
        return IK_SYNC_SEMAPHORE_SIZE;
    default:
        return IK_SYNC_SEATED_SIZE;
    }
}

static int make_seating(seating *all) {
    int rc = ik_lock_init(lock_of(&all->guard));
    for (int i = 0; rc == 0 && i < IK_SYNC_SEATS; i++)
        rc = ik_lock_init(lock_of(&all->taken[i]));
    return rc;
}

static int make(void *memory, int kind, uint32_t number, uint32_t most) {
    ik_sync_lock *lock = memory;
    ik_sync_semaphore *semaphore = memory;
    ik_sync_condition *condition = memory;
    ik_sync_barrier *barrier = memory;
    switch (kind) {
    case IK_SYNC_LOCK:
    case IK_SYNC_RLOCK:
        lock->recursive = kind == IK_SYNC_RLOCK;
        return ik_lock_init(lock_of(&lock->lock));
    case IK_SYNC_SEMAPHORE:
        semaphore->word = number;
        semaphore->most = most;
        return 0;
    case IK_SYNC_CONDITION:
        return make_seating(&condition->seating);
    case IK_SYNC_BARRIER:
        barrier->parties = number;
        return make_seating(&barrier->seating);
    default:
        return 0;
    }
}

int ik_sync_create(void *memory, int kind, uint32_t number, uint32_t most) {
    head *its = memory;
    memset(memory, 0, (size_t)ik_sync_size(kind));
    int rc = make(memory, kind, number, most);
    if (rc == 0)
        /* Release: who sees the magic sees all that was stored before. */
        __atomic_store_n(&its->magic, magic_of(kind), __ATOMIC_RELEASE);
    return rc;
}

int ik_sync_attach(const void *memory, int kind) {
    const head *its = memory;
    /* Acquire: pairs with the release of ik_sync_create(). */
    if (__atomic_load_n(&its->magic, __ATOMIC_ACQUIRE) != magic_of(kind))
        return -EBADMSG;
    const ik_sync_semaphore *semaphore = memory;
    const ik_sync_barrier *barrier = memory;
    if (kind == IK_SYNC_SEMAPHORE && semaphore->most - 1 >= IK_SYNC_LARGEST)
        return -EBADMSG;
    if (kind == IK_SYNC_BARRIER && barrier->parties - 1 >= IK_SYNC_SEATS)
        return -EBADMSG;
    return 0;
}

/* --- lock ------------------------------------------------------------------------------------ */

static bool is_mine(const ik_sync_lock *lock) {
    return ik_lock_holder(lock_of(&lock->lock)) == ik_wait_thread();
}

int ik_sync_lock_take(ik_sync_lock *lock, ik_spin *spin, int64_t deadline_ns) {
    int rc = ik_lock_take(lock_of(&lock->lock), spin, deadline_ns);
    if (rc == -EDEADLK && lock->recursive) {
        lock->depth++;
        return IK_SYNC_AGAIN;
    }
    if (rc < 0)
        return rc;
    if (rc == IK_SYNC_RECOVERED)
        ik_lock_mended(lock_of(&lock->lock));
    lock->depth = 1;
    return rc;
}

int ik_sync_lock_release(ik_sync_lock *lock) {
    /* Of a thread that does not have it the load may tell anything, and both ways are -EPERM. */
    if (__atomic_load_n(&lock->depth, __ATOMIC_RELAXED) <= 1)
        return ik_lock_release(lock_of(&lock->lock));
    if (!is_mine(lock))
        return -EPERM;
    lock->depth--;
    return 0;
}

uint32_t ik_sync_lock_depth(const ik_sync_lock *lock) {
    return is_mine(lock) ? lock->depth : 0;
}

void ik_sync_lock_set_depth(ik_sync_lock *lock, uint32_t depth) {
    lock->depth = depth;
}

int ik_sync_lock_holder(const ik_sync_lock *lock) {
    return ik_lock_holder(lock_of(&lock->lock));
}

uint32_t ik_sync_lock_recoveries(const ik_sync_lock *lock) {
    return ik_lock_recoveries(lock_of(&lock->lock));
}

/* --- a word to sleep on ---------------------------------------------------------------------- */

/* Look at the word for a moment, then announce it by the bit and sleep while nothing changes.
 * -EINTR if something did. */
static int sleep_on(uint32_t *word, uint32_t seen, uint32_t bit, ik_spin *spin,
                    int64_t deadline_ns) {
    if (deadline_ns == IK_NOW)
        return -ETIMEDOUT;
    if (ik_wait_spin(word, seen, spin))
        return -EINTR;
    /* Relaxed: the bit only asks to be woken. If the word changed before, the swap fails; if it
     * does after, who changes it sees the bit, and the kernel another word than this and does not
     * sleep. */
    if (!(seen & bit) && !__atomic_compare_exchange_n(word, &seen, seen | bit, false,
                                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return -EINTR;
    int rc = ik_wait_word(word, seen | bit, deadline_ns);
    return rc ? rc : -EINTR;
}

/* --- event ----------------------------------------------------------------------------------- */

/* The word: two bits, and above them how often it was set. */
enum { SET = 1, ASLEEP = 2, ONE_SET = 4 };

uint32_t ik_sync_event_sets(const ik_sync_event *event) {
    return __atomic_load_n(&event->word, __ATOMIC_RELAXED) / ONE_SET;
}

int ik_sync_event_is_set(const ik_sync_event *event) {
    /* Acquire: what was stored before the set is seen after this load. */
    return __atomic_load_n(&event->word, __ATOMIC_ACQUIRE) & SET;
}

void ik_sync_event_set(ik_sync_event *event) {
    uint32_t next, old = __atomic_load_n(&event->word, __ATOMIC_RELAXED);
    do {
        /* Counted also when it is set: the swap must be a release for who waits from now on. */
        next = (old / ONE_SET + 1) * ONE_SET | SET;
        /* Release: our stores so far are seen by whoever loads this word with acquire. */
    } while (!__atomic_compare_exchange_n(&event->word, &old, next, true, __ATOMIC_RELEASE,
                                          __ATOMIC_RELAXED));
    /* Killed just here, the sleepers find it set at the end of their slice. */
    if (old & ASLEEP)
        ik_wake_word(&event->word, INT_MAX);
}

void ik_sync_event_clear(ik_sync_event *event) {
    /* Acquire and release: what the setter stored before is seen by us, and our stores so far by
     * the next one that sets it. */
    __atomic_fetch_and(&event->word, ~(uint32_t)SET, __ATOMIC_ACQ_REL);
}

static bool was_set(const ik_sync_event *event, uint32_t sets, uint32_t *ret_seen) {
    /* Acquire: what was stored before the set is seen after this load. */
    *ret_seen = __atomic_load_n(&event->word, __ATOMIC_ACQUIRE);
    return *ret_seen & SET || *ret_seen / ONE_SET != sets;
}

int ik_sync_event_wait(ik_sync_event *event, uint32_t sets, ik_spin *spin, int64_t deadline_ns) {
    uint32_t seen;
    if (was_set(event, sets, &seen))
        return 0;
    int rc = sleep_on(&event->word, seen, ASLEEP, spin, deadline_ns);
    return was_set(event, sets, &seen) ? 0 : rc;
}

/* --- semaphore ------------------------------------------------------------------------------- */

/* The word: the value, and a bit if somebody may be asleep. */
#define SLEEPERS 0x80000000u

/* Take one if there is one; else *ret_seen is what was found. */
static bool take_one(ik_sync_semaphore *semaphore, uint32_t *ret_seen) {
    uint32_t old = __atomic_load_n(&semaphore->word, __ATOMIC_RELAXED);
    while (old & ~SLEEPERS) {
        /* Acquire: what was stored before the release that added it is seen from here on. */
        if (__atomic_compare_exchange_n(&semaphore->word, &old, old - 1, true, __ATOMIC_ACQUIRE,
                                        __ATOMIC_RELAXED))
            return true;
    }
    *ret_seen = old;
    return false;
}

int ik_sync_semaphore_take(ik_sync_semaphore *semaphore, ik_spin *spin, int64_t deadline_ns) {
    uint32_t seen;
    if (take_one(semaphore, &seen))
        return 0;
    int rc = sleep_on(&semaphore->word, seen, SLEEPERS, spin, deadline_ns);
    return take_one(semaphore, &seen) ? 0 : rc;
}

int ik_sync_semaphore_release(ik_sync_semaphore *semaphore) {
    uint32_t old = __atomic_load_n(&semaphore->word, __ATOMIC_RELAXED);
    do {
        if ((old & ~SLEEPERS) >= semaphore->most)
            return -EOVERFLOW;
        /* Release: our stores so far are seen by who takes it. */
    } while (!__atomic_compare_exchange_n(&semaphore->word, &old, old + 1, true, __ATOMIC_RELEASE,
                                          __ATOMIC_RELAXED));
    /* Nobody asleep: the next release need not ask. Who lies down at this very moment and is
     * forgotten finds out at the end of his slice. Relaxed: the value stays as it is. */
    uint32_t now = old + 1;
    if (old & SLEEPERS && ik_wake_word(&semaphore->word, 1) == 0)
        __atomic_compare_exchange_n(&semaphore->word, &now, now & ~SLEEPERS, false,
                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return 0;
}

uint32_t ik_sync_semaphore_value(const ik_sync_semaphore *semaphore) {
    return __atomic_load_n(&semaphore->word, __ATOMIC_RELAXED) & ~SLEEPERS;
}

/* --- seats ----------------------------------------------------------------------------------- */

/* The guard is held for a microsecond, so this wait keeps nobody from his signals. Who dies behind
 * it leaves things as after some store, and there is none after which the rest could not go on. */
static int begin(seating *all) {
    ik_spin spin = {0};
    int rc;
    do {
        rc = ik_lock_take(lock_of(&all->guard), &spin, IK_FOREVER);
    } while (rc == -EINTR);
    if (rc == 1)
        ik_lock_mended(lock_of(&all->guard));
    return rc < 0 ? rc : 0;
}

static void end(seating *all) {
    ik_lock_release(lock_of(&all->guard));
}

/* Never beyond the array, whatever stands there. */
static uint32_t used_in(const seating *all) {
    return all->used < IK_SYNC_SEATS ? all->used : IK_SYNC_SEATS;
}

/* Have the lock of a seat whose sitter is dead, or which is free. */
static bool seize(seating *all, uint32_t i) {
    ik_spin spin = {0};
    int rc = ik_lock_take(lock_of(&all->taken[i]), &spin, IK_NOW);
    if (rc == 1)
        ik_lock_mended(lock_of(&all->taken[i]));
    return rc >= 0;
}

static void vacate(seating *all, uint32_t i) {
    all->seats[i].state = FREE;
    ik_lock_release(lock_of(&all->taken[i]));
}

/* The lock first and the state last: whoever is killed between has not sat down. */
static int sit_down(seating *all) {
    for (uint32_t i = 0; i < IK_SYNC_SEATS; i++) {
        if (all->seats[i].state != FREE || !seize(all, i))
            continue;
        if (all->used <= i)
            all->used = i + 1;
        all->seats[i].ticket = all->tickets++;
        /* Relaxed: the guard orders it for all that look, but for the sitter himself. */
        __atomic_store_n(&all->seats[i].state, WAITING, __ATOMIC_RELAXED);
        return (int)i;
    }
    return -EUSERS;
}

/* --- condition ------------------------------------------------------------------------------- */

static uint32_t first_waiting(const seating *all) {
    uint32_t first = IK_SYNC_SEATS;
    for (uint32_t i = 0; i < used_in(all); i++)
        if (all->seats[i].state == WAITING &&
            (first == IK_SYNC_SEATS || all->seats[i].ticket < all->seats[first].ticket))
            first = i;
    return first;
}

/* The first that lives. */
static bool notify_one(seating *all) {
    uint32_t i;
    while ((i = first_waiting(all)) < IK_SYNC_SEATS) {
        if (seize(all, i)) {
            vacate(all, i);
            continue;
        }
        /* Relaxed: what the notified must see stands behind the lock of the condition. */
        __atomic_store_n(&all->seats[i].state, NOTIFIED, __ATOMIC_RELAXED);
        ik_wake_word(&all->seats[i].state, 1);
        return true;
    }
    return false;
}

/* What the dead were notified of goes to the living. Passed on before the seat is vacated: who is
 * killed between makes it two notifications, never none. */
static void inherit(seating *all) {
    for (uint32_t i = 0; i < used_in(all); i++) {
        uint32_t state = all->seats[i].state;
        if (state == FREE || !seize(all, i))
            continue;
        if (state == NOTIFIED)
            notify_one(all);
        vacate(all, i);
    }
}

int ik_sync_condition_enter(ik_sync_condition *condition) {
    int rc = begin(&condition->seating);
    if (rc < 0)
        return rc;
    inherit(&condition->seating);
    rc = sit_down(&condition->seating);
    end(&condition->seating);
    return rc;
}

int ik_sync_condition_sleep(ik_sync_condition *condition, int seat, ik_spin *spin,
                            int64_t deadline_ns) {
    const uint32_t *state = &condition->seating.seats[seat].state;
    if (deadline_ns != IK_NOW && ik_wait_spin(state, WAITING, spin))
        return 0;
    int rc = ik_wait_word(state, WAITING, deadline_ns);
    /* Relaxed: the lock of the condition, which is taken now, orders the rest. */
    if (__atomic_load_n(state, __ATOMIC_RELAXED) == NOTIFIED)
        return 0;
    if (rc == -EINTR && begin(&condition->seating) == 0) {
        inherit(&condition->seating);
        end(&condition->seating);
    }
    return rc ? rc : -EINTR;
}

int ik_sync_condition_leave(ik_sync_condition *condition, int seat, int pass_on) {
    seating *all = &condition->seating;
    int rc = begin(all);
    if (rc < 0)
        return rc;
    bool notified = all->seats[seat].state == NOTIFIED;
    if (notified && pass_on)
        notify_one(all);
    vacate(all, (uint32_t)seat);
    end(all);
    return notified;
}

int64_t ik_sync_condition_notify(ik_sync_condition *condition, int64_t count) {
    int64_t done = 0, rc = begin(&condition->seating);
    if (rc < 0)
        return rc;
    while (done < count && notify_one(&condition->seating))
        done++;
    end(&condition->seating);
    return done;
}

/* --- barrier --------------------------------------------------------------------------------- */

/* The word: a state, and above it how many rounds have passed. One store of it lets all go. */
enum { FILLING, ACTING, DRAINING, RESETTING, BROKEN, ONE_ROUND = 8 };

static uint32_t state_of(const ik_sync_barrier *barrier) {
    return barrier->word % ONE_ROUND;
}

static bool is_open(const ik_sync_barrier *barrier) {
    return state_of(barrier) == FILLING || state_of(barrier) == ACTING;
}

/* Killed before the wake, the sleepers find out at the end of their slice. */
static void change(ik_sync_barrier *barrier, uint32_t state) {
    uint32_t round = barrier->word / ONE_ROUND + (state == DRAINING);
    /* Release: what all the parties stored before they came, which the guard has shown us, is seen
     * by whoever loads this with acquire and goes. */
    __atomic_store_n(&barrier->word, round * ONE_ROUND + state, __ATOMIC_RELEASE);
    ik_wake_word(&barrier->word, INT_MAX);
}

/* Those who died inside are out, and break the barrier if its round is not over: that first, since
 * without the seat nobody would know. How many are inside. */
static uint32_t settle(ik_sync_barrier *barrier) {
    seating *all = &barrier->seating;
    uint32_t inside = 0;
    for (uint32_t i = 0; i < used_in(all); i++) {
        if (all->seats[i].state == FREE)
            continue;
        if (!seize(all, i)) {
            inside++;
            continue;
        }
        if (is_open(barrier))
            change(barrier, BROKEN);
        vacate(all, i);
    }
    if (inside == 0 && (state_of(barrier) == DRAINING || state_of(barrier) == RESETTING))
        change(barrier, FILLING);
    return inside;
}

static int wait_for_the_former_round(ik_sync_barrier *barrier, uint32_t word, int64_t deadline_ns) {
    int rc = ik_wait_word(&barrier->word, word, deadline_ns);
    return rc ? rc : -EINTR;
}

int ik_sync_barrier_enter(ik_sync_barrier *barrier, ik_sync_party *ret_party, int64_t deadline_ns) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    uint32_t inside = settle(barrier), word = barrier->word;
    int seat = state_of(barrier) == FILLING ? sit_down(&barrier->seating) : -EPIPE;
    bool last = seat >= 0 && inside + 1 == barrier->parties;
    if (last)
        change(barrier, ACTING);
    end(&barrier->seating);
    if (word % ONE_ROUND != FILLING && word % ONE_ROUND != BROKEN)
        return wait_for_the_former_round(barrier, word, deadline_ns);
    if (seat < 0)
        return seat;
    *ret_party = (ik_sync_party){seat, inside, word / ONE_ROUND};
    return last;
}

/* 1 if it passed, -EPIPE if it broke; 0 while neither is so. */
static int outcome(const ik_sync_party *party, uint32_t word) {
    if (word / ONE_ROUND != party->round)
        return 1;
    return word % ONE_ROUND == FILLING || word % ONE_ROUND == ACTING ? 0 : -EPIPE;
}

/* Look who died, and break the barrier if the time is over. */
static int look_around(ik_sync_barrier *barrier, const ik_sync_party *party, bool late) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    settle(barrier);
    if (late && outcome(party, barrier->word) == 0)
        change(barrier, BROKEN);
    rc = outcome(party, barrier->word);
    end(&barrier->seating);
    return rc;
}

int ik_sync_barrier_sleep(ik_sync_barrier *barrier, const ik_sync_party *party, ik_spin *spin,
                          int64_t deadline_ns) {
    /* Acquire, here and below: pairs with the release of change(). */
    uint32_t word = __atomic_load_n(&barrier->word, __ATOMIC_ACQUIRE);
    int rc = 0, come = outcome(party, word);
    if (come == 0 && (deadline_ns == IK_NOW || !ik_wait_spin(&barrier->word, word, spin)))
        rc = ik_wait_word(&barrier->word, word, deadline_ns);
    if (come == 0)
        come = rc ? look_around(barrier, party, rc == -ETIMEDOUT)
                  : outcome(party, __atomic_load_n(&barrier->word, __ATOMIC_ACQUIRE));
    return come > 0 ? 0 : come < 0 ? come : -EINTR;
}

int ik_sync_barrier_pass(ik_sync_barrier *barrier) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    settle(barrier);
    rc = state_of(barrier) == ACTING ? 0 : -EPIPE;
    if (rc == 0)
        change(barrier, DRAINING);
    end(&barrier->seating);
    return rc;
}

int ik_sync_barrier_leave(ik_sync_barrier *barrier, const ik_sync_party *party) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    vacate(&barrier->seating, (uint32_t)party->seat);
    settle(barrier);
    end(&barrier->seating);
    return 0;
}

int ik_sync_barrier_break(ik_sync_barrier *barrier) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    change(barrier, BROKEN);
    end(&barrier->seating);
    return 0;
}

int ik_sync_barrier_reset(ik_sync_barrier *barrier) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    uint32_t inside = settle(barrier);
    if (state_of(barrier) != DRAINING)
        change(barrier, inside ? RESETTING : FILLING);
    end(&barrier->seating);
    return 0;
}

uint32_t ik_sync_barrier_parties(const ik_sync_barrier *barrier) {
    return barrier->parties;
}

int ik_sync_barrier_is_broken(ik_sync_barrier *barrier) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    settle(barrier);
    rc = state_of(barrier) == BROKEN;
    end(&barrier->seating);
    return rc;
}

int ik_sync_barrier_waiting(ik_sync_barrier *barrier) {
    int rc = begin(&barrier->seating);
    if (rc < 0)
        return rc;
    uint32_t inside = settle(barrier);
    rc = is_open(barrier) ? (int)inside : 0;
    end(&barrier->seating);
    return rc;
}

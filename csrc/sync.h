/* sync.h - lock, event, semaphore, condition and barrier in shared memory.
 *
 * Every state is a word that one store or compare-and-swap changes, or stands behind a robust lock
 * whose next holder finds it as good as mended: a process may be killed at any instruction. Who
 * waits in a condition or a barrier sits on a seat, and holds the lock of the seat meanwhile, so it
 * is the kernel that tells who died there.
 *
 * -EINTR of a function that waits: a signal came or a slice is over; look around, call again.
 * -ENOTRECOVERABLE, -EINVAL of any: the memory is spoilt.
 *
 * As with lock.h, among processes that trust each other and count the same thread ids.
 */
#pragma once
#include "lock.h"

enum ik_sync_kind {
    IK_SYNC_LOCK = 1,
    IK_SYNC_RLOCK,
    IK_SYNC_EVENT,
    IK_SYNC_SEMAPHORE,
    IK_SYNC_CONDITION,
    IK_SYNC_BARRIER
};

/* Seats, each of a condition or a barrier has as many; and the highest value of a semaphore. */
enum ik_sync_limits { IK_SYNC_SEATS = 256, IK_SYNC_LARGEST = 2147483647 };

/* Bytes of shared memory, aligned to IK_SYNC_ALIGNMENT. */
enum ik_sync_sizes {
    IK_SYNC_ALIGNMENT = 64,
    IK_SYNC_LOCK_SIZE = 128,
    IK_SYNC_EVENT_SIZE = 64,
    IK_SYNC_SEMAPHORE_SIZE = 64,
    IK_SYNC_SEATED_SIZE = 20672
};

/* How many bytes of memory a thing of the kind takes. */
int64_t ik_sync_size(int kind);

/* Make a thing of the kind in memory that nobody uses. Of a semaphore, number is the value and
 * most what it can never exceed; of a barrier, number is how many parties. 0, or -errno. */
int ik_sync_create(void *memory, int kind, uint32_t number, uint32_t most);

/* 0 if a complete thing of the kind is there, or -EBADMSG. */
int ik_sync_attach(const void *memory, int kind);

/* --- lock ------------------------------------------------------------------------------------ */

typedef struct ik_sync_lock ik_sync_lock;

enum ik_sync_taken { IK_SYNC_TAKEN = 0, IK_SYNC_RECOVERED = 1, IK_SYNC_AGAIN = 2 };

/* Take the lock: how it was taken, IK_SYNC_AGAIN if it is an RLock that this thread has already.
 * Else as ik_lock_take(). It is mended in any case. */
int ik_sync_lock_take(ik_sync_lock *lock, ik_spin *spin, int64_t deadline_ns);

/* 0, or -EPERM: this thread does not have it. */
int ik_sync_lock_release(ik_sync_lock *lock);

/* How often the calling thread has it. */
uint32_t ik_sync_lock_depth(const ik_sync_lock *lock);

/* The calling thread has it so often. */
void ik_sync_lock_set_depth(ik_sync_lock *lock, uint32_t depth);

int ik_sync_lock_holder(const ik_sync_lock *lock);
uint32_t ik_sync_lock_recoveries(const ik_sync_lock *lock);

/* --- event ----------------------------------------------------------------------------------- */

typedef struct ik_sync_event ik_sync_event;

/* What ik_sync_event_wait() wants to know: how often it was set so far. */
uint32_t ik_sync_event_sets(const ik_sync_event *event);

int ik_sync_event_is_set(const ik_sync_event *event);
void ik_sync_event_set(ik_sync_event *event);
void ik_sync_event_clear(ik_sync_event *event);

/* Wait until it is set, or was since the sets were counted. 0, -ETIMEDOUT, -EINTR. */
int ik_sync_event_wait(ik_sync_event *event, uint32_t sets, ik_spin *spin, int64_t deadline_ns);

/* --- semaphore ------------------------------------------------------------------------------- */

typedef struct ik_sync_semaphore ik_sync_semaphore;

/* Take one. 0, -ETIMEDOUT, -EINTR. */
int ik_sync_semaphore_take(ik_sync_semaphore *semaphore, ik_spin *spin, int64_t deadline_ns);

/* Add one. 0, or -EOVERFLOW: it is at its most. */
int ik_sync_semaphore_release(ik_sync_semaphore *semaphore);

uint32_t ik_sync_semaphore_value(const ik_sync_semaphore *semaphore);

/* --- condition: called while the caller holds its lock, but for the sleep -------------------- */

typedef struct ik_sync_condition ik_sync_condition;

/* Take a seat, before the release of the lock. The seat, or -EUSERS: all are taken. */
int ik_sync_condition_enter(ik_sync_condition *condition);

/* Wait until notified. 0, -ETIMEDOUT, -EINTR. */
int ik_sync_condition_sleep(ik_sync_condition *condition, int seat, ik_spin *spin,
                            int64_t deadline_ns);

/* Leave the seat, after the lock was taken again: 1 if it was notified, or 0. With pass_on, the
 * notification goes to the next. */
int ik_sync_condition_leave(ik_sync_condition *condition, int seat, int pass_on);

/* Notify up to count of those that wait, the first first. How many there were. */
int64_t ik_sync_condition_notify(ik_sync_condition *condition, int64_t count);

/* --- barrier --------------------------------------------------------------------------------- */

typedef struct ik_sync_barrier ik_sync_barrier;

/* One that is in the barrier. */
typedef struct ik_sync_party {
    int seat;
    uint32_t index; /* how many were there before */
    uint32_t round;
} ik_sync_party;

/* Go in, waiting until the former round has left: 0; or 1 for the last, who calls
 * ik_sync_barrier_pass(). Else -EPIPE: broken; -ETIMEDOUT, -EINTR, -EUSERS. */
int ik_sync_barrier_enter(ik_sync_barrier *barrier, ik_sync_party *ret_party, int64_t deadline_ns);

/* Wait for the others. 0, or -EPIPE: it broke, by a time-out also; -EINTR. */
int ik_sync_barrier_sleep(ik_sync_barrier *barrier, const ik_sync_party *party, ik_spin *spin,
                          int64_t deadline_ns);

/* All may go. 0, or -EPIPE: it broke meanwhile. */
int ik_sync_barrier_pass(ik_sync_barrier *barrier);

/* Go out, whatever came. */
int ik_sync_barrier_leave(ik_sync_barrier *barrier, const ik_sync_party *party);

int ik_sync_barrier_break(ik_sync_barrier *barrier);
int ik_sync_barrier_reset(ik_sync_barrier *barrier);

uint32_t ik_sync_barrier_parties(const ik_sync_barrier *barrier);

/* 1 or 0. */
int ik_sync_barrier_is_broken(ik_sync_barrier *barrier);

/* How many wait for the last one. */
int ik_sync_barrier_waiting(ik_sync_barrier *barrier);

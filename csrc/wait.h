/* wait.h - deadlines on CLOCK_MONOTONIC; waiting for a descriptor and for a word of shared memory.
 *
 * A deadline is absolute, in nanoseconds; IK_FOREVER never comes, IK_NOW has passed already.
 * No wait for a word is longer than a slice: who was to wake us may have been killed just before.
 * After a slice the result is -EINTR, as after a signal: look around, then wait again.
 */
#pragma once
#include <stdint.h>

enum ik_deadline { IK_FOREVER = -1, IK_NOW = 0 };

/* Nanoseconds: a slice, and the longest and the shortest time of spinning. */
enum ik_wait_limits { IK_SLICE = 50000000, IK_SPIN_LONGEST = 20000, IK_SPIN_SHORTEST = 1500 };

/* How long one waiter spins next time; zero to begin with. Owned by that waiter. */
typedef struct ik_spin {
    uint32_t ns;
    uint32_t waits;
} ik_spin;

/* Nanoseconds on CLOCK_MONOTONIC. */
int64_t ik_wait_now(void);

/* Wait until poll(2) reports one of events (POLLIN, POLLOUT, ...), an error or a hang-up on fd.
 * The events that poll reported (> 0), or -ETIMEDOUT, -EINTR, -EBADF. */
int ik_wait_fd(int fd, int events, int64_t deadline_ns);

/* Tell the processor that this is a loop that looks for a change. */
void ik_wait_relax(void);

/* Look at *word for a moment: 1 if it changed from seen, or 0. How long a moment is depends on
 * whether spinning paid before; it is none where this thread has one processor only. */
int ik_wait_spin(const uint32_t *word, uint32_t seen, ik_spin *spin);

/* The same, without the clock and for about a microsecond, where spinning paid last time. */
int ik_wait_glance(const uint32_t *word, uint32_t seen, const ik_spin *spin);

/* Sleep while *word is seen. 0 if it may have changed, -EINTR, or -ETIMEDOUT. See futex(2). */
int ik_wait_word(const uint32_t *word, uint32_t seen, int64_t deadline_ns);

/* The same, with a slice of another length. */
int ik_wait_word_for(const uint32_t *word, uint32_t seen, int64_t deadline_ns, int64_t slice_ns);

/* Wake up to count sleepers on *word. How many were woken. */
int ik_wake_word(const uint32_t *word, int count);

/* The id of the calling thread, as gettid(2), without the system call. */
int ik_wait_thread(void);

/* 1 if the id is that of a living thread of this process, or 0. */
int ik_wait_is_our_thread(int id);

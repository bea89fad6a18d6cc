/* SPDX-License-Identifier: MIT
 *
 * The ring as a model for Spin: a robust lock at each end, one index store as the commit, announcing
 * oneself before sleeping, and one process killed at any step. Sequentially consistent, so it says
 * nothing about fences; whole messages only.
 *
 *     make model MODEL='-DSENDERS=2 -DMESSAGES=1'
 *
 * Checked: what was acknowledged is received once and in order, unless it was in the hands of the
 * receiver that was killed; the lock never has two holders; at the end nobody sleeps while there is
 * something for him. The end of a slice is taken only where nothing else can happen (timeout), and
 * is an error unless somebody was killed.
 */
#ifndef MESSAGES
#define MESSAGES 2 /* of each sender */
#endif
#define SLOTS 2
#ifndef SENDERS
#define SENDERS 2
#endif
#define RECEIVERS 2
#define TOTAL (SENDERS * MESSAGES)
#define NOBODY 255
#define SEND 0
#define RECV 1

byte ring[SLOTS];      /* what was written: 1 + the number of the message */
byte index_of[2];      /* tail and head: the commits */
bool waiting[2];       /* somebody of the other side sleeps on this index */
byte sleepers[2];      /* in the kernel, on that index */
byte to_wake[2];       /* of those, woken */
byte holder[2] = NOBODY;
bool owner_died[2];
bool acknowledged[TOTAL];
byte received[TOTAL];
bool in_hands[TOTAL]; /* committed, but its receiver has not returned */
bool killed;
byte running;           /* processes that have not ended */
byte done;              /* messages acknowledged, or given up with their sender */

#define over (done == TOTAL && index_of[SEND] == index_of[RECV])

/* The kernel: a dead holder's lock is free and marked. One death is enough. */
#define MAY_DIE(side) \
    atomic { \
        if \
        :: !killed -> \
            killed = true; \
            if \
            :: holder[side] == _pid -> holder[side] = NOBODY; owner_died[side] = true \
            :: else \
            fi; \
            goto dead \
        :: skip \
        fi \
    }

/* At most so many of who sleeps on the index. */
inline wake(which, count) {
    atomic {
        if
        :: count < sleepers[which] - to_wake[which] -> to_wake[which] = to_wake[which] + count
        :: else -> to_wake[which] = sleepers[which]
        fi
    }
}

inline enter(side) {
    atomic { holder[side] == NOBODY -> holder[side] = _pid }
    if
    :: owner_died[side] -> /* mend: wake whom the dead may have owed it */
        MAY_DIE(side);
        waiting[side] = false;
        wake(side, 2);
        MAY_DIE(side);
        owner_died[side] = false
    :: else
    fi
}

inline leave(side) {
    assert(holder[side] == _pid);
    holder[side] = NOBODY
}

/* Of many sleepers one was woken: it wakes the next if it left something. */
inline pass_on(side) {
    if
    :: waiting[1 - side] && (side == RECV -> index_of[SEND] != index_of[RECV]
                                          : index_of[SEND] - index_of[RECV] < SLOTS) ->
        waiting[1 - side] = false;
        MAY_DIE(side);
        wake(1 - side, 1)
    :: else
    fi
}

/* Announce, look again, sleep: if the announcement still stands, which the kernel compares. */
inline wait_for_other(side) {
    waiting[1 - side] = true;
    MAY_DIE(side);
    if
    :: index_of[1 - side] == seen ->
        atomic {
            if
            :: waiting[1 - side] -> sleepers[1 - side]++; asleep = true
            :: else -> asleep = false
            fi
        };
        if
        :: asleep ->
            if
            :: atomic { to_wake[1 - side] > 0 -> to_wake[1 - side]--; sleepers[1 - side]-- }
            :: atomic { timeout -> assert(killed || over); sleepers[1 - side]-- } /* the slice */
            fi
        :: else
        fi;
        waiting[1 - side] = true /* the others may still be asleep */
    :: else
    fi
}

inline commit(side) {
    index_of[side]++;
}

inline wake_other(side) {
    if
    :: waiting[side] ->
        waiting[side] = false;
        MAY_DIE(side);
        wake(side, 1)
    :: else
    fi
}

proctype sender(byte who) {
    byte number = 0, seen;
    bool asleep;
    do
    :: number == MESSAGES -> break
    :: else ->
again:
        enter(SEND);
        MAY_DIE(SEND);
        seen = index_of[RECV];
        if
        :: index_of[SEND] - seen == SLOTS ->
            leave(SEND);
            pass_on(SEND);
            wait_for_other(SEND);
            goto again
        :: else
        fi;
        ring[index_of[SEND] % SLOTS] = 1 + who * MESSAGES + number; /* scratch until the commit */
        MAY_DIE(SEND);
        commit(SEND);
        MAY_DIE(SEND);
        wake_other(SEND);
        MAY_DIE(SEND);
        leave(SEND);
        MAY_DIE(SEND);
        pass_on(SEND);
        atomic { acknowledged[who * MESSAGES + number] = true; done++; number++ }
    od;
    goto ended;
dead:
    atomic { done = done + MESSAGES - number } /* it may have sent the one it was at */
ended:
    running--
}

proctype receiver() {
    byte seen, found;
    bool asleep;
    do
    :: over -> break
    :: else ->
        enter(RECV);
        MAY_DIE(RECV);
        seen = index_of[SEND];
        if
        :: index_of[RECV] == seen ->
            leave(RECV);
            pass_on(RECV);
            wait_for_other(RECV)
        :: else ->
            found = ring[index_of[RECV] % SLOTS] - 1;
            MAY_DIE(RECV);
            in_hands[found] = true;
            commit(RECV);
            MAY_DIE(RECV);
            wake_other(RECV);
            d_step {
                in_hands[found] = false;
                received[found]++;
                assert(received[found] == 1);
                if
                :: found % MESSAGES == 0
                :: else -> assert(received[found - 1] == 1 || in_hands[found - 1])
                fi
            };
            leave(RECV);
            pass_on(RECV)
        fi
    od;
    goto ended;
dead:
    skip;
ended:
    running--
}

init {
    byte i;
    atomic {
        running = SENDERS + RECEIVERS;
        i = 0;
        do
        :: i < SENDERS -> run sender(i); i++
        :: else -> break
        od;
        run receiver();
        run receiver()
    }
    running == 0;
    i = 0;
    do
    :: i < TOTAL ->
        assert(!acknowledged[i] || received[i] == 1 || in_hands[i]);
        i++
    :: else -> break
    od
}

/* SPDX-License-Identifier: MIT
 *
 * Kill senders and receivers of one ring, again and again, while they work at full speed.
 *
 *     killloop [-k kills] [-s seed]
 *
 * Four of each, on a small ring that fills and wraps, with messages of 0 bytes to beyond the ring.
 * Half of the victims are killed at a random moment, half kill themselves at a kill point of the
 * library (built with IK_KILLPOINTS). Each process keeps its own history in memory that outlives
 * it: a sender what it has begun and what was acknowledged or refused, a receiver what it has in
 * its hands and what it received. At the end every acknowledged message must have been received
 * once, or have been in the hands of a receiver that was killed; nothing twice, nothing torn, out
 * of order, refused but received, or never sent.
 */
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"

enum { CAPACITY = 4096, SENDERS = 4, WORKERS = 8, EACH = 4000, LONGEST = 3 * CAPACITY };
enum state { UNBORN = 0, BEGUN, ACKNOWLEDGED, REFUSED };
enum hands { EMPTY = 0, NAUGHT, FULL }; /* FULL: of what the buffer begins with */
enum { IN_HANDS = 128 }; /* of a receiver that was killed; beside how often received */
static const int64_t MILLISECOND = 1000000;

/* Of each message; one of 0 bytes can't have it, and is only counted. */
typedef struct heading {
    uint32_t life, number, len, check;
} heading;

/* What one worker leaves behind. */
typedef struct worker {
    int hands;
    uint32_t naughts[4]; /* messages of 0 bytes, by state; a receiver's count as acknowledged */
    unsigned char buffer[LONGEST + 8];
} worker;

static const char *const places[] = {
    "ring.entered", "ring.staged", "ring.commit", "ring.committed", "ring.waking",   "ring.left",
    "ring.asleep",  "ring.stream", "ring.piece",  "ring.finish",    "ring.awaiting", "ring.took",
    "ring.taking",  "ring.taken",  "ring.mended", "ring.rewound",
};
/* The last two are where somebody comes after a death: in the middle, of who took a message. */
enum { ENTERED = 0, TAKEN = 13, MENDED = 14, REWOUND = 15 };
enum { PLACES = sizeof places / sizeof *places, NOWHERE = -1 };

static struct world {
    _Alignas(128) unsigned char memory[IK_RING_HEADER + CAPACITY];
    int armed;  /* place where whoever comes kills itself */
    int skip;   /* how often it is passed before */
    int then;   /* armed by the victim, to be hit by who comes after it */
    int to_die; /* so many are still to do so */
    int64_t killed_at, delivered_at;
    uint64_t delivered;
    uint32_t torn, invented, reordered, odd;
    int stopping;
    long hits[PLACES];
    worker workers[WORKERS];
} *world;

static unsigned char (*sent)[EACH], (*got)[EACH]; /* by life and number */
static uint32_t lives, most_lives;
static pid_t pids[WORKERS];
static ik_ring ring;
static int slot; /* of this process */

/* --- kill points ----------------------------------------------------------------------------- */

static void die_here(int place) {
    int expected = place, then = place < MENDED ? world->then : NOWHERE;
    if (__atomic_fetch_sub(&world->skip, 1, __ATOMIC_RELAXED) > 0 ||
        !__atomic_compare_exchange_n(&world->armed, &expected, then, false, __ATOMIC_SEQ_CST,
                                     __ATOMIC_SEQ_CST))
        return;
    world->hits[place]++;
    world->killed_at = ik_wait_now();
    __atomic_fetch_sub(&world->to_die, 1, __ATOMIC_RELEASE);
    kill(getpid(), SIGKILL);
}

void ik_killpoint(const char *place);
void ik_killpoint(const char *place) {
    int armed = __atomic_load_n(&world->armed, __ATOMIC_RELAXED);
    if (armed != NOWHERE && slot >= 0 && strcmp(places[armed], place) == 0)
        die_here(armed);
}

/* --- messages -------------------------------------------------------------------------------- */

static uint64_t chance = 1;

static uint32_t random_below(uint32_t limit) {
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return (uint32_t)(chance >> 16) % limit;
}

static uint32_t check_of(const unsigned char *bytes, uint64_t len) {
    uint32_t check = 2166136261;
    for (uint64_t i = sizeof(heading); i < len; i++)
        check = (check ^ bytes[i]) * 16777619;
    return check ^ (uint32_t)len;
}

static uint32_t random_size(void) {
    uint32_t kind = random_below(16);
    if (kind == 0)
        return 0;
    uint32_t most = kind < 10 ? 200 : kind < 14 ? CAPACITY / 2 : LONGEST;
    return sizeof(heading) + random_below(most - sizeof(heading));
}

static void make_message(unsigned char *bytes, uint32_t len, uint32_t life, uint32_t number) {
    for (uint32_t i = sizeof(heading); i < len; i++)
        bytes[i] = (unsigned char)(i * 7 + number);
    heading top = {life, number, len, check_of(bytes, len)};
    if (len)
        memcpy(bytes, &top, sizeof top);
}

/* --- senders --------------------------------------------------------------------------------- */

/* In a moment, often enough in the middle of a long message; the most of a second otherwise. */
static int64_t random_deadline(void) {
    return ik_wait_now() + (random_below(8) ? 2000 : 1 + random_below(4)) * MILLISECOND;
}

static int send(const void *data, uint64_t len) {
    ik_ring_progress progress = {0};
    int64_t deadline = random_deadline();
    bool hasty = random_below(16) == 0;
    int rc;
    while ((rc = ik_ring_send(&ring, &progress, data, len, deadline)) == -EINTR && !hasty)
        continue;
    if (rc == -EINTR && ik_ring_give_up(&ring, IK_RING_SEND, &progress))
        return 0;
    return rc;
}

static void send_messages(uint32_t life) {
    worker *own = &world->workers[slot];
    for (uint32_t number = 0; number < EACH && !world->stopping; number++) {
        uint32_t len = random_size();
        make_message(own->buffer, len, life, number);
        sent[life][number] = BEGUN;
        own->naughts[BEGUN] += len == 0;
        int rc = send(own->buffer, len);
        if (rc != 0 && rc != -ETIMEDOUT && rc != -EINTR)
            __atomic_fetch_add(&world->odd, 1, __ATOMIC_RELAXED);
        own->naughts[ACKNOWLEDGED] += len == 0 && rc == 0;
        own->naughts[REFUSED] += len == 0 && rc != 0;
        sent[life][number] = len == 0 ? UNBORN : rc == 0 ? ACKNOWLEDGED : REFUSED;
    }
}

/* --- receivers ------------------------------------------------------------------------------- */

static uint32_t *newest; /* of each life, as this receiver saw it; the number and one */

static void count_delivery(void) {
    __atomic_store_n(&world->delivered_at, ik_wait_now(), __ATOMIC_RELEASE);
    __atomic_fetch_add(&world->delivered, 1, __ATOMIC_RELEASE);
}

static void judge(const unsigned char *bytes, uint64_t len) {
    heading top;
    memcpy(&top, bytes, sizeof top);
    bool known = len >= sizeof top && top.life < most_lives && top.number < EACH;
    if (!known || top.len != len || top.check != check_of(bytes, len)) {
        __atomic_fetch_add(&world->torn, 1, __ATOMIC_RELAXED);
        return;
    }
    if (sent[top.life][top.number] == UNBORN)
        __atomic_fetch_add(&world->invented, 1, __ATOMIC_RELAXED);
    if (top.number < newest[top.life])
        __atomic_fetch_add(&world->reordered, 1, __ATOMIC_RELAXED);
    newest[top.life] = top.number + 1;
    __atomic_fetch_add(&got[top.life][top.number], 1, __ATOMIC_RELAXED);
}

static void received(worker *own, uint64_t len) {
    if (len)
        judge(own->buffer, len);
    else
        own->naughts[ACKNOWLEDGED]++;
    __atomic_store_n(&own->hands, EMPTY, __ATOMIC_RELEASE);
    count_delivery();
}

static int receive_whole(worker *own, const void *data, uint64_t len) {
    memcpy(own->buffer, data, len);
    __atomic_store_n(&own->hands, len ? FULL : NAUGHT, __ATOMIC_RELEASE);
    ik_ring_step(&ring, len);
    ik_ring_commit(&ring, IK_RING_RECV);
    ik_ring_leave(&ring, IK_RING_RECV);
    return 0;
}

static int receive_long(worker *own, uint64_t len) {
    ik_ring_progress progress = {0};
    int64_t deadline = random_deadline();
    bool hasty = random_below(16) == 0;
    int rc;
    memset(own->buffer, 0xff, LONGEST); /* nothing of it is left from another time */
    __atomic_store_n(&own->hands, FULL, __ATOMIC_RELEASE);
    do
        rc = ik_ring_recv_stream(&ring, &progress, own->buffer, len, deadline);
    while (rc == -EINTR && !hasty);
    if (rc == -EINTR)
        ik_ring_give_up(&ring, IK_RING_RECV, &progress);
    return rc;
}

/* 0, or -errno: nothing was received. */
static int receive_one(worker *own) {
    const void *data;
    uint64_t len;
    int rc = ik_ring_wait_message(&ring, random_deadline());
    if (rc < 0)
        return rc;
    rc = ik_ring_look(&ring, &data, &len);
    if (rc < 0 || len > LONGEST) {
        ik_ring_leave(&ring, IK_RING_RECV);
        return rc < 0 ? rc : -EMSGSIZE;
    }
    rc = rc ? receive_whole(own, data, len) : receive_long(own, len);
    if (rc < 0)
        __atomic_store_n(&own->hands, EMPTY, __ATOMIC_RELEASE);
    else
        received(own, len);
    return rc;
}

static void receive_messages(void) {
    int rc;
    newest = calloc(most_lives, sizeof *newest);
    while ((rc = receive_one(&world->workers[slot])) != -ENODATA)
        if (rc < 0 && rc != -ETIMEDOUT && rc != -EINTR && rc != -ECONNABORTED && rc != -EAGAIN)
            __atomic_fetch_add(&world->odd, 1, __ATOMIC_RELAXED);
}

/* --- the killer ------------------------------------------------------------------------------ */

static struct ledger {
    long kills, hung, crashed, naughts_excused;
    uint64_t naughts[4], naughts_received;
    int64_t *recoveries;
} ledger;

static void start(int place) {
    uint32_t life = place < SENDERS ? lives++ : 0;
    uint64_t seed = chance + (uint64_t)random_below(1 << 30) + 1;
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) {
        perror("killloop: fork");
        exit(1);
    }
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        slot = place;
        chance = seed * 0x9e3779b97f4a7c15;
        if (place < SENDERS)
            send_messages(life);
        else
            receive_messages();
        _exit(0);
    }
    pids[place] = pid;
}

/* Of part of a long message it is not said that it was in anybody's hands. */
static bool is_whole(const unsigned char *bytes, const heading *top) {
    return top->life < most_lives && top->number < EACH && top->len <= LONGEST &&
           top->check == check_of(bytes, top->len);
}

/* Add up what it left, also in its hands. */
static void bury(int place) {
    worker *dead = &world->workers[place];
    if (place < SENDERS)
        for (int state = BEGUN; state <= REFUSED; state++)
            ledger.naughts[state] += dead->naughts[state];
    else
        ledger.naughts_received += dead->naughts[ACKNOWLEDGED];
    heading top;
    memcpy(&top, dead->buffer, sizeof top);
    if (dead->hands == FULL && is_whole(dead->buffer, &top)) /* may arrive, or not */
        __atomic_fetch_or(&got[top.life][top.number], IN_HANDS, __ATOMIC_RELAXED);
    ledger.naughts_excused += dead->hands == NAUGHT;
    memset(dead->naughts, 0, sizeof dead->naughts);
    dead->hands = EMPTY;
}

static bool has_ended(int place) {
    int status;
    if (waitpid(pids[place], &status, WNOHANG) != pids[place])
        return false;
    ledger.crashed += WIFSIGNALED(status) ? WTERMSIG(status) != SIGKILL : WEXITSTATUS(status) != 0;
    bury(place);
    return true;
}

/* Who was killed, and senders that have sent their share. */
static void replace_who_ended(void) {
    for (int place = 0; place < WORKERS; place++)
        if (has_ended(place))
            start(place);
}

/* Wait, at most so long of this process's own running: gaps of the whole machine's do not count. */
static bool within(bool (*happened)(void), int64_t limit) {
    int64_t lived = 0, before = ik_wait_now();
    while (!happened()) {
        usleep(20);
        int64_t now = ik_wait_now(), gap = now - before;
        lived += gap < 5 * MILLISECOND ? gap : 5 * MILLISECOND;
        before = now;
        if (lived > limit)
            return false;
    }
    return true;
}

static bool delivered_since(void) {
    replace_who_ended(); /* also who was still dying when it was looked at last */
    return __atomic_load_n(&world->delivered_at, __ATOMIC_ACQUIRE) > world->killed_at;
}

static bool all_died(void) {
    return __atomic_load_n(&world->to_die, __ATOMIC_ACQUIRE) == 0;
}

static void kill_at_random(void) {
    usleep(random_below(400));
    pid_t victim = pids[random_below(WORKERS)];
    world->killed_at = ik_wait_now();
    kill(victim, SIGKILL);
    while (waitid(P_PID, (id_t)victim, &(siginfo_t){0}, WEXITED | WNOWAIT) < 0 && errno == EINTR)
        continue;
}

/* Arm a place, and if nobody comes there for a while, kill somebody. */
static void kill_at_place(int place) {
    int first = place == MENDED ? ENTERED : place == REWOUND ? TAKEN : place;
    world->to_die = first == place ? 1 : 2;
    world->then = first == place ? NOWHERE : place;
    world->skip = first == place ? (int)random_below(8) : 0;
    __atomic_store_n(&world->armed, first, __ATOMIC_SEQ_CST);
    bool died = within(all_died, 50 * MILLISECOND);
    __atomic_store_n(&world->armed, NOWHERE, __ATOMIC_SEQ_CST);
    if (!died)
        kill_at_random();
}

static bool kill_one(long number) {
    if (number % 2)
        kill_at_place((int)(number / 2 % PLACES));
    else
        kill_at_random();
    if (!within(delivered_since, 1000 * MILLISECOND))
        return false;
    ledger.recoveries[number] = world->delivered_at - world->killed_at;
    replace_who_ended();
    return true;
}

static bool all_ended(void) {
    for (int place = 0; place < WORKERS; place++)
        if (pids[place] && has_ended(place))
            pids[place] = 0;
    for (int place = world->stopping == 1 ? 0 : SENDERS; place < WORKERS; place++)
        if (pids[place] && (world->stopping > 1 || place < SENDERS))
            return false;
    return true;
}

static bool end_all(void) {
    world->stopping = 1;
    bool ended = within(all_ended, 10000 * MILLISECOND);
    ik_ring_shut(&ring, IK_RING_SEND);
    world->stopping = 2;
    return within(all_ended, 10000 * MILLISECOND) && ended;
}

/* --- the checker ----------------------------------------------------------------------------- */

typedef struct verdict {
    uint64_t received, lost, doubled, refused, excused;
} verdict;

static void judge_message(verdict *v, unsigned char state, unsigned char times) {
    bool was_in_hands = times & IN_HANDS;
    times &= IN_HANDS - 1;
    v->received += times;
    v->doubled += times > 1;
    v->refused += times && state == REFUSED;
    v->lost += state == ACKNOWLEDGED && times == 0 && !was_in_hands;
    v->excused += state == ACKNOWLEDGED && times == 0 && was_in_hands;
}

static verdict judge_all(void) {
    verdict v = {0};
    for (uint32_t life = 0; life < lives; life++)
        for (int number = 0; number < EACH; number++)
            judge_message(&v, sent[life][number], got[life][number]);
    uint64_t most = ledger.naughts[BEGUN] - ledger.naughts[REFUSED];
    uint64_t least = ledger.naughts[ACKNOWLEDGED];
    if (ledger.naughts_received + (uint64_t)ledger.naughts_excused < least)
        v.lost += least - ledger.naughts_received - (uint64_t)ledger.naughts_excused;
    if (ledger.naughts_received > most)
        v.doubled += ledger.naughts_received - most;
    v.received += ledger.naughts_received;
    return v;
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static bool all_places_hit(void) {
    bool all = true;
    for (int place = 0; place < PLACES; place++) {
        printf("%s%s %ld", place ? ", " : "killloop: kills at ", places[place], world->hits[place]);
        all = all && world->hits[place] > 0;
    }
    puts("");
    return all;
}

static int report(bool ended) {
    verdict v = judge_all();
    ik_ring_stats stats;
    ik_ring_get_stats(&ring, &stats);
    int64_t *r = ledger.recoveries;
    qsort(r, (size_t)ledger.kills, sizeof *r, by_size);
    printf(
        "killloop: %ld kills, %llu received, %llu lost, %u torn, %llu doubled, %ld hung, %u "
        "reordered, %u invented, %llu refused but received, %u odd errors, %ld crashed; %llu were "
        "in the hands of killed receivers\n",
        ledger.kills, (unsigned long long)v.received, (unsigned long long)v.lost, world->torn,
        (unsigned long long)v.doubled, ledger.hung + !ended, world->reordered, world->invented,
        (unsigned long long)v.refused, world->odd, ledger.crashed, (unsigned long long)v.excused);
    printf("killloop: kill to next delivery p50 %.2f ms, p99 %.2f ms, worst %.2f ms; %u and %u "
           "recoveries\n",
           (double)r[ledger.kills / 2] / 1e6, (double)r[ledger.kills * 99 / 100] / 1e6,
           (double)r[ledger.kills - 1] / 1e6, stats.recoveries[0], stats.recoveries[1]);
    bool hit = all_places_hit();
    bool counted = stats.sent == stats.received && stats.used == 0;
    if (!counted)
        printf("killloop: %u sent, %u received, %d bytes left\n", stats.sent, stats.received,
               (int)stats.used);
    return ended && hit && counted && !ledger.hung && !v.lost && !v.doubled && !v.refused &&
                   !world->torn && !ledger.crashed && !world->invented && !world->reordered &&
                   !world->odd
               ? 0
               : 1;
}

static void *map(uint64_t size) {
    void *memory =
        mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return memory;
}

static void prepare(long kills) {
    world = map(sizeof *world);
    most_lives = (uint32_t)(3 * kills + 1000);
    sent = map((uint64_t)most_lives * EACH);
    got = map((uint64_t)most_lives * EACH);
    ledger.recoveries = calloc((size_t)kills, sizeof *ledger.recoveries);
    world->armed = world->then = NOWHERE;
    slot = -1;
    ik_ring_create(world->memory, sizeof world->memory,
                   IK_RING_MANY_SENDERS | IK_RING_MANY_RECEIVERS, 0);
    ik_ring_attach(&ring, world->memory, sizeof world->memory);
}

int main(int argc, char **argv) {
    long kills = 500;
    int option;
    while ((option = getopt(argc, argv, "k:s:")) != -1) {
        if (option == 'k')
            kills = atol(optarg);
        else
            chance = strtoull(optarg, NULL, 0);
    }
    prepare(kills);
    for (int place = 0; place < WORKERS; place++)
        start(place);
    bool going = true;
    while (going && ledger.kills < kills && lives + WORKERS < most_lives) {
        going = kill_one(ledger.kills);
        ledger.kills++;
    }
    ledger.hung = !going;
    return report(end_all());
}

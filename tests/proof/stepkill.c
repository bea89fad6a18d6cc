/* SPDX-License-Identifier: MIT
 *
 * Kill a process after n instructions of an operation, for every n, and see what the others find.
 *
 *     stepkill [-e every] [-p part -n parts] [operation]
 *
 * The victim runs between two traps, one instruction at a time (ptrace), and is killed by SIGKILL.
 * Its peer sleeps at the other end, as a process of its own, and a second process of the victim's
 * kind goes on: this one. After each kill: whoever sleeps is woken; what was committed arrives,
 * whole, once and in order; so does what is acknowledged afterwards; no call takes over a second;
 * the counts agree with what is in the ring.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lock.h"
#include "ring.h"

enum { LOCKED = IK_RING_MANY_SENDERS | IK_RING_MANY_RECEIVERS, CAPACITY = 1024, MOST = 16 };
enum { TAIL = 128, HEAD = 256 }; /* where the header has the indices */
/* Whole, with two of which the ring is full; in pieces that fit; in pieces that don't. */
enum { SHORT = 72, HALF = 496, LONG = 700, HUGE = 2500 };
enum { MINE = 42, VICTIMS = 7, SLEEPERS = 9 }; /* who sent it; what is there before is 1, 2, ... */
static const int64_t SECOND = 1000000000;

/* What the processes of one kill share. */
static struct world {
    _Alignas(128) unsigned char memory[IK_RING_HEADER + CAPACITY];
    _Alignas(64) unsigned char lock[IK_LOCK_SIZE];
    int guarded[2]; /* by the lock: equal when it is free */
    int received;   /* by the sleeper */
    int who[MOST];  /* sent them; -1: torn */
    int64_t when[MOST];
    int ended; /* how the sleeper's last call did */
    int64_t ended_at;
} *world;

static struct totals {
    long points, retried;
    int64_t worst;
} totals;

static ik_ring ring; /* of this process; each has its own, by fork */
static int64_t killed_at;
static const char *complaint; /* about the point at hand */

/* --- messages -------------------------------------------------------------------------------- */

static void fill(unsigned char *bytes, uint64_t len, int who) {
    for (uint64_t i = 0; i < len; i++)
        bytes[i] = (unsigned char)(who + (int)(i * 31));
}

static int sender_of(const unsigned char *bytes, int64_t len) {
    static unsigned char expected[HUGE];
    fill(expected, (uint64_t)len, bytes[0]);
    return memcmp(bytes, expected, (size_t)len) ? -1 : bytes[0];
}

static int send(uint64_t len, int who, int64_t deadline) {
    unsigned char bytes[HUGE];
    ik_ring_progress progress = {0};
    int rc;
    fill(bytes, len, who);
    do
        rc = ik_ring_send(&ring, &progress, bytes, len, deadline);
    while (rc == -EINTR);
    return rc;
}

/* The sender of the next message; -errno. */
static int receive(int64_t deadline) {
    unsigned char bytes[HUGE];
    int64_t len = ik_ring_recv(&ring, bytes, sizeof bytes, deadline);
    return len < 0 ? (int)len : sender_of(bytes, len);
}

static int64_t in_a_second(void) {
    return ik_wait_now() + SECOND;
}

static uint64_t index_at(int offset) {
    return __atomic_load_n((uint64_t *)(world->memory + offset), __ATOMIC_ACQUIRE);
}

/* --- what the survivors must find ------------------------------------------------------------ */

static bool expect(bool fact, const char *what) {
    if (!fact && !complaint)
        complaint = what;
    return fact;
}

/* A second of this process's own running: a gap of the whole machine's is not held against it. */
static bool within_a_second(bool (*happened)(void)) {
    int64_t lived = 0, before = ik_wait_now();
    while (!happened()) {
        usleep(50);
        int64_t now = ik_wait_now(), gap = now - before;
        lived += gap < 2000000 ? gap : 2000000;
        before = now;
        if (lived > SECOND)
            return false;
    }
    return true;
}

static void count_delivery(int64_t at) {
    if (at - killed_at > totals.worst)
        totals.worst = at - killed_at;
}

static bool is_all_received(void) {
    ik_ring_stats stats;
    ik_ring_get_stats(&ring, &stats);
    return stats.used == 0 && stats.sent == stats.received;
}

static bool sleeper_has_last(void) {
    int count = __atomic_load_n(&world->received, __ATOMIC_ACQUIRE);
    return count && world->who[count - 1] == MINE;
}

static bool sleeper_ended(void) {
    return __atomic_load_n(&world->ended_at, __ATOMIC_ACQUIRE) != 0;
}

static bool sleeper_received_something(void) {
    return __atomic_load_n(&world->received, __ATOMIC_ACQUIRE) != 0;
}

/* --- the sleepers ---------------------------------------------------------------------------- */

static void end_with(int rc) {
    world->ended = rc;
    __atomic_store_n(&world->ended_at, ik_wait_now(), __ATOMIC_RELEASE);
}

static void receive_all(void) {
    int who;
    while ((who = receive(ik_wait_now() + 20 * SECOND)) >= -1 && who != -EPERM) {
        world->who[world->received] = who;
        world->when[world->received] = ik_wait_now();
        __atomic_store_n(&world->received, world->received + 1, __ATOMIC_RELEASE);
    }
    end_with(who);
}

static void send_one(void) {
    end_with(send(SHORT, SLEEPERS, ik_wait_now() + 20 * SECOND));
}

static void send_huge(void) {
    end_with(send(HUGE, SLEEPERS, ik_wait_now() + 20 * SECOND));
}

static int take(void) {
    ik_spin spin = {0};
    int rc, died = 0;
    while ((rc = ik_lock_take((ik_lock *)world->lock, &spin, ik_wait_now() + 20 * SECOND)) ==
           -EINTR)
        continue;
    if (rc == 1) {
        world->guarded[1] = world->guarded[0];
        ik_lock_mended((ik_lock *)world->lock);
        died = 1;
    }
    return rc < 0 ? rc : died;
}

static void take_and_release(void) {
    int rc = take();
    if (rc >= 0 && world->guarded[0]++ == world->guarded[1]++)
        ik_lock_release((ik_lock *)world->lock);
    end_with(rc);
}

/* --- the operations -------------------------------------------------------------------------- */

static unsigned char message[HUGE], buffer[HUGE]; /* the victim's, filled before it starts */

static void op_send(uint64_t len) {
    ik_ring_progress progress = {0};
    while (ik_ring_send(&ring, &progress, message, len, IK_FOREVER) == -EINTR)
        continue;
}

static void op_send_short(void) {
    op_send(SHORT);
}

static void op_send_long(void) {
    op_send(LONG);
}

static void op_send_huge(void) {
    op_send(HUGE);
}

static void op_commit(void) {
    int rc = 0;
    if (ik_ring_wait_room(&ring, SHORT, IK_FOREVER) < 0)
        return;
    for (int i = 0; i < 2; i++) {
        void *room = ik_ring_reserve(&ring, SHORT, &rc);
        memcpy(room, message, SHORT);
        ik_ring_stage(&ring, SHORT);
    }
    ik_ring_commit(&ring, IK_RING_SEND);
    ik_ring_leave(&ring, IK_RING_SEND);
}

static void op_receive(void) {
    ik_ring_recv(&ring, buffer, sizeof buffer, IK_FOREVER);
}

static void op_release(void) {
    const void *data;
    uint64_t len;
    if (ik_ring_wait_message(&ring, IK_FOREVER) < 0)
        return;
    if (ik_ring_look(&ring, &data, &len) == 1)
        ik_ring_step(&ring, len);
    ik_ring_commit(&ring, IK_RING_RECV);
    ik_ring_leave(&ring, IK_RING_RECV);
}

static void op_shut_sending(void) {
    ik_ring_shut(&ring, IK_RING_SEND);
}

static void op_shut_receiving(void) {
    ik_ring_shut(&ring, IK_RING_RECV);
}

static void op_attach(void) {
    ik_ring_attach(&ring, world->memory, sizeof world->memory);
}

static void op_create(void) {
    ik_ring_create(world->memory, sizeof world->memory, LOCKED, 0);
}

/* --- what is there before, and who sleeps ---------------------------------------------------- */

static uint32_t flags; /* of the rings of the operation at hand */

static void new_ring(uint64_t index) {
    memset(world, 0, sizeof *world);
    ik_ring_create(world->memory, sizeof world->memory, flags, 0);
    *(uint64_t *)(world->memory + TAIL) = *(uint64_t *)(world->memory + HEAD) = index;
    if (ik_ring_attach(&ring, world->memory, sizeof world->memory) < 0)
        expect(false, "no ring to begin with");
}

static void an_empty_ring(void) {
    new_ring(0);
}

static void one_that_ends_soon(void) {
    new_ring(CAPACITY - 16); /* so there is a gap before the next message */
}

/* Full, so that a sender sleeps until something is received. */
static void a_full_ring(void) {
    new_ring(0);
    expect(send(HALF, 1, IK_NOW) == 0 && send(HALF, 2, IK_NOW) == 0, "no room to begin with");
}

static void a_full_ring_with_a_gap(void) {
    new_ring(CAPACITY - 16);
    expect(send(HALF, 1, IK_NOW) == 0 && send(HALF - 8, 2, IK_NOW) == 0, "no room to begin with");
}

static void a_long_message(void) {
    new_ring(0);
    expect(send(LONG, 1, IK_NOW) == 0 && send(SHORT, 2, IK_NOW) == 0, "no room to begin with");
}

static void nothing(void) {
    memset(world, 0, sizeof *world);
}

static void a_free_lock(void) {
    memset(world, 0, sizeof *world);
    ik_lock_init((ik_lock *)world->lock);
}

/* The lock has the process id of one that is dead: whoever enters next mends. */
static void die_inside(int side, void (*first)(void)) {
    pid_t pid = fork();
    if (pid == 0) {
        first();
        ik_ring_enter(&ring, side, IK_NOW);
        kill(getpid(), SIGKILL);
    }
    waitpid(pid, NULL, 0);
}

static void begin_long(void) {
    unsigned char bytes[HUGE];
    ik_ring_progress progress = {0};
    fill(bytes, HUGE, VICTIMS);
    ik_ring_send(&ring, &progress, bytes, HUGE, IK_FOREVER); /* until it must wait: -EINTR */
    kill(getpid(), SIGKILL);
}

static void begin_nothing(void) {
}

static void a_sender_died(void) {
    new_ring(0);
    die_inside(IK_RING_SEND, begin_nothing);
}

static void a_sender_died_in_a_long_message(void) {
    new_ring(0);
    die_inside(IK_RING_SEND, begin_long);
}

static void a_receiver_died(void) {
    a_full_ring();
    die_inside(IK_RING_RECV, begin_nothing);
}

static void the_holder_died(void) {
    a_free_lock();
    pid_t pid = fork();
    if (pid == 0) {
        take();
        world->guarded[0]++;
        kill(getpid(), SIGKILL);
    }
    waitpid(pid, NULL, 0);
}

/* --- what there is afterwards ---------------------------------------------------------------- */

static int calls_too_long(int64_t begun) {
    return expect(ik_wait_now() - begun < SECOND, "a call took over a second");
}

/* The sleeper is a receiver, the victim a sender. */
static void sender_was_killed(void) {
    if (index_at(TAIL) != index_at(HEAD) && world->received == 0) /* without anybody's doing */
        expect(within_a_second(sleeper_received_something), "committed, but nobody is woken");
    int64_t begun = ik_wait_now();
    expect(send(SHORT, MINE, in_a_second()) == 0, "the second sender's message is refused");
    calls_too_long(begun);
    expect(within_a_second(sleeper_has_last), "an acknowledged message is lost");
    int found = world->received - 1;
    for (int i = 0; i < found; i++) {
        expect(world->who[i] != -1, "torn");
        expect(world->who[i] == VICTIMS, "not sent by anybody");
    }
    expect(found <= 2, "doubled");
    expect(is_all_received(), "counts do not agree");
    count_delivery(world->when[0]);
}

static void sender_of_one_was_killed(void) {
    sender_was_killed();
    expect(world->received <= 2, "doubled");
}

static void sender_of_two_was_killed(void) {
    sender_was_killed();
    expect(world->received != 2, "half of a batch");
}

/* As above, but what is in the ring may be the beginning of a long message only. */
static void sender_of_long_was_killed(void) {
    int64_t begun = ik_wait_now();
    expect(send(SHORT, MINE, in_a_second()) == 0, "the second sender's message is refused");
    calls_too_long(begun);
    expect(within_a_second(sleeper_has_last), "an acknowledged message is lost");
    expect(world->received <= 2, "doubled");
    expect(world->received == 1 || world->who[0] == VICTIMS, "torn");
    expect(is_all_received(), "counts do not agree");
    count_delivery(world->when[0]);
}

/* The victim has, as the index of its end says. */
static bool has_received(void) {
    ik_ring_stats stats;
    ik_ring_get_stats(&ring, &stats);
    return stats.received == 1;
}

static void the_rest_is_received(int64_t begun) {
    expect(receive(in_a_second()) == 2, "the second message is lost");
    expect(receive(in_a_second()) == SLEEPERS, "the sleeper's message is lost");
    calls_too_long(begun);
    expect(within_a_second(sleeper_ended) && world->ended == 0, "the sleeper was not acknowledged");
    expect(receive(IK_NOW) == -ETIMEDOUT && is_all_received(), "counts do not agree");
}

/* The sleeper is a sender, the victim a receiver of the first of two messages. */
static void receiver_was_killed(void) {
    bool consumed = has_received();
    if (consumed) {
        expect(within_a_second(sleeper_ended), "received, but the sender was not woken");
        count_delivery(world->ended_at);
    }
    int64_t begun = ik_wait_now();
    if (!consumed) {
        expect(receive(in_a_second()) == 1, "what was not received is lost");
        count_delivery(ik_wait_now());
    }
    the_rest_is_received(begun);
}

/* The same, of a long message, all of which is in the ring. */
static void receiver_of_long_was_killed(void) {
    int64_t begun = ik_wait_now();
    if (!has_received())
        expect(receive(in_a_second()) == 1, "what was not received is lost");
    count_delivery(ik_wait_now());
    the_rest_is_received(begun);
}

/* Its sender lives, and stays until somebody has received all of it. */
static void receiver_of_huge_was_killed(void) {
    int64_t begun = ik_wait_now();
    if (!has_received())
        expect(receive(in_a_second()) == SLEEPERS, "what was not received is lost");
    count_delivery(ik_wait_now());
    calls_too_long(begun);
    expect(within_a_second(sleeper_ended) && world->ended == 0, "the sender was not acknowledged");
    expect(send(SHORT, MINE, in_a_second()) == 0, "refused");
    expect(receive(in_a_second()) == MINE, "an acknowledged message is lost, or one doubled");
    expect(is_all_received(), "counts do not agree");
}

static void who_shuts_sending_was_killed(void) {
    ik_ring_stats stats;
    ik_ring_get_stats(&ring, &stats);
    if (!stats.closed[IK_RING_SEND])
        ik_ring_shut(&ring, IK_RING_SEND);
    expect(within_a_second(sleeper_ended) && world->ended == -ENODATA, "the end is not seen");
    count_delivery(world->ended_at);
}

static void who_shuts_receiving_was_killed(void) {
    ik_ring_stats stats;
    ik_ring_get_stats(&ring, &stats);
    if (!stats.closed[IK_RING_RECV])
        ik_ring_shut(&ring, IK_RING_RECV);
    expect(within_a_second(sleeper_ended) && world->ended == -EPIPE, "the end is not seen");
    count_delivery(world->ended_at);
}

static void who_attaches_was_killed(void) {
    int64_t begun = ik_wait_now();
    expect(send(SHORT, MINE, in_a_second()) == 0, "refused");
    expect(within_a_second(sleeper_has_last) && world->received == 1, "not delivered");
    calls_too_long(begun);
    count_delivery(world->when[0]);
}

static void the_maker_was_killed(void) {
    ik_ring found;
    int rc = ik_ring_attach(&found, world->memory, sizeof world->memory);
    expect(rc == 0 || rc == -EAGAIN, "half a ring");
    if (rc < 0) /* nobody has it: made anew */
        an_empty_ring();
    ring = rc < 0 ? ring : found;
    expect(send(SHORT, MINE, in_a_second()) == 0 && receive(IK_NOW) == MINE, "it does not work");
    count_delivery(ik_wait_now());
}

static void the_holder_was_killed(void) {
    expect(within_a_second(sleeper_ended) && world->ended >= 0, "the sleeper did not get the lock");
    count_delivery(world->ended_at);
    int64_t begun = ik_wait_now();
    expect(take() >= 0, "the lock can't be taken");
    expect(world->guarded[0] == world->guarded[1], "what the lock guards is half done");
    expect(ik_lock_release((ik_lock *)world->lock) == 0, "not released");
    calls_too_long(begun);
}

/* --- killing --------------------------------------------------------------------------------- */

typedef struct operation {
    const char *name;
    void (*before)(void);
    void (*sleeper)(void); /* NULL: nobody */
    void (*run)(void);
    void (*after)(void);
    int every; /* without an option: long ones are sampled */
    uint32_t flags;
} operation;

static void stop(int signum) {
#if defined(__x86_64__)
    if (signum == SIGTRAP)
        __asm__ volatile("int3" ::: "memory");
    else
        __asm__ volatile("ud2" ::: "memory");
#else
    raise(signum);
#endif
}

/* The victim, stopped before the first instruction of the operation. */
static pid_t new_victim(void (*run)(void)) {
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        stop(SIGTRAP);
        run();
        stop(SIGILL);
        _exit(0);
    }
    int status;
    waitpid(pid, &status, 0);
    expect(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP, "the victim can't be traced");
    return pid;
}

/* Let it do so many instructions. True if the operation was over before. */
static bool step(pid_t victim, long instructions) {
    int status = 0;
    bool over = false;
    for (long i = 0; i < instructions && !over; i++) {
        ptrace(PTRACE_SINGLESTEP, victim, NULL, NULL);
        waitpid(victim, &status, 0);
        over = !WIFSTOPPED(status) || WSTOPSIG(status) == SIGILL;
        if (WIFSTOPPED(status) && WSTOPSIG(status) == SIGSEGV)
            expect(false, "the victim crashed");
    }
    return over;
}

/* In a futex or in poll, as /proc says: its state is S. */
static bool is_asleep(pid_t pid) {
    char path[64], text[256] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = open(path, O_RDONLY);
    if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
        return false;
    close(fd);
    const char *after_name = strrchr(text, ')');
    return after_name && after_name[2] == 'S';
}

static pid_t new_sleeper(void (*run)(void)) {
    pid_t pid = fork();
    if (pid == 0) {
        cpu_set_t all;
        memset(&all, 0xff, sizeof all);
        sched_setaffinity(0, sizeof all, &all);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        run();
        _exit(0);
    }
    while (!is_asleep(pid) && !sleeper_ended())
        usleep(20);
    return pid;
}

static bool point(const operation *op, long instructions) {
    complaint = NULL;
    flags = op->flags;
    fill(message, sizeof message, VICTIMS);
    op->before();
    bool before = op->sleeper && op->sleeper != take_and_release;
    pid_t sleeper = before ? new_sleeper(op->sleeper) : 0;
    pid_t victim = new_victim(op->run);
    bool over = step(victim, instructions);
    if (op->sleeper == take_and_release) /* it sleeps if the victim has the lock by now */
        sleeper = new_sleeper(op->sleeper);
    killed_at = ik_wait_now();
    kill(victim, SIGKILL);
    waitpid(victim, NULL, 0);
    op->after();
    if (sleeper) {
        kill(sleeper, SIGKILL);
        waitpid(sleeper, NULL, 0);
    }
    return over;
}

/* A complaint counts if it comes twice: the machine may have been elsewhere for a second. */
static bool judge(const operation *op, long n, bool *ret_over) {
    *ret_over = point(op, n);
    if (!complaint)
        return true;
    fprintf(stderr, "stepkill: %s, flags %u, instruction %ld: %s\n", op->name, op->flags, n,
            complaint);
    totals.retried++;
    *ret_over = point(op, n);
    return !complaint;
}

static bool run(const operation *op, int every) {
    long points = 0;
    int64_t worst = totals.worst, begun = ik_wait_now();
    bool over = false;
    totals.worst = 0;
    for (long n = 0; !over; n += every, points++)
        if (!judge(op, n, &over))
            return false;
    printf("%-34s flags %u: %6ld points%s, worst %.1f ms", op->name, op->flags, points,
           every > 1 ? " (sampled)" : "", (double)totals.worst / 1e6);
    printf("  [%.1f s]\n", (double)(ik_wait_now() - begun) / 1e9);
    fflush(stdout);
    totals.points += points;
    totals.worst = totals.worst > worst ? totals.worst : worst;
    return true;
}

static const operation operations[] = {
    {"send", an_empty_ring, receive_all, op_send_short, sender_of_one_was_killed, 1, 0},
    {"send, with a gap", one_that_ends_soon, receive_all, op_send_short, sender_of_one_was_killed,
     1, 0},
    {"reserve, commit", an_empty_ring, receive_all, op_commit, sender_of_two_was_killed, 1, 0},
    {"send, in pieces", an_empty_ring, receive_all, op_send_long, sender_of_long_was_killed, 7, 0},
    {"send, longer than the ring", an_empty_ring, receive_all, op_send_huge,
     sender_of_long_was_killed, 37, 0},
    {"receive", a_full_ring, send_one, op_receive, receiver_was_killed, 1, 0},
    {"receive, behind a gap", a_full_ring_with_a_gap, send_one, op_receive, receiver_was_killed, 1,
     0},
    {"peek, release", a_full_ring, send_one, op_release, receiver_was_killed, 1, 0},
    {"receive, in pieces", a_long_message, send_one, op_receive, receiver_of_long_was_killed, 7, 0},
    {"shut the sending end", an_empty_ring, receive_all, op_shut_sending,
     who_shuts_sending_was_killed, 1, 0},
    {"shut the receiving end", a_full_ring, send_one, op_shut_receiving,
     who_shuts_receiving_was_killed, 1, 0},
    {"attach", an_empty_ring, receive_all, op_attach, who_attaches_was_killed, 1, 0},
    {"create", nothing, NULL, op_create, the_maker_was_killed, 1, LOCKED},
    {"lock, unlock", a_free_lock, take_and_release, take_and_release, the_holder_was_killed, 1,
     LOCKED},
    {"repair a lock", the_holder_died, take_and_release, take_and_release, the_holder_was_killed, 1,
     LOCKED},
    {"repair, send", a_sender_died, receive_all, op_send_short, sender_of_one_was_killed, 1,
     LOCKED},
    {"repair, send after half a message", a_sender_died_in_a_long_message, receive_all,
     op_send_short, sender_of_one_was_killed, 1, LOCKED},
    {"repair, receive", a_receiver_died, send_one, op_receive, receiver_was_killed, 1, LOCKED},
    {"receive, longer than the ring", an_empty_ring, send_huge, op_receive,
     receiver_of_huge_was_killed, 37, 0},
};

/* Also with locks, what has none above. */
static bool run_both(const operation *op, int every) {
    operation locked = *op;
    locked.flags = LOCKED;
    return run(op, every ? every : op->every) &&
           (op->flags == LOCKED || run(&locked, every ? every : op->every));
}

static void stay_on_one_processor(void) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one); /* a step is quicker without a change of processor */
}

int main(int argc, char **argv) {
#if !defined(__x86_64__)
    puts("stepkill: skipped, it knows the traps of x86-64 only");
    return 77;
#endif
    int every = 0, part = 0, parts = 1, option;
    while ((option = getopt(argc, argv, "e:p:n:")) != -1)
        *(option == 'e' ? &every : option == 'p' ? &part : &parts) = atoi(optarg);
    world = mmap(NULL, sizeof *world, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    stay_on_one_processor();
    for (size_t i = (size_t)part; i < sizeof operations / sizeof *operations; i += (size_t)parts) {
        if (optind < argc && !strstr(operations[i].name, argv[optind]))
            continue;
        if (!run_both(&operations[i], every)) {
            printf("stepkill: FAILED: %s: %s\n", operations[i].name, complaint);
            return 1;
        }
    }
    printf("stepkill: %ld points, 0 hung, 0 torn, 0 lost, 0 doubled; worst kill to next delivery "
           "%.1f ms"
           "; %ld repeated\n",
           totals.points, (double)totals.worst / 1e6, totals.retried);
    return 0;
}

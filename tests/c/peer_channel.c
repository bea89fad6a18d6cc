/* SPDX-License-Identifier: MIT
 *
 * peer_channel FD KIND - a channel's peer that means harm: it writes into the memory, whose second
 * ring it should send into, as fast as it can, until it is killed. It knows how a ring lies in
 * there.
 */
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>

enum { INDEX = 16, STREAM = INDEX + 3, HEAD = 32, DATA = 64 }; /* of a ring, in words of 8 bytes */
enum { FIRST = 3, MORE = 4, REWIND = 4, TAKEN = 2, PIECE = 2048 };

typedef volatile uint64_t word;

static uint64_t record(uint64_t kind, uint64_t id, uint64_t len) {
    return len | kind << 40 | id << 48;
}

static void fill(word *ring, size_t size, uint64_t header) {
    for (size_t i = DATA; i < size / 8; i++)
        ring[i] = header;
}

/* Pieces of a message without a beginning: always one more. */
static void send_crumbs(word *out, size_t size) {
    fill(out, size, record(MORE, 1, 0));
    for (;;)
        out[INDEX] = out[HEAD] + 8;
}

/* There is something, and there is not. */
static void toggle(word *out, size_t size) {
    fill(out, size, record(MORE, 1, 0));
    for (;;) {
        out[INDEX] = out[HEAD] + 8;
        out[INDEX] = out[HEAD];
    }
}

/* Beginnings of long messages, one after the other. */
static void begin_again(word *out, size_t size) {
    for (size_t i = DATA; i + PIECE / 8 + 1 < size / 8; i += PIECE / 8 + 1) {
        out[i] = record(FIRST, 1, PIECE);
        out[i + 1] = 1 << 20;
    }
    for (;;)
        for (size_t at = 0; at + DATA * 8 + 2 * PIECE < size; at += PIECE + 8) {
            uint64_t head = out[HEAD];
            out[HEAD] = at;
            out[INDEX] = at + PIECE + 8;
            while (out[HEAD] == at && head != at)
                head = at;
        }
}

/* There is always room, and what is long is always wanted again. */
static void ask_again(word *into, size_t size) {
    volatile uint32_t *stream = (volatile uint32_t *)&into[STREAM];
    (void)size;
    for (;;) {
        into[HEAD] = into[INDEX];
        *stream = (*stream & ~7u) | REWIND;
    }
}

/* It is received in a moment, always. */
static void keep_waiting(word *into, size_t size) {
    volatile uint32_t *stream = (volatile uint32_t *)&into[STREAM];
    (void)size;
    for (;;) {
        *stream = (*stream & ~7u) | TAKEN;
        into[HEAD] = into[INDEX] - 8;
    }
}

static void write_noise(word *all, size_t size) {
    uint64_t state = 88172645463325252u;
    for (;;) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        size_t ring = state >> 5 & 1 ? size / 16 : 0;
        size_t at = state >> 60 < 12 ? ring + INDEX + (state >> 6) % 20 : (state >> 6) % (size / 8);
        all[at] = state >> 63 ? state : (state >> 20) % 16384 & ~(uint64_t)7;
    }
}

int main(int argc, char **argv) {
    struct stat found;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* it never ends by itself */
    if (argc != 3 || fstat(atoi(argv[1]), &found) < 0)
        return 2;
    size_t size = (size_t)found.st_size;
    word *all = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
    word *out = all + size / 16;
    if (all == MAP_FAILED)
        return 2;
    if (strcmp(argv[2], "send_crumbs") == 0)
        send_crumbs(out, size / 2);
    if (strcmp(argv[2], "toggle") == 0)
        toggle(out, size / 2);
    if (strcmp(argv[2], "begin_again") == 0)
        begin_again(out, size / 2);
    if (strcmp(argv[2], "ask_again") == 0)
        ask_again(all, size / 2);
    if (strcmp(argv[2], "keep_waiting") == 0)
        keep_waiting(all, size / 2);
    if (strcmp(argv[2], "write_noise") == 0)
        write_noise(all, size);
    return 2;
}

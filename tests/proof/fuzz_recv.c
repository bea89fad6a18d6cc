/* SPDX-License-Identifier: MIT
 *
 * libFuzzer: receive, look, send and listen on an unlocked ring while the input rewrites words of
 * it between the calls, as a hostile peer does.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ring.h"

enum { CAPACITY = 256, LARGEST = 1 << 16 };

static _Alignas(128) unsigned char memory[IK_RING_HEADER + CAPACITY];
static unsigned char bytes[LARGEST];
static ik_ring ring;

/* What is found is copied where AddressSanitizer knows the bounds. */
static void receive(ik_ring_progress *progress, unsigned char **long_message, uint64_t *long_size) {
    const void *data;
    uint64_t len = *long_size;
    int rc = 0;
    if (!*long_message) {
        if (ik_ring_wait_message(&ring, IK_RING_STEP) != 0)
            return;
        rc = ik_ring_look(&ring, &data, &len);
        if (rc != 0 || len > LARGEST) {
            if (rc == 1) {
                memcpy(bytes, data, len);
                ik_ring_step(&ring, len);
                ik_ring_commit(&ring, IK_RING_RECV);
            }
            ik_ring_leave(&ring, IK_RING_RECV);
            return;
        }
        *long_message = malloc(len);
        *long_size = len;
        *progress = (ik_ring_progress){0};
    }
    if (ik_ring_recv_stream(&ring, progress, *long_message, len, IK_RING_STEP) != -4) { /* EINTR */
        free(*long_message);
        *long_message = NULL;
    }
}

static void send(ik_ring_progress *progress, uint64_t *len) {
    if (ik_ring_send(&ring, progress, bytes, *len, IK_RING_STEP) != -4 || !progress->inside)
        *progress = (ik_ring_progress){0};
}

/* Three bytes of input: what is done, where, and with what. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    ik_ring_progress sending = {0}, receiving = {0};
    unsigned char *long_message = NULL;
    uint64_t long_size = 0, len = 0;
    memset(memory, 0, sizeof memory);
    ik_ring_create(memory, sizeof memory, 0, 0);
    if (ik_ring_attach(&ring, memory, sizeof memory) != 0)
        abort();
    for (size_t i = 0; i + 3 <= size; i += 3) {
        uint64_t where = data[i + 1], what = data[i + 2];
        uint64_t *word = (uint64_t *)memory + where % (sizeof memory / 8);
        switch (data[i] % 8) {
        case 0:
            receive(&receiving, &long_message, &long_size);
            break;
        case 1:
            len = sending.inside ? len : (where * what) % 2000;
            send(&sending, &len);
            break;
        case 2:
            *word = what * 8;
            break;
        case 3:
            *word += what * 8;
            break;
        case 4:
            *word = (where % 6) << 40 | what;
            break;
        case 5:
            *word = what << (where % 64);
            break;
        case 6:
            memcpy(word, data + i, 3);
            break;
        case 7:
            ik_ring_listen(&ring, where % 2);
            break;
        }
    }
    if (long_message)
        ik_ring_give_up(&ring, IK_RING_RECV, &receiving);
    free(long_message);
    ik_ring_give_up(&ring, IK_RING_SEND, &sending);
    return 0;
}

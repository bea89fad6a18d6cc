/* SPDX-License-Identifier: MIT
 *
 * libFuzzer: attach to memory of any contents; what attaches is used, unless it has locks, which
 * are among those who trust each other only.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ring.h"

static _Alignas(128) unsigned char memory[IK_RING_HEADER + 4096];

static void use(ik_ring *ring) {
    unsigned char bytes[4096];
    const void *data;
    uint64_t len;
    ik_ring_stats stats;
    ik_ring_progress progress = {0};
    if (ik_ring_wait_message(ring, IK_RING_STEP) == 0) {
        if (ik_ring_look(ring, &data, &len) == 1)
            memcpy(bytes, data, len);
        ik_ring_leave(ring, IK_RING_RECV);
    }
    memset(bytes, 1, sizeof bytes);
    ik_ring_send(ring, &progress, bytes, ring->largest, IK_RING_STEP);
    ik_ring_get_stats(ring, &stats);
}

/* Behind the magic, so that half of the inputs get past the first check. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t skipped = size % 2 ? 8 : 0, room = sizeof memory - skipped;
    ik_ring ring;
    memset(memory, 0, sizeof memory);
    ik_ring_create(memory, sizeof memory, 0, 0);
    memcpy(memory + skipped, data, size < room ? size : room);
    if (ik_ring_attach(&ring, memory, sizeof memory) == 0 && ring.flags == 0)
        use(&ring);
    return 0;
}

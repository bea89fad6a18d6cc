/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sysv_memory.h"

static uint64_t nattch(int id) {
    ik_sysv_memory_status status;
    assert(ik_sysv_memory_stat(id, &status) == 0);
    return status.nattch;
}

static char *attached(int id, size_t size, int readonly) {
    int protection = PROT_READ | (readonly ? 0 : PROT_WRITE);
    int flags = ik_sysv_memory_reservation(IK_SYSV_MEMORY_USUAL);
    char *where = mmap(NULL, size, protection, flags, -1, 0);
    assert(where != MAP_FAILED);
    assert(ik_sysv_memory_attach(id, where, readonly) == 0);
    return where;
}

static void a_segment_takes_the_place_of_a_mapping(void) {
    int id = ik_sysv_memory_create(IPC_PRIVATE, 5000, 0600, IK_SYSV_MEMORY_USUAL);
    assert(id >= 0);
    char *here = attached(id, 5000, 0), *there = attached(id, 5000, 1);
    strcpy(here + 4990, "shared");
    assert(strcmp(there + 4990, "shared") == 0 && nattch(id) == 2);
    assert(munmap(here, 5000) == 0 && nattch(id) == 1);
    assert(ik_sysv_memory_remove(id) == 0);
    ik_sysv_memory_status status;
    assert(ik_sysv_memory_stat(id, &status) == 0);
    assert(status.mode & IK_SYSV_MEMORY_DEST && status.size == 5000 && status.key == IPC_PRIVATE);
    assert(munmap(there, 5000) == 0);
    assert(ik_sysv_memory_stat(id, &status) == -EINVAL);
}

static void errors_are_negative_errnos(void) {
    char page[1];
    assert(ik_sysv_memory_create(IPC_PRIVATE, 0, 0600, IK_SYSV_MEMORY_USUAL) == -EINVAL);
    assert(ik_sysv_memory_find(0x7ab0c1de) == -ENOENT);
    assert(ik_sysv_memory_attach(-1, page, 1) == -EINVAL);
    assert(ik_sysv_memory_remove(-1) == -EINVAL);
}

int main(void) {
    a_segment_takes_the_place_of_a_mapping();
    errors_are_negative_errnos();
    return 0;
}

/* SPDX-License-Identifier: MIT */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <sys/ipc.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sysv_semaphore.h"

static int value(int id) {
    ik_sysv_semaphore_status status;
    assert(ik_sysv_semaphore_stat(id, &status) == 0);
    return status.value;
}

static void a_value_is_given_once(int first) {
    int id = ik_sysv_semaphore_create(IPC_PRIVATE, 0600);
    assert(id >= 0 && value(id) == 0);
    assert(ik_sysv_semaphore_start(id, first) == 0);
    assert(ik_sysv_semaphore_start(id, 7) == -EAGAIN && value(id) == first);
    ik_sysv_semaphore_status status;
    assert(ik_sysv_semaphore_stat(id, &status) == 0 && status.otime != 0 && status.count == 2);
    assert(status.pid == getpid());
    assert(ik_sysv_semaphore_remove(id) == 0);
    assert(ik_sysv_semaphore_start(id, 1) == -EINVAL);
}

static void the_end_of_a_holder_is_undone(void) {
    int id = ik_sysv_semaphore_create(IPC_PRIVATE, 0600);
    assert(ik_sysv_semaphore_start(id, 1) == 0);
    pid_t child = fork();
    if (child == 0)
        _exit(ik_sysv_semaphore_add(id, -1, 1, 0) != 0 || value(id) != 0);
    int status;
    assert(waitpid(child, &status, 0) == child && status == 0);
    assert(value(id) == 1);
    assert(ik_sysv_semaphore_add(id, -1, 0, -1) == 0);
    assert(ik_sysv_semaphore_add(id, -1, 0, 0) == -EAGAIN);
    assert(ik_sysv_semaphore_add(id, -1, 0, 1000000) == -EAGAIN);
    assert(ik_sysv_semaphore_set_value(id, 32767) == 0);
    assert(ik_sysv_semaphore_add(id, 1, 0, 0) == -ERANGE);
    assert(ik_sysv_semaphore_remove(id) == 0);
}

int main(void) {
    a_value_is_given_once(0);
    a_value_is_given_once(3);
    the_end_of_a_holder_is_undone();
    return 0;
}

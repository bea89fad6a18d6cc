/* lean.h - fork without the interpreter's memory, for children that run C only.
 *
 * fork(2) copies the page tables of all private memory, and every page that parent or child writes
 * afterwards is copied too. A Python process has thousands of them, and a child that never enters
 * Python needs a dozen. So before such a fork all private memory is marked MADV_DONTFORK, except
 * what C code runs on: the stack, thread-local storage, the C library, the loader, this library,
 * and what the caller names. The marks stay for the next such fork, because setting them costs more
 * than the fork; any other fork in this process (pthread_atfork) takes them away first.
 */
#pragma once
#include <stddef.h>

typedef struct ik_lean_range {
    const void *start;
    size_t len;
} ik_lean_range;

/* Fork so that the child has, of private memory, only what C runs on and what lies in keep (shared
 * memory it always has). Where that can't be done (no _Fork, a sanitizer, valgrind), an ordinary
 * fork. As fork(2): 0 in the child, the pid, or -errno. The handlers of pthread_atfork don't run.
 */
int ik_lean_fork(const ik_lean_range *keep, size_t n_keep);

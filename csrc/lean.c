/* SPDX-License-Identifier: MIT */
#include "lean.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>

/* glibc 2.34: fork without the handlers of pthread_atfork, whose code the child does not have. */
extern pid_t _Fork(void) __attribute__((weak));

/* Memory that came since the marks were set is copied until they are set anew: when the process has
 * grown by GROWN_PAGES, and now and then in case it only changed. */
enum { MOST_RANGES = 1024, MOST_KEPT = 8, MOST_FORKS = 512, GROWN_PAGES = 1024 };

typedef struct mapping {
    uintptr_t start, end;
    int private, plain, unnamed; /* plain: no device memory, not marked by somebody else */
    char path[256];
} mapping;

typedef struct range {
    uintptr_t start, end;
} range;

static struct {
    pthread_mutex_t lock;
    int handlers; /* installed */
    int forks;    /* since the marks were set; -1: there are none */
    long pages;   /* the size of the process then */
    pid_t thread; /* whose stack and thread-local storage are not marked */
    ik_lean_range kept[MOST_KEPT];
    size_t n_kept;
    range marked[MOST_RANGES];
    size_t n_marked;
} state = {.lock = PTHREAD_MUTEX_INITIALIZER, .forks = -1};

/* --- the mappings of this process --------------------------------------------------------------*/

static int parse_head(const char *line, mapping *ret) {
    char mode[5];
    int path = 0;
    int n = sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %*s %n", &ret->start, &ret->end,
                   mode, &path);
    if (n != 3)
        return 0;
    ret->private = mode[3] == 'p';
    snprintf(ret->path, sizeof ret->path, "%s", line + path);
    ret->path[strcspn(ret->path, "\n")] = '\0';
    ret->unnamed = ret->path[0] == '\0';
    return 1;
}

/* dc: somebody marked it already, and our unmarking would undo that; io, pf, mm: device memory. */
static int is_plain(const char *flags) {
    return !strstr(flags, " dc") && !strstr(flags, " io") && !strstr(flags, " pf") &&
           !strstr(flags, " mm");
}

/* The next mapping of /proc/self/smaps; 0 at the end. */
static int next_mapping(FILE *smaps, mapping *ret) {
    char line[512];
    int found = 0;
    while (fgets(line, sizeof line, smaps)) {
        if (!found)
            found = parse_head(line, ret);
        else if (strncmp(line, "VmFlags:", 8) == 0) {
            ret->plain = is_plain(line);
            return 1;
        }
    }
    return 0;
}

static int has(const mapping *m, const void *address) {
    return (uintptr_t)address >= m->start && (uintptr_t)address < m->end;
}

static int overlaps(const mapping *m, const ik_lean_range *r) {
    uintptr_t start = (uintptr_t)r->start;
    return start < m->end && start + r->len > m->start;
}

/* The size of this process in pages; 0 if /proc does not tell. */
static long total_pages(void) {
    char text[64] = "";
    int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    return n > 0 ? strtol(text, NULL, 10) : 0;
}

/* --- what a C child runs on --------------------------------------------------------------------*/

typedef struct libraries {
    char path[3][256]; /* the C library, the loader, this library */
} libraries;

static int find_libraries(FILE *smaps, libraries *ret) {
    const void *inside[] = {(const void *)_Fork, (const void *)getauxval(AT_BASE),
                            (const void *)ik_lean_fork};
    memset(ret, 0, sizeof *ret);
    for (mapping m; next_mapping(smaps, &m);)
        for (int i = 0; i < 3; i++)
            if (has(&m, inside[i]))
                memcpy(ret->path[i], m.path, sizeof m.path);
    rewind(smaps);
    return ret->path[0][0] && ret->path[1][0] && ret->path[2][0];
}

static int is_library(const mapping *m, const libraries *ours) {
    for (int i = 0; i < 3; i++)
        if (strcmp(m->path, ours->path[i]) == 0)
            return 1;
    return 0;
}

/* before is the mapping just below, if it is one of ours: zeroed data follows its library unnamed.
 */
static int is_needed(const mapping *m, const libraries *ours, const mapping *before) {
    int here;
    if (is_library(m, ours) || (m->unnamed && before->end == m->start))
        return 1;
    if (m->path[0] == '[' && strcmp(m->path, "[heap]") != 0 && strncmp(m->path, "[anon", 5) != 0)
        return 1; /* [stack], [vdso], [vvar], ... */
    if (has(m, &errno) || has(m, &here))
        return 1;
    for (size_t i = 0; i < state.n_kept; i++)
        if (overlaps(m, &state.kept[i]))
            return 1;
    return 0;
}

/* --- the marks ---------------------------------------------------------------------------------*/

static void unmark(void) {
    for (size_t i = 0; i < state.n_marked; i++) {
        const range *r = &state.marked[i];
        madvise((void *)r->start, r->end - r->start, MADV_DOFORK);
    }
    state.n_marked = 0;
    state.forks = -1;
}

/* Remember a mapping that is to be marked, joined to the one before where they touch. */
static void remember(const mapping *m) {
    range *last = state.n_marked ? &state.marked[state.n_marked - 1] : NULL;
    if (last && last->end == m->start)
        last->end = m->end;
    else if (state.n_marked < MOST_RANGES)
        state.marked[state.n_marked++] = (range){m->start, m->end};
}

static void choose(FILE *smaps, const libraries *ours) {
    mapping m, before = {0};
    while (next_mapping(smaps, &m)) {
        int needed = is_needed(&m, ours, &before);
        if (!needed && m.private && m.plain)
            remember(&m);
        before = m;
        if (!needed || !is_library(&m, ours))
            before.end = 0;
    }
}

static int mark(const ik_lean_range *keep, size_t n_keep) {
    unmark();
    memcpy(state.kept, keep, n_keep * sizeof *keep);
    state.n_kept = n_keep;
    state.thread = gettid();
    state.pages = total_pages();
    FILE *smaps = fopen("/proc/self/smaps", "re");
    if (smaps == NULL)
        return 0;
    libraries ours;
    int known = find_libraries(smaps, &ours);
    if (known)
        choose(smaps, &ours);
    fclose(smaps);
    for (size_t i = 0; i < state.n_marked; i++)
        madvise((void *)state.marked[i].start, state.marked[i].end - state.marked[i].start,
                MADV_DONTFORK);
    state.forks = 0;
    return known;
}

static int still_marked(const ik_lean_range *keep, size_t n_keep) {
    return state.forks >= 0 && state.forks < MOST_FORKS && state.thread == gettid() &&
           state.n_kept == n_keep && memcmp(state.kept, keep, n_keep * sizeof *keep) == 0 &&
           total_pages() < state.pages + GROWN_PAGES;
}

/* --- other forks of this process ---------------------------------------------------------------*/

static void before_other_fork(void) {
    pthread_mutex_lock(&state.lock);
    unmark();
}

static void after_other_fork(void) {
    pthread_mutex_unlock(&state.lock);
}

static int install_handlers(void) {
    if (!state.handlers)
        state.handlers = pthread_atfork(before_other_fork, after_other_fork, after_other_fork) == 0;
    return state.handlers;
}

/* --- the fork ----------------------------------------------------------------------------------*/

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

/* These keep memory of their own in our address space, which only they know of. */
static int watched_by_a_tool(void) {
    const char *preloaded = getenv("LD_PRELOAD");
    return SANITIZED ||
           (preloaded && (strstr(preloaded, "vgpreload") || strstr(preloaded, "san.so")));
}

static int plain_fork(void) {
    int pid = fork();
    return pid < 0 ? -errno : pid;
}

int ik_lean_fork(const ik_lean_range *keep, size_t n_keep) {
    if (_Fork == NULL || n_keep > MOST_KEPT || watched_by_a_tool())
        return plain_fork();
    pthread_mutex_lock(&state.lock);
    if (!install_handlers() || (!still_marked(keep, n_keep) && !mark(keep, n_keep))) {
        unmark();
        pthread_mutex_unlock(&state.lock);
        return plain_fork();
    }
    state.forks++;
    int pid = _Fork();
    if (pid != 0) /* the child has its copy locked and never comes back here */
        pthread_mutex_unlock(&state.lock);
    return pid < 0 ? -errno : pid;
}

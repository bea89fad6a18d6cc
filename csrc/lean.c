/* SPDX-License-Identifier: MIT */
#include "lean.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <link.h>
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
enum { MOST_RANGES = 1024, MOST_ASKED = 8, MOST_KEPT = 16, MOST_FORKS = 512, GROWN_PAGES = 1024 };

typedef struct range {
    uintptr_t start, end;
} range;

typedef struct mapping {
    range at;
    int markable; /* private, no device memory, not marked by somebody else */
    int special;  /* [stack], [vdso], [vvar], ... */
} mapping;

static struct {
    pthread_mutex_t lock;
    int handlers;                    /* installed */
    int forks;                       /* since the marks were set; -1: there are none */
    long pages;                      /* the size of the process then */
    pid_t thread;                    /* whose stack and thread-local storage are not marked */
    ik_lean_range asked[MOST_ASKED]; /* what the caller named then */
    size_t n_asked;
    range kept[MOST_KEPT]; /* all that is not marked */
    size_t n_kept;
    range marked[MOST_RANGES];
    size_t n_marked;
} state = {.lock = PTHREAD_MUTEX_INITIALIZER, .forks = -1};

/* --- the mappings of this process --------------------------------------------------------------*/

static int parse_head(const char *line, mapping *ret) {
    char mode[5], name[5] = "";
    int n = sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %*s %4s", &ret->at.start,
                   &ret->at.end, mode, name);
    if (n < 3)
        return 0;
    ret->markable = mode[3] == 'p';
    ret->special = name[0] == '[' && strcmp(name, "[hea") != 0 && strcmp(name, "[ano") != 0;
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
            ret->markable &= is_plain(line);
            return 1;
        }
    }
    return 0;
}

static int has(const range *r, const void *address) {
    return (uintptr_t)address >= r->start && (uintptr_t)address < r->end;
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

static int keep(uintptr_t start, uintptr_t end) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (state.n_kept == MOST_KEPT)
        return 0;
    state.kept[state.n_kept++] = (range){start & -page, (end + page - 1) & -page};
    return 1;
}

/* From its first segment to its last, zeroed data included, which /proc does not tell apart from
 * whatever the kernel put behind it. */
static range extent(const struct dl_phdr_info *object) {
    range all = {UINTPTR_MAX, 0};
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &object->dlpi_phdr[i];
        uintptr_t start = object->dlpi_addr + segment->p_vaddr;
        if (segment->p_type != PT_LOAD)
            continue;
        if (start < all.start)
            all.start = start;
        if (start + segment->p_memsz > all.end)
            all.end = start + segment->p_memsz;
    }
    return all;
}

/* The C library, the loader and this library: counts those found. */
static int keep_library(struct dl_phdr_info *object, size_t size, void *found) {
    (void)size;
    const void *inside[] = {(const void *)_Fork, (const void *)getauxval(AT_BASE),
                            (const void *)ik_lean_fork};
    range all = extent(object);
    for (int i = 0; i < 3; i++)
        if (has(&all, inside[i]))
            *(int *)found += keep(all.start, all.end);
    return 0;
}

/* All that must not be marked; 0 if some of it can't be found. */
static int find_needed(FILE *smaps) {
    int libraries = 0, complete = 1;
    state.n_kept = 0;
    dl_iterate_phdr(keep_library, &libraries);
    for (size_t i = 0; i < state.n_asked; i++) {
        uintptr_t start = (uintptr_t)state.asked[i].start;
        complete &= keep(start, start + state.asked[i].len);
    }
    /* Thread-local storage; the stack, if it has no name. */
    for (mapping m; next_mapping(smaps, &m);)
        if (has(&m.at, &errno) || (has(&m.at, &m) && !m.special))
            complete &= keep(m.at.start, m.at.end);
    rewind(smaps);
    return complete && libraries == 3;
}

/* --- the marks ---------------------------------------------------------------------------------*/

static void advise(int advice) {
    for (size_t i = 0; i < state.n_marked; i++) {
        const range *r = &state.marked[i];
        madvise((void *)r->start, r->end - r->start, advice);
    }
}

static void unmark(void) {
    advise(MADV_DOFORK);
    state.n_marked = 0;
    state.forks = -1;
}

/* Remember a range that is to be marked, joined to the one before where they touch. */
static void remember(range r) {
    range *last = state.n_marked ? &state.marked[state.n_marked - 1] : NULL;
    if (r.start >= r.end)
        return;
    if (last && last->end == r.start)
        last->end = r.end;
    else if (state.n_marked < MOST_RANGES)
        state.marked[state.n_marked++] = r;
}

/* Remember what of r is not kept; kept is in order. */
static void remember_rest(range r) {
    for (size_t i = 0; i < state.n_kept && state.kept[i].start < r.end; i++) {
        if (state.kept[i].end <= r.start)
            continue;
        remember((range){r.start, state.kept[i].start});
        r.start = state.kept[i].end;
    }
    remember(r);
}

static int by_start(const void *a, const void *b) {
    uintptr_t left = ((const range *)a)->start, right = ((const range *)b)->start;
    return left < right ? -1 : left > right;
}

static void choose(FILE *smaps) {
    qsort(state.kept, state.n_kept, sizeof *state.kept, by_start);
    for (mapping m; next_mapping(smaps, &m);)
        if (m.markable && !m.special)
            remember_rest(m.at);
}

static int mark(const ik_lean_range *memory, size_t n_memory) {
    unmark();
    memcpy(state.asked, memory, n_memory * sizeof *memory);
    state.n_asked = n_memory;
    state.thread = gettid();
    state.pages = total_pages();
    FILE *smaps = fopen("/proc/self/smaps", "re");
    if (smaps == NULL)
        return 0;
    int known = find_needed(smaps);
    if (known)
        choose(smaps);
    fclose(smaps);
    advise(MADV_DONTFORK);
    state.forks = 0;
    return known;
}

static int still_marked(const ik_lean_range *memory, size_t n_memory) {
    return state.forks >= 0 && state.forks < MOST_FORKS && state.thread == gettid() &&
           state.n_asked == n_memory &&
           memcmp(state.asked, memory, n_memory * sizeof *memory) == 0 &&
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

int ik_lean_fork(const ik_lean_range *memory, size_t n_memory) {
    if (_Fork == NULL || n_memory > MOST_ASKED || watched_by_a_tool())
        return plain_fork();
    pthread_mutex_lock(&state.lock);
    if (!install_handlers() || (!still_marked(memory, n_memory) && !mark(memory, n_memory))) {
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

/* SPDX-License-Identifier: MIT
 *
 * peer_posix.c - POSIX IPC without ipckit: what the tests talk to.
 *
 *   posix queue-send NAME PRIORITY TEXT     posix queue-receive NAME
 *   posix queue-create NAME MESSAGES SIZE
 *   posix semaphore-create NAME VALUE       posix semaphore-wait NAME     posix semaphore-post NAME
 *   posix memory-create NAME SIZE TEXT      posix memory-read NAME        posix memory-write NAME
 * TEXT
 */
#include <fcntl.h>
#include <mqueue.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int fail(const char *verb) {
    perror(verb);
    return 1;
}

static int queue(const char *verb, char **args) {
    if (strcmp(verb, "create") == 0) {
        struct mq_attr attr = {.mq_maxmsg = atoi(args[1]), .mq_msgsize = atoi(args[2])};
        return mq_open(args[0], O_CREAT | O_EXCL | O_RDWR, 0600, &attr) < 0 ? fail(verb) : 0;
    }
    mqd_t mqd = mq_open(args[0], O_RDWR);
    if (mqd < 0)
        return fail(verb);
    if (strcmp(verb, "send") == 0)
        return mq_send(mqd, args[2], strlen(args[2]), (unsigned)atoi(args[1])) < 0 ? fail(verb) : 0;
    struct mq_attr attr;
    mq_getattr(mqd, &attr);
    char *data = malloc((size_t)attr.mq_msgsize);
    unsigned priority;
    ssize_t len = mq_receive(mqd, data, (size_t)attr.mq_msgsize, &priority);
    if (len < 0)
        return fail(verb);
    printf("%u %.*s\n", priority, (int)len, data);
    return 0;
}

static int semaphore(const char *verb, char **args) {
    if (strcmp(verb, "create") == 0)
        return sem_open(args[0], O_CREAT | O_EXCL, 0600, atoi(args[1])) == SEM_FAILED ? fail(verb)
                                                                                      : 0;
    sem_t *sem = sem_open(args[0], 0);
    if (sem == SEM_FAILED)
        return fail(verb);
    return (strcmp(verb, "wait") == 0 ? sem_wait(sem) : sem_post(sem)) < 0 ? fail(verb) : 0;
}

static int memory(const char *verb, char **args) {
    int create = strcmp(verb, "create") == 0;
    int fd = shm_open(args[0], create ? O_CREAT | O_EXCL | O_RDWR : O_RDWR, 0600);
    if (fd < 0 || (create && ftruncate(fd, atol(args[1])) < 0))
        return fail(verb);
    struct stat found;
    fstat(fd, &found);
    size_t size = (size_t)found.st_size;
    char *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED)
        return fail(verb);
    if (strcmp(verb, "read") == 0)
        printf("%zu %.*s\n", size, (int)strnlen(data, size), data);
    else
        memcpy(data, args[create + 1], strlen(args[create + 1]));
    return 0;
}

int main(int argc, char **argv) {
    char *kind = argc > 2 ? strtok(argv[1], "-") : "", *verb = strtok(NULL, "-");
    if (strcmp(kind, "queue") == 0)
        return queue(verb, argv + 2);
    if (strcmp(kind, "semaphore") == 0)
        return semaphore(verb, argv + 2);
    return memory(verb, argv + 2);
}

/* SPDX-License-Identifier: MIT
 *
 * Uses a System V semaphore as any C program does.
 *   create PATH PROJECT VALUE   make it, give it VALUE by a semop, print the id
 *   unfinished PATH PROJECT     make it and end before it has a value
 *   value PATH PROJECT          print its value
 *   hold PATH PROJECT           acquire it with undo, print "held", wait for the end of input,
 * release
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/sem.h>

static int failed(const char *what) {
    perror(what);
    return 1;
}

static int add(int id, int delta, int flags) {
    struct sembuf step = {.sem_num = 0, .sem_op = (short)delta, .sem_flg = (short)flags};
    return semop(id, &step, 1);
}

int main(int argc, char **argv) {
    if (argc < 4)
        return 2;
    const char *verb = argv[1];
    key_t key = ftok(argv[2], atoi(argv[3]));
    if (key == -1)
        return failed("ftok");
    int making = strcmp(verb, "create") == 0 || strcmp(verb, "unfinished") == 0;
    int id = semget(key, 1, making ? IPC_CREAT | IPC_EXCL | 0600 : 0);
    if (id < 0)
        return failed("semget");
    if (making)
        return argc == 5 && add(id, atoi(argv[4]), 0) < 0 ? failed("semop")
                                                          : printf("%d\n", id) < 0;
    if (strcmp(verb, "value") == 0)
        return printf("%d\n", semctl(id, 0, GETVAL)) < 0;
    if (add(id, -1, SEM_UNDO) < 0)
        return failed("acquiring");
    puts("held");
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return add(id, 1, SEM_UNDO) < 0 ? failed("releasing") : 0;
}

/* SPDX-License-Identifier: MIT
 *
 * Uses System V shared memory as any C program does.
 *   write PATH PROJECT SIZE TEXT   make or find the segment, put TEXT there, print the id
 *   read PATH PROJECT              print what text is there
 *   huge SIZE                      make a private segment of huge pages, none reserved; print the
 * id ftok PATH PROJECT              print the key
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/shm.h>

static int failed(const char *what) {
    perror(what);
    return 1;
}

int main(int argc, char **argv) {
    const char *verb = argc > 1 ? argv[1] : "";
    if (strcmp(verb, "huge") == 0 && argc == 3) {
        int flags = IPC_CREAT | SHM_HUGETLB | SHM_NORESERVE | 0600;
        int id = shmget(IPC_PRIVATE, strtoul(argv[2], NULL, 10), flags);
        return id < 0 ? failed("shmget") : printf("%d\n", id) < 0;
    }
    if (argc < 4)
        return 2;
    key_t key = ftok(argv[2], atoi(argv[3]));
    if (key == -1)
        return failed("ftok");
    if (strcmp(verb, "ftok") == 0)
        return printf("%d\n", key) < 0;
    int writing = strcmp(verb, "write") == 0 && argc == 6;
    int id = shmget(key, writing ? strtoul(argv[4], NULL, 10) : 0, writing ? IPC_CREAT | 0600 : 0);
    if (id < 0)
        return failed("shmget");
    char *text = shmat(id, NULL, writing ? 0 : SHM_RDONLY);
    if (text == (void *)-1)
        return failed("shmat");
    if (writing) {
        strcpy(text, argv[5]);
        return printf("%d\n", id) < 0;
    }
    return puts(text) < 0;
}

/* SPDX-License-Identifier: MIT */
/* peer_sysv_queue id ID COUNT | ftok PATH PROJECT COUNT: answer COUNT messages of the types up to
 * 99, the lowest first, each with the same bytes and a type higher by 100. */
#include <err.h>
#include <stdlib.h>
#include <string.h>
#include <sys/msg.h>

static struct {
    long type;
    char text[8192];
} message;

int main(int argc, char **argv) {
    if (argc < 4)
        errx(2, "which queue, and how many?");
    int id = strcmp(argv[1], "ftok") == 0 ? msgget(ftok(argv[2], atoi(argv[3])), 0) : atoi(argv[2]);
    for (int count = atoi(argv[argc - 1]); count > 0; count--) {
        ssize_t size = msgrcv(id, &message, sizeof message.text, -99, 0);
        if (size < 0)
            err(1, "msgrcv on %d", id);
        message.type += 100;
        if (msgsnd(id, &message, (size_t)size, 0) < 0)
            err(1, "msgsnd on %d", id);
    }
    return 0;
}

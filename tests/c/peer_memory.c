/* SPDX-License-Identifier: MIT
 *
 * Shared memory by descriptor, without ipckit.
 *   peer_memory take SOCKET         receive memory, write into it, try to truncate it
 *   peer_memory give SOCKET sealed|unsealed  make 8192 bytes, send them, print what came back
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SIZE = 8192 };

union control {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int))];
};

static void must(int ok, const char *what) {
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static int receive(int sock) {
    char byte;
    union control control;
    struct iovec iov = {&byte, 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    message.msg_control = &control;
    message.msg_controllen = sizeof control;
    must(recvmsg(sock, &message, MSG_CMSG_CLOEXEC) == 1, "recvmsg");
    must(CMSG_FIRSTHDR(&message) != NULL, "no descriptor");
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static void transmit(int sock, int fd) {
    char byte = 0;
    union control control = {.header = {.cmsg_len = CMSG_LEN(sizeof fd)}};
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    struct iovec iov = {&byte, 1};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    message.msg_control = &control;
    message.msg_controllen = sizeof control;
    must(sendmsg(sock, &message, 0) == 1, "sendmsg");
}

static char *map(int fd, size_t size) {
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(memory != MAP_FAILED, "mmap");
    return memory;
}

static int errno_of_truncation(int fd, off_t size) {
    return ftruncate(fd, size) == 0 ? 0 : errno;
}

static void take(int sock) {
    int fd = receive(sock);
    struct stat status;
    must(fstat(fd, &status) == 0, "fstat");
    char *memory = map(fd, (size_t)status.st_size);
    printf("size %ld, holds %s\n", (long)status.st_size, memory);
    strcpy(memory, "written by C");
    printf("shrink %d, grow %d, seal %d\n", errno_of_truncation(fd, 1),
           errno_of_truncation(fd, 2 * status.st_size),
           fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE) == 0 ? 0 : errno);
}

static void give(int sock, int sealed) {
    int fd = memfd_create("peer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    must(fd >= 0 && ftruncate(fd, SIZE) == 0, "memfd_create");
    if (sealed)
        must(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0, "F_ADD_SEALS");
    char *memory = map(fd, SIZE);
    strcpy(memory, "made by C");
    transmit(sock, fd);
    char byte;
    must(read(sock, &byte, 1) >= 0, "read");
    printf("%s\n", memory);
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "take") == 0)
        take(atoi(argv[2]));
    else if (argc == 4 && strcmp(argv[1], "give") == 0)
        give(atoi(argv[2]), strcmp(argv[3], "sealed") == 0);
    else
        return 2;
    return 0;
}

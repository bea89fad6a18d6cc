/* SPDX-License-Identifier: MIT */
#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sockets.h"
#include "wait.h"

static void tcp_pair(int ret_fd[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 1) == 0);
    assert(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
    ret_fd[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert(connect(ret_fd[0], (struct sockaddr *)&address, size) == 0);
    ret_fd[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    assert(ret_fd[1] >= 0);
    close(listener);
}

static void urgent_data_from_another_process(void) {
    int fd[2];
    char data[100];
    tcp_pair(fd);
    if (fork() == 0) {
        for (const char *c = "AB1CD2EF"; *c != 0; c++)
            assert(ik_sockets_send(fd[0], c, 1, *c < 'A' ? MSG_OOB : 0, IK_FOREVER) == 1);
        shutdown(fd[0], SHUT_WR);
        _exit(0);
    }
    int status;
    assert(wait(&status) > 0 && status == 0);
    assert(ik_wait_fd(fd[1], POLLRDHUP, ik_wait_now() + 120000000000) > 0);
    assert(ik_sockets_recv(fd[1], data, 1, MSG_OOB, IK_NOW) == 1 && data[0] == '2');
    assert(ik_sockets_recv(fd[1], data, 1, MSG_OOB, IK_NOW) == -EINVAL);
    assert(ik_sockets_at_mark(fd[1]) == 0);
    assert(ik_sockets_recv(fd[1], data, sizeof data, 0, IK_NOW) == 5);
    assert(memcmp(data, "AB1CD", 5) == 0 && ik_sockets_at_mark(fd[1]) == 1);
    assert(ik_sockets_recv(fd[1], data, sizeof data, 0, IK_NOW) == 2);
    assert(memcmp(data, "EF", 2) == 0);
    close(fd[0]);
    close(fd[1]);
}

static void a_descriptor_to_another_process(void) {
    int fd[2], channel[2], status;
    assert(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fd) == 0);
    if (fork() == 0) {
        char data[4];
        ik_sockets_fds came;
        close(fd[0]);
        assert(ik_sockets_recv_fds(fd[1], data, sizeof data, &came, 1, IK_FOREVER) == 4);
        assert(came.count == 1 && fcntl(came.fd[0], F_GETFD) == FD_CLOEXEC);
        assert(write(came.fd[0], data, 4) == 4);
        _exit(0);
    }
    char data[4];
    assert(pipe2(channel, O_CLOEXEC) == 0);
    assert(ik_sockets_send_fds(fd[0], "ping", 4, &channel[1], 1, IK_FOREVER) == 4);
    assert(read(channel[0], data, 4) == 4 && memcmp(data, "ping", 4) == 0);
    assert(wait(&status) > 0 && status == 0);
    for (int i = 0; i < 2; i++) {
        close(fd[i]);
        close(channel[i]);
    }
}

int main(void) {
    urgent_data_from_another_process();
    a_descriptor_to_another_process();
    return 0;
}

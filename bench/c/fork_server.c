/* SPDX-License-Identifier: MIT
 *
 * The textbook echo server in C, one process per connection, with a message-logging child: the
 * yardstick for ipckit's fork server. Each message (what one read gives) goes into the log pipe
 * before it goes back; the logger appends what comes out of the pipe to the log.
 *
 *     fork_server [PORT [LOG]]      port 0, the default, lets the kernel choose; LOG is echomsg.txt
 *
 * SIGTERM and SIGINT stop it: no new connections, those that live are served to their end, and
 * the logger writes what is left in the pipe. Then the server exits.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* A message of up to PIPE_BUF bytes is one write that no other worker's can split. */
enum { MESSAGE = 4096, PIPE_SIZE = 65536 };

static volatile sig_atomic_t stopping;
static volatile sig_atomic_t listener = -1;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void reap(int signum) {
    (void)signum;
    int saved = errno;
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
    errno = saved;
}

/* shutdown() also ends the accept() that is only about to begin, which a mere flag would miss. */
static void stop(int signum) {
    (void)signum;
    int saved = errno;
    stopping = 1;
    shutdown(listener, SHUT_RDWR);
    errno = saved;
}

static void handle(int signum, void (*handler)(int), int flags) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    sigemptyset(&action.sa_mask);
    if (sigaction(signum, &action, NULL) < 0)
        fail("sigaction");
}

static int write_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t n = write(fd, data, size);
        if (n < 0)
            return -1;
        data += n;
        size -= (size_t)n;
    }
    return 0;
}

static int listen_on(int port) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)port)};
    socklen_t length = sizeof address;
    if (fd < 0)
        fail("socket");
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0)
        fail("SO_REUSEADDR");
    /* Accepted sockets inherit it, so it costs nothing per connection. */
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0)
        fail("TCP_NODELAY");
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("bind");
    if (listen(fd, SOMAXCONN) < 0)
        fail("listen");
    if (getsockname(fd, (struct sockaddr *)&address, &length) < 0)
        fail("getsockname");
    printf("listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

/* Ends at end of file only: when the server and the last worker have closed their write ends. */
static void log_messages(int from, int to) {
    char block[PIPE_SIZE];
    ssize_t n;
    handle(SIGTERM, SIG_IGN, 0);
    handle(SIGINT, SIG_IGN, 0);
    while ((n = read(from, block, sizeof block)) > 0)
        if (write_all(to, block, (size_t)n) < 0)
            break;
    if (n != 0) {
        perror("logger");
        _exit(1);
    }
    _exit(0);
}

static int start_logger(const char *path) {
    int ends[2], file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file < 0)
        fail(path);
    if (pipe2(ends, O_CLOEXEC) < 0)
        fail("pipe");
    pid_t pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid == 0) {
        close(ends[1]);
        log_messages(ends[0], file);
    }
    close(ends[0]);
    close(file);
    return ends[1];
}

static void echo(int connection, int log) {
    char message[MESSAGE];
    ssize_t n;
    while ((n = read(connection, message, sizeof message)) > 0)
        if (write_all(log, message, (size_t)n) < 0 || write_all(connection, message, (size_t)n) < 0)
            _exit(1);
    _exit(n < 0);
}

static void serve(int log) {
    while (!stopping) {
        int connection = accept(listener, NULL, NULL);
        if (connection < 0) {
            if (!stopping)
                perror("accept");
            continue;
        }
        pid_t pid = fork();
        if (pid == 0) {
            close(listener);
            listener = -1;
            echo(connection, log);
        }
        if (pid < 0)
            perror("fork");
        close(connection);
    }
}

static int port_number(const char *text) {
    char *end;
    long port = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || port < 0 || port > 65535) {
        fprintf(stderr, "fork_server: port must be 0 to 65535, not '%s'\n", text);
        exit(2);
    }
    return (int)port;
}

int main(int argc, char **argv) {
    if (argc > 3) {
        fprintf(stderr, "usage: fork_server [PORT [LOG]]\n");
        return 2;
    }
    int port = argc > 1 ? port_number(argv[1]) : 0;
    int log = start_logger(argc > 2 ? argv[2] : "echomsg.txt");
    handle(SIGPIPE, SIG_IGN, 0);
    handle(SIGCHLD, reap, SA_RESTART | SA_NOCLDSTOP);
    listener = listen_on(port);
    handle(SIGTERM, stop, SA_RESTART);
    handle(SIGINT, stop, SA_RESTART);
    serve(log);
    close(log);
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}

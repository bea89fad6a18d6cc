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
#include <sys/wait.h>

#include "server.h"

static volatile sig_atomic_t stopping;
static volatile sig_atomic_t listener = -1;

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

int main(int argc, char **argv) {
    if (argc > 3) {
        fprintf(stderr, "usage: fork_server [PORT [LOG]]\n");
        return 2;
    }
    int port = argc > 1 ? port_number("fork_server", argv[1]) : 0;
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

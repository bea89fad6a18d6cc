# SPDX-License-Identifier: MIT
"""The standard library's echo server, for bench_server.py: ``server_socketserver.py KIND``.

KIND is a class of ``socketserver``. Nothing else is imported, since what a process has loaded makes its
forks dearer.
"""

import socket
import socketserver
import sys


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while message := self.request.recv(4096):
            self.request.sendall(message)


def main() -> None:
    kind = getattr(socketserver, sys.argv[1])
    # With the default of 5, 16 clients at once overflow the queue, and each overflow is a second lost
    # to TCP's retransmission: that would be measured instead of the server.
    kind.request_queue_size = socket.SOMAXCONN
    with kind(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        print(f"listening on 127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()

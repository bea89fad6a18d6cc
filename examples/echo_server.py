# SPDX-License-Identifier: MIT
"""The message-logging echo server as a program of one's own; Ctrl-C stops it.

python examples/echo_server.py [PORT [FILE]]
"""

import signal
import sys

import ipckit
from ipckit.servers import listen
from ipckit.servers.fork import ForkServer


def main(port: int, path: str) -> None:
    stop = (signal.SIGTERM, signal.SIGINT)
    with ipckit.blocked(stop), listen("127.0.0.1", port) as listener, ipckit.MessageLog(path) as log:
        server = ForkServer(listener, log, max_children=32, idle_timeout=30)
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        server.serve()
        print(server.stats())


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("7007", "echomsg.txt")[len(sys.argv) - 1 :]]
    main(int(arguments[0]), arguments[1])

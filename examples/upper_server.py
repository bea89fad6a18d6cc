# SPDX-License-Identifier: MIT
"""A service of one's own, under any model: what a client types comes back in capitals, line by line.

python examples/upper_server.py [MODEL [PORT]]
"""

import signal
import sys

import ipckit
from ipckit.servers import Service, listen, serve

LONGEST = 10_000  # bytes of a line; nobody may have us keep more than that


class Upper(Service):
    def started(self) -> bytes:
        self.rest = b""  # the beginning of a line whose end has not arrived yet
        return b""

    def received(self, piece: bytes) -> bytes:
        *lines, self.rest = (self.rest + piece).split(b"\n")
        if len(self.rest) > LONGEST:
            self.closing = True
            return b"the line is too long\n"
        return b"".join(line.upper() + b"\n" for line in lines)

    def finished(self) -> bytes:
        return self.rest.upper()  # a last line without its end


def main(model: str, port: int) -> None:
    with ipckit.blocked((signal.SIGTERM, signal.SIGINT)), listen("127.0.0.1", port) as listener:
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        print(serve(Upper, listener, model=model))


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("fork", "7007")[len(sys.argv) - 1 :]]
    main(arguments[0], int(arguments[1]))

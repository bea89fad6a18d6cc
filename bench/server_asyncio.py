# SPDX-License-Identifier: MIT
"""The echo servers on asyncio and uvloop, for bench_server.py: ``server_asyncio.py asyncio|uvloop [LOG]``.

With a LOG each piece is appended to ``ipckit.MessageLog`` before it goes back, as our servers do it.
SIGTERM ends them.
"""

import asyncio
import importlib.util
import signal
import socket
import sys
from collections.abc import Callable

from ipckit import MessageLog


class EchoProtocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def logged(log: MessageLog) -> Callable[[], asyncio.Protocol]:
    class LoggedEchoProtocol(EchoProtocol):
        def data_received(self, data: bytes) -> None:
            log.append(data)
            self.transport.write(data)

    return LoggedEchoProtocol


async def serve_protocol(protocol: Callable[[], asyncio.Protocol]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=socket.SOMAXCONN)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await stopped.wait()
    server.close()


def serve(new_loop: Callable[[], asyncio.AbstractEventLoop], log: str | None) -> None:
    loop = new_loop()
    if log is None:
        loop.run_until_complete(serve_protocol(EchoProtocol))
        return
    with MessageLog(log) as messages:
        loop.run_until_complete(serve_protocol(logged(messages)))


def has_uvloop() -> bool:
    return importlib.util.find_spec("uvloop") is not None


def main() -> None:
    log = sys.argv[2] if len(sys.argv) > 2 else None
    if sys.argv[1] == "uvloop":
        import uvloop

        serve(uvloop.new_event_loop, log)
    else:
        serve(asyncio.new_event_loop, log)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""The demonstration: the message-logging echo server, real clients at once, and its log verified."""

import socket
from collections import defaultdict

from rich.console import Console
from rich.table import Table

from ipckit._unpatched import os, signal, time
from ipckit.messagelog import MessageLog
from ipckit.pipes import Reader, Writer, pipe
from ipckit.process import Child, fork
from ipckit.servers import listen
from ipckit.servers.fork import ForkServer
from ipckit.signals import blocked

_FIRST_LINES = 8

# {number of the client: the lines of it}
Lines = dict[int, list[bytes]]


def run(clients: int, messages: int, path: str) -> int:
    """The whole demonstration; the exit status: 0 if the log holds what the clients sent."""
    console = Console(highlight=False)
    former = os.path.getsize(path) if os.path.exists(path) else 0
    listener = listen()
    address = listener.getsockname()
    console.print(f"echo server on {address[0]}:{address[1]}, a process per connection, log {path}")
    news, tell = pipe()
    with fork(_serve, listener, path, tell) as server:
        listener.close()
        tell.close()
        if trouble := news.recv(timeout=30):
            return _failed(trouble.decode())
        good, seconds = _drive(address, clients, messages)
        server.send_signal(signal.SIGTERM)
        stopped = server.wait(30)
    logged = _logged(path, former)
    verified = _verify(logged, clients, messages)
    _show(console, clients, messages, seconds)
    _show_lines(console, path, former)
    console.print(f"clients that got back each of their messages: {good} of {clients}")
    console.print(f"clients whose messages stand in {path}, each once and in order: {verified} of {clients}")
    console.print(f"the server was stopped: {stopped}")
    fine = good == verified == clients and stopped.code == 0
    console.print("[green]verified[/]" if fine else "[red]NOT verified[/]")
    return 0 if fine else 1


def _failed(trouble: str) -> int:
    Console(stderr=True, highlight=False).print(f"Error: {trouble}", markup=False, soft_wrap=True)
    return 1


def _serve(listener: socket.socket, path: str, tell: Writer) -> int:
    """The server process; an empty message says that it is ready, any other why it can't be."""
    try:
        log = MessageLog(path)
    except OSError as error:
        tell.send(f"{path}: {error.strerror}".encode())
        return 1
    with log, blocked([signal.SIGTERM]):  # kept for the server, if it came before serve() did
        tell.send(b"")
        ForkServer(listener, log).serve()
    return 0


def _line(client: int, message: int) -> bytes:
    return b"client %d message %d: hello through the pipe\n" % (client, message)


def _drive(address: "tuple[str, int]", clients: int, messages: int) -> "tuple[int, float]":
    """Run the clients at the same time: how many of them got back what they sent, and the seconds."""
    line, gun = pipe()  # end of file on it is the start
    numbers = range(1, clients + 1)
    running: list[Child] = [fork(_client, address, number, messages, line, gun) for number in numbers]
    gun.close()
    start = time.perf_counter()
    statuses = [child.wait() for child in running]
    seconds = time.perf_counter() - start
    for child in running:
        child.close()
    line.close()
    return sum(status.code == 0 for status in statuses), seconds


def _client(address: "tuple[str, int]", number: int, messages: int, line: Reader, gun: Writer) -> int:
    gun.close()
    with socket.create_connection(address) as connection, connection.makefile("rb") as answers:
        line.read(1)
        for message in range(1, messages + 1):
            text = _line(number, message)
            connection.sendall(text)
            if answers.readline() != text:
                return 1
        connection.shutdown(socket.SHUT_WR)
        return 0 if answers.read() == b"" else 1


def _logged(path: str, start: int) -> Lines:
    lines: Lines = defaultdict(list)
    with open(path, "rb") as log:
        log.seek(start)
        for line in log:
            lines[int(line.split()[1])].append(line)
    return lines


def _verify(logged: Lines, clients: int, messages: int) -> int:
    """How many clients' messages stand in the log whole, in order, once."""
    expected = {
        number: [_line(number, message) for message in range(1, messages + 1)]
        for number in range(1, clients + 1)
    }
    return sum(logged[number] == lines for number, lines in expected.items())


def _show(console: Console, clients: int, messages: int, seconds: float) -> None:
    table = Table("clients at once", "messages each", "seconds", "echoes/s")
    table.add_row(str(clients), f"{messages:,}", f"{seconds:.2f}", f"{clients * messages / seconds:,.0f}")
    console.print(table)


def _show_lines(console: Console, path: str, start: int) -> None:
    console.print(f"the first lines of this run in {path}:")
    with open(path, "rb") as log:
        log.seek(start)
        for _ in range(_FIRST_LINES):
            console.print("  " + log.readline().decode(errors="replace").rstrip(), markup=False)

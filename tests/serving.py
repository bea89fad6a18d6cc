"""A server as a user starts it, in a process of its own, and clients that check what comes back."""

import contextlib
import itertools
import json
import os
import random
import re
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import procfs
import pytest
from conftest import PATIENCE, eventually

from ipckit.messagelog import records
from ipckit.servers import MODELS, listen, server_class

BENCH = Path(__file__).parent.parent / "build" / "bench"  # the C programs of bench/c, built by make

A_MOMENT = 0.05
"""Seconds to see that something does not happen. A slow machine may hide a fault so; it can't invent one."""

NEVER = 10 * PATIENCE
"""What a server or a log is told for a timeout that is not to pass in a test."""

ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""


_NOT_BEGUN = {"ipckit-serve", "ipckit-spawner"}
"""The names that a child of ``ipckit serve`` has until it goes by its own: the server's, and its program's."""


class Served:
    """``ipckit serve`` with *options*, logging to *path*: on a free port of loopback unless they say where.

    No client and no stop runs out of time, unless the options say so.

    Args: model: of MODELS, or None for the default. listener: a socket that it is given, instead of a port.
        prefix: what runs it, as strace. popen: see Popen.
    """

    def __init__(self, path, *options, model=None, listener=None, prefix=(), **popen):
        self.path = Path(path)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe would fill, and stop the server
        command = [*prefix, sys.executable, "-m", "ipckit", "serve", "--port", "0", "--log", str(path)]
        command += ["--idle-timeout", str(NEVER), "--stop-timeout", str(NEVER)]
        if listener:
            command = [sys.executable, "-c", ACTIVATE, str(listener.fileno()), *command, "--activated"]
            popen["pass_fds"] = [listener.fileno()]
        if model:
            command += ["--model", model]
        popen = {"stdin": subprocess.DEVNULL, "stderr": self._errors, "start_new_session": True} | popen
        self._json = "--json" in options
        popen["stdout"] = self._errors if self._json else subprocess.PIPE
        self.process = subprocess.Popen([*command, *map(str, options)], text=True, **popen)
        self.addresses = []
        """where it listens, as connect() of a socket takes it"""
        for line in self._introduction():
            self.addresses.append(_address(line))

    def _introduction(self):
        """The lines that it says at the start, up to the one about the log."""
        if self._json:
            eventually(lambda: "listening" in dict(self.events()) or self.process.poll() is not None)
            return [f"listening on {each}" for each in dict(self.events())["listening"]["at"].split(", ")]
        said = ""
        while not re.search(r"^logging .*\n", said, re.M):
            # Not readline(): what that reads ahead select() doesn't see.
            readable, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
            assert readable, f"the server said only {said!r}"
            piece = os.read(self.process.stdout.fileno(), 4096).decode()
            if not piece:
                status = self.process.wait(PATIENCE)
                raise AssertionError(f"it ended with status {status}: {self.errors()}")
            said += piece
        return said.splitlines()[:-1]

    @property
    def address(self):
        return self.addresses[0]

    @property
    def pid(self):
        return self.process.pid

    def errors(self):
        """What it has printed on standard error; with --json on both streams."""
        end = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), end, 0).decode()

    def events(self):
        """The same with --json, of which all is events: name and fields of each."""
        lines = self.errors().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [(event["event"], event) for event in events]

    def cpu_seconds(self):
        """Used so far by the server, what it has reaped, and its children."""
        return cpu_seconds(self.pid) + sum(cpu_seconds(pid) for pid in self.children()[0])

    def connect(self, address=None):
        return connect(address or self.address)

    def children(self):
        """The living children that have begun, the logger among them, and the zombies; without the spawner."""
        found = [pid for pid in self.everybody() if name_of(pid) not in _NOT_BEGUN]
        zombies = [pid for pid in found if _state(pid) in ("Z", "X")]
        return [pid for pid in sorted(found) if _state(pid) not in ("Z", "X", None)], zombies

    def workers(self):
        """The living children that have begun, without the logger."""
        logger = self.wait_logger()
        return [pid for pid in self.children()[0] if pid != logger]

    def spawner(self):
        """The program that makes its children, when there is one, and its last child goes by its own name."""

        def spawners():
            return [pid for pid in self.everybody() if name_of(pid) == "ipckit-spawner"]

        found = []
        eventually(lambda: found.append(spawners()) or len(found[-1]) == 1)
        return found[-1][0]

    def everybody(self):
        """Its children, of every kind, living or not."""
        found = set()
        for _ in range(3):  # one that ends while the kernel lists them may hide the next one
            for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
                    found.update(map(int, task.read_text().split()))
        return found

    def logger(self):
        """The child that has the log file open, while it sleeps; None if there is none at the moment.

        Any fork of the server has the file too, until it has closed what it does not need."""
        for pid in self.children()[0]:
            if str(self.path.absolute()) in _links(pid) and _state(pid) in ("S", "T"):
                return pid
        return None

    def wait_logger(self):
        """The same, once there is one."""
        found = []
        eventually(lambda: found.append(self.logger()) or found[-1])
        return found[-1]

    def descriptors(self):
        """What the server has open when it serves nobody (it serves somebody first)."""
        with self.connect() as connection:
            assert exchange(connection, b"\n") == b"\n"
        eventually(lambda: self.children() == ([self.logger()], []))
        return sorted(re.sub(r"\d+", "#", link) for link in _links(self.pid))

    def stop(self, signum=signal.SIGTERM, timeout=PATIENCE):
        """Signal it; its exit status and what it printed at the end."""
        self.process.send_signal(signum)
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, (out or "") + self.errors()

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._errors.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def _address(line):
    """Of a line as "listening on 127.0.0.1:7007", "... [::1]:7007" or "... unix:/path"."""
    if found := re.fullmatch(r"listening on unix:(.*)", line):
        return found[1]
    found = re.fullmatch(r"listening on \[?([^]]*)\]?:(\d+)", line)
    assert found, line
    return found[1], int(found[2])


def connect(address, receive_buffer=None):
    """A client of *address*: (host, port), or the path of a socket file.

    Args: receive_buffer: bytes, so that little fits into it if the client doesn't read.
    """
    if isinstance(address, tuple) and not receive_buffer:
        return socket.create_connection(address, PATIENCE)
    client = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
    client.settimeout(PATIENCE)
    try:
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def _stat(pid):
    """The fields of /proc/PID/stat from the state on; None if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _state(pid):
    fields = _stat(pid)
    return fields and fields[0]


def name_of(pid):
    """The name of a process, as ps shows it; "" if it has gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def wait_stopped(*pids):
    """Until each of them, which was sent SIGSTOP, stands."""
    eventually(lambda: all(_state(pid) == "T" for pid in pids))


def _naps(pid):
    """How often each thread of a process has gone to sleep, if all of them sleep; else None."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has ended
        threads = os.listdir(f"/proc/{pid}/task")
        if all(procfs.state(pid, thread) in "ST" for thread in threads):
            return {thread: procfs.wakeups(pid, thread) for thread in threads}
    return None


def wait_asleep(*pids, seconds=A_MOMENT):
    """Until each of them has slept for so long in one go, as what spins, or polls more often, never does."""

    def slept():
        before = [_naps(pid) for pid in pids]
        select.select([], [], [], seconds)
        return None not in before and before == [_naps(pid) for pid in pids]

    eventually(slept)


def user_of_its_own():
    """A user that has no process yet: a limit of that user's is of the caller alone."""
    return 50_000 + os.getpid() % 10_000


def cpu_seconds(pid):
    """What a process has used so far, with the children that it has reaped."""
    ticks = (_stat(pid) or ["0"] * 15)[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _links(pid):
    found = []
    # Without root one that is ending can't be looked into.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def recv_exact(connection, size):
    """*size* bytes, or fewer at end of file or reset."""
    got = bytearray()
    while len(got) < size:
        try:
            block = connection.recv(size - len(got))
        except ConnectionResetError:
            break
        if not block:
            break
        got += block
    return bytes(got)


def exchange(connection, data, size=None):
    """Send *data*, get as much back, or *size* bytes."""
    connection.sendall(data)
    return recv_exact(connection, len(data) if size is None else size)


def silent(*clients):
    """Nothing comes to any of them for a moment."""
    return select.select(clients, [], [], A_MOMENT)[0] == []


def listen_cramped():
    """A listener whose connections hold little of what a client does not read."""
    listener = listen()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return listener


def connect_unreading(address):
    """A client that has sent what it can, more than listen_cramped() holds of the echo, and reads nothing."""
    client = connect(address, receive_buffer=4096)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while client.send(bytes(1 << 18)):
            pass
    return client


def wait_cut(connection):
    """Until the other side has closed it; without reading anything."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    assert poll.poll(PATIENCE * 1000), "it is still open"


def half_close_and_drain(connection):
    """End our side; what still comes."""
    connection.shutdown(socket.SHUT_WR)
    return recv_exact(connection, 1 << 30)


def chatter(seed, longest=3000):
    """Endless messages, each another."""
    chance = random.Random(seed)
    for number in itertools.count():
        yield b"%d of %d %s\n" % (number, seed, b"x" * chance.randrange(longest))


def slow_but(*quick, models=MODELS):
    """Each of the models; `make test` has the quick ones only."""
    return [model if model in quick else pytest.param(model, marks=pytest.mark.slow) for model in models]


def room_for(model, clients):
    """Options with which so many can be served at a time."""
    options = ["--max-connections", str(clients)]
    if "max_children" in server_class(model).options():
        options += ["--max-children", str(clients)]
    return options


class Client:
    """One of a crowd: what it sent, what it got, how it ended.

    Args: messages: of bytes. each_waits: the next one is sent when the last has come back whole; else
        all as soon as there is room. After the last one its side is closed.
    """

    def __init__(self, connection, messages, each_waits=False):
        connection.setblocking(False)
        self.connection = connection
        # Known by it in the log; that of a Unix client is its process.
        self.name = "{}:{}".format(*connection.getsockname()) if connection.family == socket.AF_INET else None
        self._messages = iter(messages)
        self._each_waits = each_waits
        self._unsent = b""
        self._closing = False
        self.sent = bytearray()
        """all that the kernel took"""
        self.got = bytearray()
        self.end = None
        """"eof" or "reset", once it is there"""

    def finish(self):
        """Send no further message."""
        self._messages = iter(())

    def events(self):
        may_send = not self._closing and (self._unsent or not self._each_waits or self._is_answered())
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if may_send else 0)

    def _is_answered(self):
        return len(self.got) == len(self.sent)

    def step(self, events):
        try:
            if events & selectors.EVENT_READ:
                self._receive()
            if events & selectors.EVENT_WRITE and self.end is None:
                self._send()
        except BlockingIOError:
            pass
        except (ConnectionResetError, BrokenPipeError):
            with contextlib.suppress(OSError):  # what had come before that is still there
                while piece := self.connection.recv(1 << 18):
                    self.got += piece
            self.end = "reset"

    def _receive(self):
        piece = self.connection.recv(1 << 18)
        self.got += piece
        if not piece:
            self.end = "eof"

    def _send(self):
        self._unsent = self._unsent or next(self._messages, b"")
        if self._unsent:
            count = self.connection.send(self._unsent)
            self.sent += self._unsent[:count]
            self._unsent = self._unsent[count:]
        else:
            self._closing = True
            self.connection.shutdown(socket.SHUT_WR)


class Crowd:
    """Clients at a time in one process; each sends and receives as it can, so none can deadlock."""

    def __init__(self):
        self.clients = []
        self._selector = selectors.DefaultSelector()

    def add(self, connection, messages, each_waits=False):
        client = Client(connection, messages, each_waits)
        self.clients.append(client)
        self._selector.register(connection, client.events(), client)
        return client

    def run(self, until=lambda: False):
        """Until all have ended, or *until* is true."""
        end = time.monotonic() + PATIENCE
        while self._selector.get_map() and not until():
            assert time.monotonic() < end, f"clients hang: {self._hanging()}"
            for key, events in self._selector.select(0.01):
                self._step(key, events)

    def _step(self, key, events):
        client = key.data
        client.step(events)
        if client.end:
            self._selector.unregister(client.connection)
        elif client.events() != key.events:
            self._selector.modify(client.connection, client.events(), client)

    def run_for(self, seconds):
        end = time.monotonic() + seconds
        self.run(until=lambda: time.monotonic() >= end)

    def answered(self):
        """Bytes that have come back to all of them."""
        return sum(len(client.got) for client in self.clients)

    def run_for_more(self, size):
        """Until so many more bytes have come back."""
        goal = self.answered() + size
        self.run(until=lambda: self.answered() >= goal)
        assert self.answered() >= goal, "all have ended"

    def _hanging(self):
        return [(c.name, len(c.sent), len(c.got)) for c in self.clients if not c.end][:5]

    def finish(self):
        """No new messages; all answers."""
        for client in self.clients:
            client.finish()
        self.run()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._selector.close()
        for client in self.clients:
            client.connection.close()


def assert_logged(clients, *paths):
    """The log, in record format, has each of the clients' bytes once and in order: what they got back,
    and of what they sent beyond that nothing, or its beginning. Files of a rotation: from old to new."""
    logged = defaultdict(bytearray)
    numbers = {}
    for path in paths:
        for record in records(path, on_torn=lambda number, line: pytest.fail(f"torn: {number} {line}")):
            assert numbers.setdefault(record.peer, record.connection) == record.connection, (
                "a port came twice"
            )
            logged[record.peer] += record.data
    for client in clients:
        data = logged.pop(client.name, b"")
        assert client.sent.startswith(data), f"{client.name}: doubled, reordered or invented"
        assert client.sent.startswith(client.got), f"{client.name}: a wrong answer"
        assert len(data) >= len(client.got), (
            f"{client.name}: {len(client.got)} bytes came back, {len(data)} are logged"
        )
    assert not logged, f"clients that nobody knows: {list(logged)}"


def streams(path):
    """What each connection sent, by its number, from a log in record format without a torn line."""
    torn = []
    found = defaultdict(bytearray)
    for record in records(path, on_torn=lambda *where: torn.append(where)):
        found[record.connection] += record.data
    assert not torn, torn[:3]
    return found


def wait_gone(pids):
    """Seconds until none of *pids* runs any more (zombies of a dead parent's heir count as gone)."""
    start = time.monotonic()
    eventually(lambda: all(_state(pid) in ("Z", "X", None) for pid in pids))
    return time.monotonic() - start

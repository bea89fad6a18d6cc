"""A server as a user starts it, in a process of its own, and clients that check what comes back."""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from ipckit.messagelog import records

BENCH = Path(__file__).parent.parent / "build" / "bench"  # the C programs of bench/c, built by make


class Served:
    """``ipckit serve`` with *options*, logging to *path*: on a free port of loopback unless they say where.

    Args: model: of MODELS, or None for the default. prefix: what runs it, as strace. env: more of it.
    """

    def __init__(self, path, *options, model=None, prefix=(), **env):
        self.path = Path(path)
        command = [*prefix, sys.executable, "-m", "ipckit", "serve", "--port", "0", "--log", str(path)]
        if model:
            command += ["--model", model]
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | env,
        )
        self.addresses = []
        """where it listens, as connect() of a socket takes it"""
        for line in self._introduction():
            self.addresses.append(_address(line))

    def _introduction(self):
        """The lines that it says at the start, up to the one about the log."""
        said = ""
        while not re.search(r"^logging .*\n", said, re.M):
            # Not readline(): what that reads ahead select() doesn't see.
            readable, _, _ = select.select([self.process.stdout], [], [], 30)
            assert readable, f"the server said only {said!r}"
            piece = os.read(self.process.stdout.fileno(), 4096).decode()
            if not piece:
                error = self.process.communicate(timeout=30)[1]
                raise AssertionError(f"it ended with status {self.process.returncode}: {error}")
            said += piece
        return said.splitlines()[:-1]

    @property
    def address(self):
        return self.addresses[0]

    @property
    def pid(self):
        return self.process.pid

    def connect(self, address=None, timeout=20):
        return connect(address or self.address, timeout)

    def children(self):
        """The living children, the logger among them, and the zombies."""
        living, zombies = [], []
        for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in task.read_text().split():
                state = _state(pid)
                (zombies if state in ("Z", "X", None) else living).append(int(pid))
        return living, zombies

    def logger(self):
        """The child that has the log file open."""
        for pid in self.children()[0]:
            if str(self.path.absolute()) in _links(pid):
                return pid
        return None

    def descriptors(self):
        """What the server has open when it serves nobody (it serves somebody first)."""
        with self.connect() as connection:
            assert exchange(connection, b"\n") == b"\n"
        end = time.monotonic() + 20
        while self.children() != ([self.logger()], []):
            assert time.monotonic() < end, "children left"
            time.sleep(0.001)
        return sorted(re.sub(r"\d+", "#", link) for link in _links(self.pid))

    def stop(self, signum=signal.SIGTERM, timeout=30):
        """Signal it; its exit status and what it printed at the end."""
        self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out + err

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

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


def connect(address, timeout=20):
    """A client of *address*: (host, port), or the path of a socket file."""
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(timeout)
    try:
        client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


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


def half_close_and_drain(connection):
    """End our side; what still comes."""
    connection.shutdown(socket.SHUT_WR)
    return recv_exact(connection, 1 << 30)


def streams(path):
    """What each connection sent, by its number, from a log in record format without a torn line."""
    torn = []
    found = defaultdict(bytearray)
    for record in records(path, on_torn=lambda *where: torn.append(where)):
        found[record.connection] += record.data
    assert not torn, torn[:3]
    return found


def wait_gone(pids, timeout):
    """Seconds until none of *pids* runs any more (zombies of a dead parent's heir count as gone)."""
    start = time.monotonic()
    while any(_state(pid) not in ("Z", "X", None) for pid in pids):
        assert time.monotonic() - start < timeout, f"still there after {timeout} s: {pids}"
        time.sleep(0.001)
    return time.monotonic() - start

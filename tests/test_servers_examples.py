"""The services of examples/, each under every model; and workers killed in the middle of a change."""

import contextlib
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from serving import connect, exchange, half_close_and_drain, recv_exact, slow_but

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(params=slow_but("fork", "prefork", "epoll", "thread"))
def model(request):
    return request.param


@contextlib.contextmanager
def running(script, model):
    """The address of an example's server, and its process; it ends in good order."""
    with subprocess.Popen(
        [sys.executable, EXAMPLES / script, model, "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            port = re.search(r":(\d+)\n", process.stdout.readline())
            assert port, "it did not start"
            yield ("127.0.0.1", int(port[1])), process
            process.terminate()
            assert process.wait(PATIENCE) == 0
            assert f"model='{model}'" in process.stdout.read()
        finally:
            process.kill()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ask(client, line):
    client.sendall(line.encode() + b"\n")
    got = b""
    while not got.endswith(b"\n"):
        more = client.recv(4096)
        if not more:
            raise ConnectionResetError
        got += more
    return got.decode().rstrip("\n")


def test_upper(model):
    with running("upper_server.py", model) as (address, _):
        with connect(address) as client:
            assert exchange(client, b"one\ntw", 4) == b"ONE\n"
            assert exchange(client, b"o\nthree", 4) == b"TWO\n"
            assert half_close_and_drain(client) == b"THREE"
        with connect(address) as client:
            client.sendall(b"x" * 10_001)
            assert recv_exact(client, 1 << 20) == b"the line is too long\n"


def test_key_value(model):
    with running("key_value_server.py", model) as (address, _):
        with connect(address) as client:
            assert ask(client, "GET colour") == "NONE"
            assert ask(client, "SET colour dark blue") == "OK"
            assert ask(client, "SET size é") == "OK"
        with connect(address) as client:  # in another process, where the model has one for each
            assert ask(client, "GET colour") == "VALUE dark blue"
            assert ask(client, "KEYS") == "KEYS colour size"
            assert ask(client, "DEL colour") == "OK"
            assert ask(client, "DEL colour") == "NONE"
            assert ask(client, "SET size") == "ERROR SET needs a key and a value"
            assert ask(client, "PUT size 1") == "ERROR one of SET, GET, DEL, KEYS, not 'PUT'"
            for number in range(60):
                answer = ask(client, f"SET big{number} {'x' * 9_900}")
                if answer != "OK":
                    break
            assert answer == "ERROR the table is full"
            assert ask(client, "GET size") == "VALUE é"


class Dying:
    """A half of the table; who writes into it is killed half-way, at the *last*-th write."""

    def __init__(self, room, last):
        self.room, self.left = room, last

    def __getitem__(self, where):
        return self.room[where]

    def __setitem__(self, where, data):
        self.left -= 1
        if self.left == 0:
            start = where.start or 0
            self.room[start : start + len(data) // 2] = data[: len(data) // 2]
            os.kill(os.getpid(), signal.SIGKILL)
        self.room[where] = data


@pytest.mark.parametrize("last", [1, 2])
def test_who_is_killed_in_the_middle_of_a_change_has_not_changed_anything(forked, last):
    table = runpy.run_path(str(EXAMPLES / "key_value_server.py"))["Table"]()
    with table.change() as content:
        content["key"] = "value" * 10

    def change(ready):
        room = table._room
        table._room = lambda half: Dying(room(half), last)
        with table.change() as content:
            content["key"] = "other" * 100

    assert forked(change).wait() == -signal.SIGKILL
    assert table.look() == {"key": "value" * 10}
    with table.change() as content:
        content["key"] = "third"
    assert table.look() == {"key": "third"}


@pytest.mark.parametrize("model", ["fork", "prefork"])
@pytest.mark.parametrize("kills", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_workers_leave_a_whole_table(model, kills):
    """Each client counts a key of its own up, while workers are killed all the time."""
    with running("key_value_server.py", model) as (address, process):
        with connect(address) as client:
            for number in range(200):  # a large table is long in the making
                assert ask(client, f"SET filler{number} {'x' * 500}") == "OK"
        acknowledged = [0] * 4
        over = threading.Event()

        def count(mine):
            while not over.is_set():
                with contextlib.suppress(ConnectionError), connect(address) as client:
                    while not over.is_set():
                        number = acknowledged[mine] + 1
                        assert ask(client, f"SET count{mine} {number}") == "OK"
                        acknowledged[mine] = number

        counters = [threading.Thread(target=count, args=(mine,)) for mine in range(4)]
        for counter in counters:
            counter.start()
        try:
            for _ in range(kills):
                before = sum(acknowledged)
                with connect(address) as client:  # served to its end: this is no crash loop
                    assert ask(client, "GET filler0") != "NONE"
                with contextlib.suppress(ProcessLookupError, IndexError):  # it has just ended
                    os.kill(random.choice(children(process.pid)), signal.SIGKILL)
                eventually(lambda before=before: sum(acknowledged) > before + 4)
        finally:
            over.set()
            for counter in counters:
                counter.join(PATIENCE)
        with connect(address) as client:
            for mine in range(4):
                found = int(ask(client, f"GET count{mine}").removeprefix("VALUE "))
                assert found in (acknowledged[mine], acknowledged[mine] + 1)
            assert len(ask(client, "KEYS").split()) == 205

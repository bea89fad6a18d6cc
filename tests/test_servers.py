"""What every model promises, in one body: real servers, as a user starts them, and real clients.

What is special to a model has a file of its own, tests/test_servers_<model>.py; shortage, crowds of slow
clients and what else takes long is in tests/proof/test_servers_load.py.
"""

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import statistics
import struct
import subprocess
import time

import pytest
from conftest import eventually
from serving import (
    BENCH,
    Crowd,
    Served,
    assert_logged,
    chatter,
    connect,
    exchange,
    half_close_and_drain,
    recv_exact,
    room_for,
    wait_gone,
)  # fmt: skip

from ipckit.servers import MODELS

# One at a time: a client that keeps it busy keeps all others waiting. That is what this model is there
# to show, and why the other ones exist.
ONE_AT_A_TIME = {"iterative"}


@pytest.fixture(params=list(MODELS))
def model(request):
    return request.param


@pytest.fixture
def started(model, tmp_path):
    """Starts a server of each model, logging records, with room for many clients."""
    running = []

    def start(*options, log=tmp_path / "log", **more):
        room = room_for(model, 300)
        running.append(Served(log, "--format", "record", *room, *options, model=model, **more))
        return running[-1]

    yield start
    for server in running:
        server.close()


def stopped(server):
    """Stop it as an operator does; what it printed."""
    code, printed = server.stop()
    assert code == 0, printed
    return printed


# --- what comes back, and what is logged -----------------------------------------------------------


def test_200_clients_of_1_byte_to_1_mebibyte(started, tmp_path):
    """Each closes its side after its last byte, and gets the whole answer all the same."""
    chance = random.Random(1)
    sizes = [1, 1 << 20, *(int(2 ** chance.uniform(0, 20)) for _ in range(198))]
    server = started()
    with Crowd() as crowd:
        for size in sizes:
            crowd.add(server.connect(), [chance.randbytes(size)])
        crowd.run()
        assert [client.end for client in crowd.clients] == ["eof"] * 200
        assert [len(client.got) for client in crowd.clients] == sizes
        assert "200 (200 done)" in stopped(server)
        assert_logged(crowd.clients, tmp_path / "log")


def test_a_client_in_c(started):
    data = os.urandom(300_000)
    server = started()
    client = [BENCH / "echo_client", *map(str, server.address)]
    done = subprocess.run(client, input=data, capture_output=True, timeout=50)
    assert (done.returncode, done.stdout) == (0, data)
    stopped(server)


def test_ipv4_ipv6_and_unix_at_once(started, tmp_path):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    path = tmp_path / "socket"
    server = started("--host", "127.0.0.1", "--host", "::1", "--unix", path)
    assert len(server.addresses) == 3
    for turn in range(2):
        for number, address in enumerate(server.addresses):
            with connect(address) as client:
                data = b"%d %d" % (turn, number)
                assert exchange(client, data) == data
                assert half_close_and_drain(client) == b""
    stopped(server)
    assert not path.exists()
    log = (tmp_path / "log").read_text()
    assert log.count('"peer":"127.0.0.1:') == log.count('"peer":"[::1]:') == 2
    assert log.count(f'"peer":"pid {os.getpid()} uid {os.geteuid()}"') == 2


def test_an_urgent_byte_breaks_nothing(started):
    """It is left beside the stream, where nobody reads it; and is nothing to wake up for again and again."""
    server = started()
    with server.connect() as client:
        assert exchange(client, b"before") == b"before"
        client.send(b"!", socket.MSG_OOB)
        used, start = server.cpu_seconds(), time.monotonic()
        assert exchange(client, b"after") == b"after"
        assert select.select([client], [], [], 0.3)[0] == []
        assert server.cpu_seconds() - used < 0.5 * (time.monotonic() - start), "it spins"
        assert exchange(client, b"more") == b"more"
        assert half_close_and_drain(client) == b""
    assert "1 (1 done)" in stopped(server)


# --- bad clients cost only themselves --------------------------------------------------------------


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def round_trip(server):
    """Seconds from connect() to the echo, for a fresh client."""
    start = time.monotonic()
    with server.connect() as client:
        assert exchange(client, b"fresh") == b"fresh"
    return time.monotonic() - start


def fill(connection, patience=0.1):
    """Send and never read, until nothing goes any more, or it is closed."""
    connection.setblocking(False)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while select.select([], [connection], [], patience)[1]:
            connection.send(bytes(1 << 16))


def test_bad_clients_cost_only_themselves(started, model):
    server = started()
    silent, unreading, slow = (server.connect() for _ in range(3))
    if model in ONE_AT_A_TIME:
        with server.connect() as fresh:
            fresh.sendall(b"x")
            assert select.select([fresh], [], [], 0.2)[0] == [], "the silent one has it for itself"
    else:
        fill(unreading)
        times = []
        for letter in b"a byte at a time":
            slow.send(bytes([letter]))
            reset(server.connect())
            with server.connect() as nothing:
                assert half_close_and_drain(nothing) == b""
            times.append(round_trip(server))
        assert statistics.median(times) < 0.1, times
        assert recv_exact(slow, 16) == b"a byte at a time"
    for client in (silent, unreading, slow):
        reset(client)
    assert round_trip(server) < 10
    stopped(server)


def test_deadlines(started):
    """Who is silent, who does not read and who goes on for ever: each is cut in time, under its own name."""
    server = started("--idle-timeout", "0.5", "--total-timeout", "1.5")
    with server.connect() as silent, server.connect() as unreading, Crowd() as crowd:
        busy = crowd.add(server.connect(), itertools.repeat(b"x"), each_waits=True)
        crowd.run(until=lambda: fill(unreading, 0), timeout=20)  # until busy has been cut
        assert busy.got
        assert silent.recv(1) == b"", "closed by the server"
    printed = " ".join(stopped(server).split())
    for how in ("1 expired", "1 idle", "1 not read"):
        assert how in printed, printed


# --- signals ---------------------------------------------------------------------------------------


def test_sigterm_under_load(started, tmp_path):
    server = started("--stop-timeout", "5")
    with Crowd() as crowd:
        for seed in range(8):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        crowd.run_for(0.15)
        assert crowd.clients[0].got
        processes = server.children()[0]
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        crowd.run(timeout=20)
        stopped(server)
        assert time.monotonic() - start < 5, "it waited until its deadline"
        wait_gone(processes, 1)
        assert_logged(crowd.clients, tmp_path / "log")


def test_rotation_under_load(started, tmp_path):
    path, server = tmp_path / "log", started("--json")
    files = []
    with Crowd() as crowd:
        for seed in range(4):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        for number in range(1, 5):
            crowd.run_for(0.05)
            files.append(tmp_path / f"log.{number}")
            path.rename(files[-1])
            server.process.send_signal(signal.SIGHUP)
            crowd.run(until=lambda n=number: server.errors().count('"log reopened"') == n, timeout=20)
            assert path.exists()
        crowd.run_for(0.05)
        crowd.finish()
        stopped(server)
        assert all(file.stat().st_size for file in files)
        assert_logged(crowd.clients, *files, path)


def test_the_events_of_a_life(started, tmp_path):
    server = started("--json")

    def seen(name):
        return [fields for event, fields in server.events() if event == name]

    with server.connect() as client:
        assert exchange(client, b"hello") == b"hello"
        eventually(lambda: seen("connected"))  # which another process may have to tell first
        server.process.send_signal(signal.SIGUSR1)
        eventually(lambda: seen("statistics"))
        os.kill(server.logger(), signal.SIGKILL)
        eventually(lambda: seen("logger died"))
        assert exchange(client, b"again") == b"again"
        assert half_close_and_drain(client) == b""
        name = "{}:{}".format(*client.getsockname())
    eventually(lambda: seen("ended"))
    server.process.send_signal(signal.SIGUSR1)
    eventually(lambda: len(seen("statistics")) == 2)
    assert server.stop()[0] == 0
    names = [event for event, _ in server.events()]
    order = [
        "listening",
        "connected",
        "statistics",
        "logger died",
        "ended",
        "statistics",
        "stopping",
        "stopped",
        "served",
    ]
    assert [event for event in names if event in order] == order
    assert seen("connected")[0]["peer"] == seen("ended")[0]["peer"] == name
    assert seen("ended")[0]["how"] == "done"
    first, _, last = seen("statistics") + seen("served")
    assert (first["connections"], first["open"]) == (1, 1)
    assert (first["echoes"], first["bytes"]) in (
        (1, 5),
        (0, 5),
        (0, 0),
    )  # counted when the client has it already
    assert first["workers"] >= 1
    assert (last["open"], last["bytes"], last["ends"], last["log"]["restarts"]) == (0, 10, {"done": 1}, 1)
    assert all(abs(fields["time"] - time.time()) < 60 for _, fields in server.events())


# --- kill -9 ---------------------------------------------------------------------------------------


def test_the_logger_killed_under_load(started, tmp_path):
    server = started()
    with Crowd() as crowd:
        for seed in range(4):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        for _ in range(4):
            crowd.run_for(0.05)
            logger = server.logger()
            os.kill(logger, signal.SIGKILL)
            crowd.run(until=lambda old=logger: server.logger() not in (None, old), timeout=20)
        crowd.finish()
        assert [client.end for client in crowd.clients] == ["eof"] * 4
        stopped(server)
        assert_logged(crowd.clients, tmp_path / "log")


def test_the_supervisor_killed_takes_all_with_it(started, tmp_path):
    server = started()
    with Crowd() as crowd:
        for seed in range(4):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        crowd.run_for(0.1)
        processes = server.children()[0]
        assert server.logger() in processes
        os.kill(server.pid, signal.SIGKILL)
        wait_gone(processes, 1)
        crowd.run(timeout=10)
        assert all(client.end for client in crowd.clients)
        assert_logged(crowd.clients, tmp_path / "log")

"""What every model promises, in one body: real servers, as a user starts them, and real clients.

What is special to a model has a file of its own, tests/test_servers_<model>.py; shortage, crowds of slow
clients and what else takes long is in tests/proof/test_servers_load.py. `make test` runs the whole body for
a model of each kind, and for the others that they echo and log; `make check` runs it for all.
"""

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import struct
import subprocess
import time

import pytest
from conftest import PATIENCE, eventually
from serving import (
    BENCH,
    Crowd,
    Served,
    assert_logged,
    chatter,
    connect,
    connect_unreading,
    exchange,
    half_close_and_drain,
    listen_cramped,
    recv_exact,
    room_for,
    silent,
    slow_but,
    wait_asleep,
    wait_cut,
    wait_gone,
    wait_stopped,
)  # fmt: skip

from ipckit.messagelog import records
from ipckit.servers import MODELS

# One at a time: a client that keeps it busy keeps all others waiting. That is what this model is there
# to show, and why the other ones exist.
ONE_AT_A_TIME = {"iterative"}


@pytest.fixture(params=slow_but("fork", "prefork", "epoll", "asyncio"))
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


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_clients_of_1_byte_to_1_mebibyte(started, tmp_path, model, count):
    """Each closes its side after its last byte, and gets the whole answer all the same."""
    chance = random.Random(1)
    sizes = [1, 1 << 20, *(int(2 ** chance.uniform(0, 20)) for _ in range(count - 2))]
    server = started()
    with Crowd() as crowd:
        for size in sizes:
            crowd.add(server.connect(), [chance.randbytes(size)])
        crowd.run()
        assert [client.end for client in crowd.clients] == ["eof"] * count
        assert [len(client.got) for client in crowd.clients] == sizes
        assert f"{count} ({count} done)" in stopped(server)
        assert_logged(crowd.clients, tmp_path / "log")


def test_a_client_in_c(started):
    data = os.urandom(300_000)
    server = started()
    client = [BENCH / "echo_client", *map(str, server.address)]
    done = subprocess.run(client, input=data, capture_output=True, timeout=PATIENCE)
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
        assert exchange(client, b"after") == b"after"
        assert silent(client)
        wait_asleep(server.pid, *server.children()[0])
        assert exchange(client, b"more") == b"more"
        assert half_close_and_drain(client) == b""
    assert "1 (1 done)" in stopped(server)


# --- bad clients cost only themselves --------------------------------------------------------------


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def round_trip(server):
    """A fresh client."""
    with server.connect() as client:
        assert exchange(client, b"fresh") == b"fresh"


def test_bad_clients_cost_only_themselves(started, model):
    """Nobody of them would ever be cut; yet each fresh one is served."""
    server = started()
    idle, slow = server.connect(), server.connect()
    unreading = connect_unreading(server.address)
    if model in ONE_AT_A_TIME:
        with server.connect() as fresh:
            fresh.sendall(b"x")
            assert silent(fresh), "the idle one has it for itself"
    else:
        for letter in b"slowly":
            slow.send(bytes([letter]))
            reset(server.connect())
            with server.connect() as nothing:
                assert half_close_and_drain(nothing) == b""
            round_trip(server)
        assert recv_exact(slow, 6) == b"slowly"
    for client in (idle, unreading, slow):
        reset(client)
    round_trip(server)
    stopped(server)


def test_who_is_silent_and_who_does_not_read_is_cut(started):
    """Each under its own name."""
    with listen_cramped() as listener:
        server = started("--idle-timeout", "0.2", listener=listener)
        with server.connect() as idle, connect_unreading(server.address) as unreading:
            assert idle.recv(1) == b"", "closed by the server"
            wait_cut(unreading)
    printed = " ".join(stopped(server).split())
    for how in ("1 idle", "1 not read"):
        assert how in printed, printed


@pytest.mark.parametrize("model", slow_but("epoll"))
def test_a_slow_but_steady_reader_is_not_cut(started):
    """What has been sent to it is more than it reads in many times the limit, and fills what there is to hold it."""
    server = started("--idle-timeout", "1")
    with server.connect() as client:
        client.setblocking(False)
        got = 0
        while got < 400_000:
            with contextlib.suppress(BlockingIOError):
                client.send(bytes(1 << 16))
            time.sleep(0.05)  # its pace
            with contextlib.suppress(BlockingIOError):
                piece = client.recv(4000)
                assert piece, f"cut after {got} bytes"
                got += len(piece)
        client.setblocking(True)
        half_close_and_drain(client)
    assert "1 (1 done)" in stopped(server)


@pytest.mark.parametrize("durability", ["none", "written"])
def test_who_waits_for_the_log_is_cut_in_time_too(started, tmp_path, durability):
    """The log holds its answer back; its piece is in the log once, or not at all."""
    server = started("--total-timeout", "0.5", "--durability", durability)
    logger = server.wait_logger()
    os.kill(logger, signal.SIGSTOP)
    wait_stopped(logger)
    with Crowd() as crowd:
        crowd.add(server.connect(), chatter(1))
        crowd.run()  # until it is cut
        os.kill(logger, signal.SIGCONT)
        assert "1 (1 expired)" in stopped(server)
        assert_logged(crowd.clients, tmp_path / "log")


def test_who_goes_on_for_ever_is_cut(started):
    server = started("--total-timeout", "0.3")
    with Crowd() as crowd:
        busy = crowd.add(server.connect(), itertools.repeat(b"x"), each_waits=True)
        crowd.run()  # until it is cut
        assert busy.end
    assert "1 (1 expired)" in stopped(server)


# --- signals ---------------------------------------------------------------------------------------


def test_sigterm_under_load(started, tmp_path):
    server = started()
    with Crowd() as crowd:
        for seed in range(8):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        crowd.run_for_more(100_000)
        processes = server.children()[0]
        server.process.send_signal(signal.SIGTERM)
        crowd.run()
        stopped(server)  # long before its deadline
        wait_gone(processes)
        assert_logged(crowd.clients, tmp_path / "log")


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_who_sends_on_at_the_stop_gets_all_that_was_answered(started, tmp_path, kind):
    """It has taken little of its answers by then, and takes the rest slowly, sending all the time."""
    server = started(*(["--unix", tmp_path / "socket"] if kind == "unix" else []))
    sent = got = 0
    with connect(server.address, receive_buffer=4096) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += client.send(bytes(1 << 16))
        while got < 1000:
            got += len(client.recv(1000)) if select.select([client], [], [], PATIENCE)[0] else 0
        server.process.send_signal(signal.SIGTERM)
        while piece := receive_ready(client):
            got += len(piece)
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                sent += client.send(b"more")
    assert "1 (1 done)" in stopped(server)
    logged = sum(len(record.data) for record in records(tmp_path / "log"))
    assert got == logged > 1000


def receive_ready(client):
    """Some of what comes, or nothing at the end of file; a reset is an error."""
    assert select.select([client], [], [], PATIENCE)[0], "it is still open"
    return client.recv(1000)


def test_who_never_pauses_is_answered_no_more_after_the_stop(started, tmp_path):
    server = started()
    with Crowd() as crowd:
        client = crowd.add(server.connect(), itertools.repeat(bytes(4096)))
        crowd.run_for_more(1_000_000)
        server.process.send_signal(signal.SIGTERM)
        crowd.run()  # until its connection ends
        assert "1 (1 done)" in stopped(server)
        logged = sum(len(record.data) for record in records(tmp_path / "log"))
        assert len(client.got) == logged


def test_rotation_under_load(started, tmp_path):
    path, server = tmp_path / "log", started("--json")
    files = []

    def reopened(times):
        """That often in all; what a busy machine had no time for is asked for again."""
        for _ in range(server.errors().count('"log kept"') - len(kept)):
            kept.append(server.process.send_signal(signal.SIGHUP))
        return server.errors().count('"log reopened"') == times

    kept = []
    with Crowd() as crowd:
        for seed in range(4):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        for number in range(1, 5):
            crowd.run_for_more(20_000)  # than can be on the way: some of it is in this file
            files.append(tmp_path / f"log.{number}")
            path.rename(files[-1])
            server.process.send_signal(signal.SIGHUP)
            crowd.run(until=lambda n=number: reopened(n))
            assert path.exists()
        crowd.run_for_more(20_000)
        crowd.finish()
        stopped(server)
        assert all(file.stat().st_size for file in files)
        assert_logged(crowd.clients, *files, path)


def test_the_events_of_a_life(started, tmp_path):
    began = time.time()
    server = started("--json")

    def seen(name):
        return [fields for event, fields in server.events() if event == name]

    with server.connect() as client:
        assert exchange(client, b"hello") == b"hello"
        eventually(lambda: seen("connected"))  # which another process may have to tell first
        server.process.send_signal(signal.SIGUSR1)
        eventually(lambda: seen("statistics"))
        os.kill(server.wait_logger(), signal.SIGKILL)
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
    assert all(began - 1 < fields["time"] < time.time() + 1 for _, fields in server.events())


# --- kill -9 ---------------------------------------------------------------------------------------


def test_the_logger_killed_under_load(started, tmp_path):
    server = started()
    with Crowd() as crowd:
        for seed in range(4):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        for _ in range(4):
            crowd.run_for_more(20_000)
            logger = server.wait_logger()
            os.kill(logger, signal.SIGKILL)
            crowd.run(until=lambda old=logger: server.logger() not in (None, old))
        crowd.finish()
        assert [client.end for client in crowd.clients] == ["eof"] * 4
        stopped(server)
        assert_logged(crowd.clients, tmp_path / "log")


def test_the_supervisor_killed_takes_all_with_it(started, tmp_path):
    server = started()
    with Crowd() as crowd:
        for seed in range(4):
            crowd.add(server.connect(), chatter(seed), each_waits=True)
        crowd.run_for_more(50_000)
        logger = server.wait_logger()
        processes = server.children()[0]
        assert logger in processes
        os.kill(server.pid, signal.SIGKILL)
        wait_gone(processes)
        crowd.run()
        assert all(client.end for client in crowd.clients)
        assert_logged(crowd.clients, tmp_path / "log")

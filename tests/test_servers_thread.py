"""What is special to the thread model; what all models promise is in test_servers.py."""

import contextlib
import logging
import os
import resource
import select
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import eventually
from serving import connect, exchange, half_close_and_drain, recv_exact, streams

from ipckit.messagelog import MessageLog
from ipckit.servers import EchoService, Service, listen, server
from ipckit.signals import blocked


class Echo(Service):
    """In Python, so it is served by a thread of Python's."""

    def received(self, piece):
        return piece


@pytest.fixture(params=[EchoService, Echo], ids=["native", "python"])
def service(request):
    return request.param


@pytest.fixture
def serving(tmp_path, forked):
    """Starts a thread server in a child of its own, which checks how its connections ended."""

    def start(service, expected_ends, *, before=lambda log: None, stop_timeout=10.0, **options):
        listener = listen()

        def child(ready):
            logging.basicConfig(stream=sys.stderr, force=True)
            with blocked([signal.SIGTERM]), MessageLog(tmp_path / "log", format="record") as log:
                before(log)
                running = server("thread", listener, log, service=service, **options)
                running.loop.after(0, ready)
                running.serve(stop_timeout=stop_timeout)
                # A thread that was joined is seen in /proc for a moment yet.
                eventually(lambda: len(os.listdir("/proc/self/task")) == len(threading.enumerate()))
                stats = running.stats()
                assert stats.ends == expected_ends, stats
                assert stats.open == stats.workers == len(threading.enumerate()) - 1
                os.kill(log.logger.pid, signal.SIGCONT)

        running = forked(child)
        address = listener.getsockname()
        listener.close()
        running.wait_ready()
        return address, running

    return start


def stop(running, timeout=20.0):
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(timeout) == 0


def children(pid):
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]


def test_a_thread_for_each_client_and_none_is_left(serving, service, tmp_path):
    address, running = serving(service, {"done": 21})
    clients = [connect(address) for _ in range(20)]
    for number, client in enumerate(clients):
        assert exchange(client, b"%d\n" % number) == b"%d\n" % number
    assert len(os.listdir(f"/proc/{running.pid}/task")) == 21
    open_before = len(os.listdir(f"/proc/{running.pid}/fd"))
    for client in clients:
        assert half_close_and_drain(client) == b""
        client.close()
    eventually(lambda: len(os.listdir(f"/proc/{running.pid}/task")) == 1)
    eventually(lambda: len(os.listdir(f"/proc/{running.pid}/fd")) == open_before - 20)
    with connect(address) as last:
        assert exchange(last, b"last\n") == b"last\n"
        stop(running)
        assert last.recv(1) == b"", "told that it is over"
    assert sorted(streams(tmp_path / "log").values()) == sorted(
        [b"%d\n" % n for n in range(20)] + [b"last\n"]
    )


def test_max_connections_makes_the_next_one_wait(serving, service):
    address, running = serving(service, {"done": 3}, max_connections=2)
    first, second, third = (connect(address) for _ in range(3))
    assert exchange(first, b"1") == b"1"
    assert exchange(second, b"2") == b"2"
    third.sendall(b"3")
    assert select.select([third], [], [], 0.3)[0] == [], "served only when there is room"
    first.close()
    assert recv_exact(third, 1) == b"3"
    second.close()
    third.close()
    stop(running)


def test_deadlines_of_threads_that_wait_in_the_kernel(serving, service):
    address, running = serving(
        service, {"idle": 1, "not read": 1, "expired": 1}, idle_timeout=0.3, total_timeout=2.0
    )
    with connect(address) as silent, connect(address) as unreading, connect(address) as busy:
        unreading.setblocking(False)
        began = time.monotonic()
        over = False
        while not over:
            assert time.monotonic() - began < 20
            with contextlib.suppress(BlockingIOError, ConnectionResetError, BrokenPipeError):
                unreading.send(bytes(65536))
            busy.sendall(b"x")
            over = busy.recv(1) == b""
        assert time.monotonic() - began > 1.5
        assert silent.recv(1) == b""
    stop(running)


def test_no_more_threads_the_client_waits_and_the_server_goes_on(serving, service):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user whose processes can be limited")

    def limit(log):
        os.setresuid(54322, 54322, 54322)
        resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))  # ourselves and one thread; the logger is root's

    address, running = serving(service, {"done": 3}, before=limit)
    clients = [connect(address) for _ in range(3)]
    assert exchange(clients[0], b"0") == b"0"
    for client in clients[1:]:
        client.sendall(b"w")
    assert select.select(clients[1:], [], [], 0.5)[0] == []
    assert exchange(clients[0], b"still") == b"still"
    for client in clients[1:]:
        clients[0].close()
        assert recv_exact(client, 1) == b"w"
        clients[0] = client
    clients[0].close()
    stop(running)


def test_threads_stuck_in_a_full_log_are_cut(serving, service):
    address, running = serving(service, {"cut": 2}, stop_timeout=0.2, before=stop_the_logger)
    with connect(address) as one, connect(address) as two:
        for client in (one, two):
            client.settimeout(1.0)
            with pytest.raises(TimeoutError):
                while True:
                    client.sendall(bytes(1 << 16))  # until the log's pipe and all buffers are full
                    client.recv(1 << 20)
        began = time.monotonic()
        stop(running)
        assert time.monotonic() - began < 5


def stop_the_logger(log):
    os.kill(log.logger.pid, signal.SIGSTOP)


def test_a_dead_logger_is_replaced_while_threads_append(serving, service, tmp_path):
    address, running = serving(service, {"done": 4})
    clients = [connect(address) for _ in range(4)]
    for number in range(100):
        (logger,) = children(running.pid)
        os.kill(logger, signal.SIGKILL)
        for client in clients:
            assert exchange(client, b"%d\n" % number) == b"%d\n" % number
        eventually(lambda gone=logger: gone not in children(running.pid) != [])
    for client in clients:
        client.close()
    stop(running)
    assert set(map(bytes, streams(tmp_path / "log").values())) == {b"".join(b"%d\n" % n for n in range(100))}


class Sleeps(Service):
    def received(self, piece):
        time.sleep(3600)


def test_a_service_that_never_returns_does_not_hold_up_the_end(serving, capfd):
    address, running = serving(Sleeps, {}, stop_timeout=0.1)
    with connect(address) as client:
        client.sendall(b"x")
        eventually(lambda: len(os.listdir(f"/proc/{running.pid}/task")) == 2)
        stop(running)
    assert "1 services have not returned" in capfd.readouterr().err

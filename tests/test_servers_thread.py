"""What is special to the thread model; what all models promise is in test_servers.py."""

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import eventually
from serving import (
    NEVER,
    connect,
    connect_unreading,
    exchange,
    half_close_and_drain,
    listen_cramped,
    recv_exact,
    silent,
    streams,
    user_of_its_own,
    wait_cut,
)  # fmt: skip

import ipckit.servers.thread
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
    """Starts a thread server in a child of its own, which checks how its connections ended.

    The pipe of its log holds a page."""

    def start(service, expected_ends, *, before=lambda log: None, listener=None, **options):
        listener = listener or listen()
        stop_timeout = options.pop("stop_timeout", NEVER)
        options.setdefault("idle_timeout", NEVER)

        def child(ready):
            logging.basicConfig(stream=sys.stderr, force=True)
            with (
                blocked([signal.SIGTERM]),
                MessageLog(tmp_path / "log", format="record", capacity=4096) as log,
            ):
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


def stop(running):
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 0


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
    assert silent(third), "served only when there is room"
    first.close()
    assert recv_exact(third, 1) == b"3"
    second.close()
    third.close()
    stop(running)


def test_deadlines_of_threads_that_wait_in_the_kernel(serving, service):
    address, running = serving(
        service, {"idle": 1, "not read": 1}, idle_timeout=0.2, listener=listen_cramped()
    )
    with connect(address) as idle, connect_unreading(address) as unreading:
        assert idle.recv(1) == b""
        wait_cut(unreading)
    stop(running)


def test_the_deadline_of_threads_that_are_busy(serving, service):
    address, running = serving(service, {"expired": 1}, total_timeout=0.3)
    began = time.monotonic()
    with connect(address) as busy, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while exchange(busy, b"x"):
            pass
    assert time.monotonic() - began >= 0.3
    stop(running)


def test_no_more_threads_the_client_waits_and_the_server_goes_on(serving, service):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user whose processes can be limited")

    def limit(log):
        user = user_of_its_own()
        os.setresuid(user, user, user)
        resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))  # ourselves and one thread; the logger is root's

    address, running = serving(service, {"done": 3}, before=limit)
    clients = [connect(address) for _ in range(3)]
    assert exchange(clients[0], b"0") == b"0"
    for client in clients[1:]:
        client.sendall(b"w")
    assert silent(*clients[1:])
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
        piece = bytes(2880)
        assert exchange(one, piece) == piece, "there was room for it in the log's pipe"
        for client in (one, two):
            client.sendall(piece)
        assert silent(one, two)
        stop(running)


def stop_the_logger(log):
    os.kill(log.logger.pid, signal.SIGSTOP)


def test_a_dead_logger_is_replaced_while_threads_append(serving, service, tmp_path):
    address, running = serving(service, {"done": 4})
    clients = [connect(address) for _ in range(4)]
    for number in range(30):
        (logger,) = children(running.pid)
        os.kill(logger, signal.SIGKILL)
        for client in clients:
            assert exchange(client, b"%d\n" % number) == b"%d\n" % number
        eventually(lambda gone=logger: gone not in children(running.pid) != [])
    for client in clients:
        client.close()
    stop(running)
    assert set(map(bytes, streams(tmp_path / "log").values())) == {b"".join(b"%d\n" % n for n in range(30))}


class Sleeps(Service):
    def received(self, piece):
        time.sleep(3600)


def test_a_service_that_never_returns_does_not_hold_up_the_end(serving, capfd, monkeypatch):
    monkeypatch.setattr(ipckit.servers.thread, "_GRACE", 0.1)
    address, running = serving(Sleeps, {}, stop_timeout=0.1)
    with connect(address) as client:
        client.sendall(b"x")
        eventually(lambda: len(os.listdir(f"/proc/{running.pid}/task")) == 2)
        stop(running)
    assert "1 services have not returned" in capfd.readouterr().err

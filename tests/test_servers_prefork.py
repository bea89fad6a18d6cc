"""What is special to the pool: it grows and shrinks, its workers die and are replaced."""

import contextlib
import json
import logging
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import PATIENCE, eventually
from serving import (
    NEVER,
    Served,
    connect,
    exchange,
    half_close_and_drain,
    recv_exact,
    silent,
    user_of_its_own,
    wait_gone,
    wait_stopped,
)  # fmt: skip

from ipckit.messagelog import MessageLog
from ipckit.servers import EchoService, Service, listen, scoreboard, serve
from ipckit.servers.prefork import PreforkServer
from ipckit.servers.scoreboard import Backoff
from ipckit.signals import blocked


class Pool(Served):
    """A prefork server in a forked child; its statistics at the end."""

    def __init__(self, forked, path, stats, service=EchoService, listeners=None, before=None, **options):
        self.path, self._stats = path, stats
        self._said = path.with_name("said")
        listeners = listeners or [listen()]
        self.addresses = [listener.getsockname() for listener in listeners]
        self.running = forked(self._serve, listeners, service, before, options)
        for listener in listeners:
            listener.close()
        self.running.wait_ready()

    def _serve(self, ready, listeners, service, before, options):
        logging.basicConfig(
            handlers=[logging.StreamHandler(sys.stderr), logging.FileHandler(self._said)],
            force=True,
            format="%(message)s",
            level=options.pop("level", "WARNING"),
        )
        with blocked([signal.SIGTERM]), MessageLog(self.path) as log:
            self.path.with_name("logger").write_text(str(log.logger.pid))
            if before:
                before()
            ready()
            stats = serve(service, listeners, model="prefork", log=log, stop_timeout=NEVER, **options)
        json.dump(asdict(stats), self._stats)
        self._stats.flush()

    @property
    def pid(self):
        return self.running.pid

    def workers(self):
        return sorted(set(self.children()[0]) - {self.logger()})

    def logger(self):
        """The one that it had at the start, which nobody kills."""
        return int(self.path.with_name("logger").read_text())

    def worker_of(self, connection):
        """The worker that serves *connection*: the one that has its other end."""

        def found():
            inode = inode_of(connection)
            return [pid for pid in self.workers() if inode in sockets(pid)]

        eventually(found)
        return found()[0]

    def said(self):
        """What it has logged so far, also on the standard error of the test."""
        return self._said.read_text()

    def stop(self):
        """Its statistics."""
        os.kill(self.pid, signal.SIGTERM)
        assert self.running.wait() == 0
        self._stats.seek(0)
        return json.load(self._stats)


@pytest.fixture
def start_pool(forked, tmp_path):
    """``pool = start_pool(service, **options)``"""
    with contextlib.ExitStack() as files:

        def start(*args, **options):
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            stats = files.enter_context(open(folder / "stats", "w+"))
            return Pool(forked, folder / "log", stats, *args, **options)

        yield start


def inode_of(connection):
    """The inode of the other end of a TCP connection of this machine."""
    mine, other = connection.getsockname()[1], connection.getpeername()[1]
    with open("/proc/net/tcp") as table:
        for line in list(table)[1:]:
            _, local, remote, *rest = line.split()
            if (int(local[9:], 16), int(remote[9:], 16)) == (other, mine):
                return rest[6]
    return None


def sockets(pid):
    found = set()
    with contextlib.suppress(FileNotFoundError):  # it has just ended
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                link = os.readlink(f"/proc/{pid}/fd/{name}")
                if link.startswith("socket:["):
                    found.add(link[8:-1])
    return found


def hold(pool, count):
    """So many clients, each served."""
    clients = [pool.connect() for _ in range(count)]
    for client in clients:
        assert exchange(client, b"held") == b"held"
    return clients


def close(clients):
    for client in clients:
        client.close()


# --- growing and shrinking -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "service", [EchoService, type("InPython", (Service,), {"received": lambda _, piece: piece})]
)
def test_it_grows_under_held_clients_and_shrinks_after(start_pool, service):
    pool = start_pool(service, min_spare=4, max_spare=6)
    eventually(lambda: len(pool.workers()) == 4)
    clients = hold(pool, 30)
    eventually(lambda: len(pool.workers()) == 34)
    close(clients[1:])
    eventually(lambda: len(pool.workers()) == 7)  # one that serves, six that wait
    assert exchange(clients[0], b"still here") == b"still here"
    close(clients)
    stats = pool.stop()
    assert stats["ends"] == {"done": 30}
    assert (stats["connections"], stats["replaced"], stats["workers"], stats["open"]) == (30, 0, 0, 0)
    assert pool.path.read_bytes() == b"held" * 30 + b"still here"


def test_it_shrinks_slowly_and_no_served_client_notices(start_pool):
    pool = start_pool(min_spare=1, max_spare=1)
    clients = hold(pool, 6)
    eventually(lambda: len(pool.workers()) == 7)
    start = time.monotonic()
    close(clients[::2])
    kept = clients[1::2]

    def has_shrunk():
        for client in kept:
            assert exchange(client, b"x") == b"x"
        return len(pool.workers()) == 4  # three that serve, one that waits

    eventually(has_shrunk)
    assert time.monotonic() - start > 0.2, "one at a time, each 100 ms, not all at once"
    close(kept)
    assert pool.stop()["ends"] == {"done": 6}


def test_a_worker_that_is_retired_while_it_serves_serves_its_client_to_the_end(start_pool):
    pool = start_pool()
    with pool.connect() as client:
        assert exchange(client, b"before") == b"before"
        worker = pool.worker_of(client)
        os.kill(worker, signal.SIGUSR2)
        for _ in range(100):
            assert exchange(client, b"after") == b"after"
        assert half_close_and_drain(client) == b""
    wait_gone([worker])
    assert pool.stop()["ends"] == {"done": 1}


def test_max_children_makes_the_next_ones_wait(start_pool):
    pool = start_pool(max_children=3, min_spare=2)
    clients = hold(pool, 3)
    with pool.connect() as fourth:
        fourth.sendall(b"4")
        assert silent(fourth), "served only when there is room"
        assert len(pool.workers()) == 3
        clients[0].close()
        assert recv_exact(fourth, 1) == b"4"
    close(clients)
    assert pool.stop()["ends"] == {"done": 4}


def test_max_requests_renews_the_workers(start_pool):
    pool = start_pool(min_spare=2, max_requests=4)
    eventually(lambda: len(pool.workers()) == 2)
    seen = set()
    for number in range(20):
        with pool.connect() as client:
            assert exchange(client, b"%02d" % number) == b"%02d" % number
            seen.add(pool.worker_of(client))
            assert half_close_and_drain(client) == b""
    assert len(seen) >= 5, "each at most four"
    stats = pool.stop()
    assert stats["ends"] == {"done": 20}
    assert stats["replaced"] == 0, "none of them died"
    assert pool.path.read_bytes() == b"".join(b"%02d" % number for number in range(20))


def test_two_listeners_at_once(start_pool, tmp_path):
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "socket"))
    unix.listen()
    pool = start_pool(listeners=[listen(), unix])
    for _ in range(20):
        with pool.connect() as first, socket.socket(socket.AF_UNIX) as second:
            second.settimeout(PATIENCE)
            second.connect(str(tmp_path / "socket"))
            assert exchange(second, b"unix") == b"unix"
            assert exchange(first, b"ipv4") == b"ipv4"
            assert half_close_and_drain(first) == half_close_and_drain(second) == b""
    assert pool.stop()["ends"] == {"done": 40}
    assert pool.path.read_bytes() == b"unixipv4" * 20


# --- workers that die ----------------------------------------------------------------------------


def wait_told_of(pool, killed):
    """Wait until the server has counted each of them."""
    for pid in killed:
        eventually(lambda pid=pid: f"worker {pid} killed by SIGKILL" in pool.said())


def test_killed_workers_are_replaced_and_counted(start_pool):
    pool = start_pool()
    victim, other = hold(pool, 2)
    busy = pool.worker_of(victim)
    os.kill(busy, signal.SIGKILL)
    assert recv_exact(victim, 1) == b""
    wait_gone([busy])
    idle = (set(pool.workers()) - {pool.worker_of(other)}).pop()
    os.kill(idle, signal.SIGKILL)
    wait_gone([idle])
    assert exchange(other, b"other") == b"other"
    with pool.connect() as another:
        assert exchange(another, b"goes on") == b"goes on"
        assert half_close_and_drain(another) == b""
    close([victim, other])
    wait_told_of(pool, (busy, idle))
    stats = pool.stop()
    assert stats["ends"] == {"done": 2, "killed": 1}
    assert stats["replaced"] == 2
    assert pool.path.read_bytes() == b"heldheldothergoes on"


def test_a_client_whose_worker_is_killed_before_it_is_accepted_is_served(start_pool):
    """The wake went to that worker; the one that replaces it finds the client in the backlog."""
    pool = start_pool(min_spare=3)
    eventually(lambda: len(pool.workers()) == 3)
    workers = pool.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # woken, they can't accept
    wait_stopped(*workers)
    with pool.connect() as client:
        client.sendall(b"hello")
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        assert recv_exact(client, 5) == b"hello"
    wait_told_of(pool, workers)
    assert pool.stop()["replaced"] == 3


def test_a_dead_worker_is_replaced_even_if_enough_wait(start_pool):
    """A client may have woken that one, and nobody else."""
    pool = start_pool(min_spare=1, max_spare=20)
    clients = hold(pool, 5)
    eventually(lambda: len(pool.workers()) == 6)
    close(clients)
    before = pool.workers()
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: set(pool.workers()) - set(before))
    assert pool.stop()["replaced"] == 1


class Dies(Service):
    def started(self):
        os._exit(1)


def test_a_crash_loop_stops_the_server(start_pool, capfd, monkeypatch):
    """Ten times would take 5 s: tests/test_cli.py."""
    monkeypatch.setattr(scoreboard, "_MOST_CRASHES", 5)
    pool = start_pool()
    start, killed = time.monotonic(), set()

    def kill_all():
        for pid in pool.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return ended(pool.running)

    eventually(kill_all)
    # The deaths of the first four may be told one by one, and then only the last pause is left.
    assert time.monotonic() - start > 0.075, "the forks came without a pause"
    assert pool.running.wait() == 1
    said = capfd.readouterr().err
    assert "RuntimeError: workers died at once 5 times in a row, and nobody was served" in said
    assert len(killed) >= 5


def test_a_client_that_kills_its_worker_costs_only_itself(start_pool):
    pool = start_pool(Dies)
    for _ in range(12):  # a crash loop would be ten
        with pool.connect() as client:
            assert recv_exact(client, 1) == b""
    eventually(lambda: pool.said().count("exited with 1") == 12)
    stats = pool.stop()
    assert (stats["ends"], stats["replaced"]) == ({"killed": 12}, 12)


def ended(child):
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class DiesSometimes(Service):
    def received(self, piece):
        if piece == b"die":
            os._exit(1)
        return piece


def test_deaths_in_between_clients_that_are_served_are_no_crash_loop(start_pool):
    pool = start_pool(DiesSometimes)
    for _ in range(11):
        with pool.connect() as client:
            assert exchange(client, b"live") == b"live"
            worker = pool.worker_of(client)
            assert exchange(client, b"die", 1) == b""
            eventually(lambda pid=worker: pid not in pool.workers() + pool.children()[1])
        with pool.connect() as client:
            assert exchange(client, b"live") == b"live"
            assert half_close_and_drain(client) == b""
    stats = pool.stop()
    assert (stats["ends"], stats["replaced"]) == ({"done": 11, "killed": 11}, 11)


def test_the_backoff_doubles_and_is_forgiven():
    backoff, now = Backoff(), time.monotonic()
    waits = []
    for _ in range(9):
        backoff.died(0, now)
        waits.append(backoff.hold())
        assert backoff.holds()
    assert waits == [0.01 * 2**n for n in range(9)]
    with pytest.raises(RuntimeError, match="workers died at once 10 times"):
        backoff.died(0, now)
    assert backoff.forgives(1, now), "somebody was served"
    assert not backoff.holds()
    backoff.died(1, now)
    assert backoff.crashes == 1
    backoff.died(1, now - 1.1)
    assert backoff.crashes == 0, "it lived for a second"


@pytest.mark.parametrize("kills", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_leave_no_wrong_count(start_pool, forked, kills):
    pool = start_pool()
    clients = [forked(hammer_through, pool.address) for _ in range(3)]
    for client in clients:
        client.wait_ready()
    killed = set()
    while len(killed) < kills:
        if workers := set(pool.workers()) - killed:
            victim = random.choice(sorted(workers))
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        with pool.connect() as client:  # somebody is served in between, so this is no crash loop
            assert exchange(client, b"x") == b"x"
            assert half_close_and_drain(client) == b""
        time.sleep(random.random() * 0.02)  # somewhere else in its life
    for client in clients:
        client.kill()
        client.wait()
    eventually(lambda: 4 <= len(pool.workers()) <= 8)
    held = hold(pool, 6)
    eventually(lambda: len(pool.workers()) >= 10)
    close(held)
    eventually(lambda: 4 <= len(pool.workers()) <= 8)
    stats = pool.stop()
    assert stats["open"] == 0
    assert stats["replaced"] == kills
    assert stats["ends"]["done"] >= 6 + kills


def hammer_through(ready, address):
    """As hammer(), and go on when a worker is killed."""
    while True:
        hammer(ready, address)


@pytest.mark.parametrize("rounds", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_of_the_supervisor_takes_all_with_it(start_pool, rounds):
    for number in range(rounds):
        pool = start_pool(before=os.setsid)
        clients = hold(pool, 5) if number % 2 else []
        if not clients:  # in the middle of its forks
            time.sleep(random.random() * 0.01)
        pool.running.kill()
        eventually(lambda pid=pool.pid: not of_session(pid))
        close(clients)
        pool.running.wait()


def of_session(number):
    """The processes of that session, but for zombies."""
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and session_of(pid) == number]


def session_of(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        state, _, _, session, *_ = stat.read().rsplit(")", 1)[1].split()
        return 0 if state in "ZX" else int(session)
    return 0


def test_at_the_limit_of_processes_the_clients_wait(start_pool, tmp_path, capfd):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user whose processes can be limited")

    def limit():
        os.chmod(tmp_path, 0o777)
        user = user_of_its_own()
        os.setresuid(user, user, user)
        resource.setrlimit(resource.RLIMIT_NPROC, (4, 4))  # the supervisor, the spawner, two workers

    pool = start_pool(before=limit)
    clients = [pool.connect() for _ in range(4)]
    for client in clients:
        client.sendall(b"hello")
    for client in clients[:2]:
        assert recv_exact(client, 5) == b"hello"
    assert silent(*clients[2:]), "no process for them"
    for client in clients[:2]:
        client.close()
    for client in clients[2:]:
        assert recv_exact(client, 5) == b"hello"
        client.close()
    eventually(pool.workers)
    assert pool.stop()["ends"] == {"done": 4}
    assert "fork: Resource temporarily unavailable; new connections wait" in capfd.readouterr().err


def test_workers_out_of_descriptors_say_so_and_go_on(start_pool, capfd):
    pool = start_pool(min_spare=1, max_children=1)
    with pool.connect() as client:
        assert exchange(client, b"first") == b"first"
        assert half_close_and_drain(client) == b""
    (worker,) = pool.workers()
    used = set(map(int, os.listdir(f"/proc/{worker}/fd")))
    lowest_free = next(number for number in range(100) if number not in used)
    former = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    began = time.monotonic()
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (lowest_free, former[1]))
    with pool.connect() as client:
        client.sendall(b"hello")
        eventually(lambda: "new connections wait" in pool.said())
        assert silent(client)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, former)
        assert recv_exact(client, 5) == b"hello"
    assert pool.stop()["ends"] == {"done": 2}
    lines = capfd.readouterr().err.count("accept: Too many open files; new connections wait")
    assert 1 <= lines <= 1 + time.monotonic() - began, "a line a second"


# --- the stop ------------------------------------------------------------------------------------


def test_sigterm_under_load(start_pool, forked):
    pool = start_pool()
    clients = [forked(hammer, pool.address) for _ in range(4)]
    for client in clients:
        client.wait_ready()
    stats = pool.stop()
    assert [client.wait() for client in clients] == [0] * 4
    assert set(stats["ends"]) <= {"done", "reset"}
    assert sum(stats["ends"].values()) == stats["connections"]
    assert stats["log"]["messages"] == stats["echoes"]


def hammer(ready, address):
    """Short connections until nobody listens any more."""
    with contextlib.suppress(ConnectionError):
        for number in range(1 << 30):
            with connect(address) as client:
                data = b"%d\n" % number
                if exchange(client, data) != data:
                    break
                client.shutdown(socket.SHUT_WR)
                if recv_exact(client, 1):
                    raise AssertionError("more came back than was sent")
            if number == 50:
                ready()


def test_it_grows_and_shrinks_while_clients_hammer(start_pool, forked):
    pool = start_pool(min_spare=1, max_spare=1, max_requests=20)
    clients = [forked(hammer, pool.address) for _ in range(4)]
    for client in clients:
        client.wait_ready()
    for _ in range(5):
        close(hold(pool, 10))
    stats = pool.stop()
    assert [client.wait() for client in clients] == [0] * 4
    assert stats["replaced"] == 0
    assert stats["connections"] >= 250
    assert sum(stats["ends"].values()) == stats["connections"]


def test_sigterm_to_one_worker_ends_it_and_its_client_in_order(start_pool):
    pool = start_pool()
    with pool.connect() as client:
        assert exchange(client, b"x") == b"x"
        worker = pool.worker_of(client)
        os.kill(worker, signal.SIGTERM)
        assert recv_exact(client, 1) == b""
        wait_gone([worker])
    for _ in range(10):  # the idle ones too, and those that only begin: none takes a client any more
        for pid in pool.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with pool.connect() as client:
            assert exchange(client, b"y") == b"y"
            assert half_close_and_drain(client) == b""
    stats = pool.stop()
    assert (stats["ends"], stats["replaced"]) == ({"done": 11}, 0)


# --- what is told --------------------------------------------------------------------------------


def test_each_connection_is_told_of(start_pool, capfd):
    pool = start_pool(level="INFO")
    with pool.connect() as client, pool.connect() as victim:
        assert exchange(client, b"x") == b"x"
        assert exchange(victim, b"x") == b"x"
        name, other = ("{}:{}".format(*c.getsockname()) for c in (client, victim))
        os.kill(pool.worker_of(victim), signal.SIGKILL)
        assert recv_exact(victim, 1) == b""
        assert half_close_and_drain(client) == b""
    pool.stop()
    said = capfd.readouterr().err
    numbers = {peer: said.split(f" from {peer}")[0].rsplit(" ", 1)[1] for peer in (name, other)}
    assert sorted(numbers.values()) == ["1", "2"]
    for line in (
        f"connection {numbers[name]} from {name}\n",
        f"connection {numbers[name]} from {name} ended: done\n",
        f"connection {numbers[other]} from {other}\n",
        f"connection {numbers[other]} from {other} ended: killed\n",
    ):
        assert said.count(line) == 1, line


def test_a_supervisor_that_stands_still_keeps_nobody_waiting(start_pool, capfd):
    pool = start_pool(level="INFO")
    eventually(lambda: len(pool.workers()) == 4)
    os.kill(pool.pid, signal.SIGSTOP)
    for _ in range(400):  # two events each, and 680 fit into the pipe
        with pool.connect() as client:
            assert exchange(client, b"x") == b"x"
            assert half_close_and_drain(client) == b""
    os.kill(pool.pid, signal.SIGCONT)
    assert pool.stop()["ends"] == {"done": 400}
    said = capfd.readouterr().err
    lost = int(re.search(r"(\d+) events were lost", said)[1])
    assert said.count("connection ") + lost == 800


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_spare": 0}, "min_spare must be an integer from 1 to 2147483647, not 0"),
        ({"max_spare": 3}, "max_spare must be an integer from 4 to 2147483647, not 3"),
        ({"max_children": 0}, "max_children must be an integer from 1 to 2147483647, not 0"),
        ({"max_requests": -1}, "max_requests must be an integer from 0 to 2147483647, not -1"),
    ],
)
def test_bad_options_name_the_value(options, text):
    with listen() as listener, pytest.raises(ValueError, match=text):
        PreforkServer(listener, **options)

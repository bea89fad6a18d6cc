"""The fork server under load and watched: nothing lost, nothing left. All servers: test_servers_kill.py.

By default a slice of each proof; the whole with IPCKIT_PROOF=1 (``make proof``).
"""

import os
import random
import socket
import time

import pytest
from conftest import eventually
from fire import WHOLE, message, slice_of
from serving import Served, connect, exchange, recv_exact, streams, wait_gone

pytestmark = [pytest.mark.proof, *([pytest.mark.timeout(1500)] if WHOLE else [])]


# --- many clients at once ------------------------------------------------------------------------


def sent_by(client, messages):
    """The messages of one client: the first names it, the others are 1 to 8,192 bytes."""
    chance = random.Random(client)
    yield b"client %d\n" % client
    for _ in range(messages - 1):
        yield message(chance, chance.randint(1, 8192))


def drive(ready, address, clients, messages, go):
    """Clients in lock-step: each sends one message, each gets its echo, and so on."""
    connections = [connect(address) for _ in clients]
    ready()
    os.read(go, 1)
    for step in zip(*(sent_by(client, messages) for client in clients)):  # noqa: B905 - all as long
        for connection, data in zip(connections, step, strict=True):
            connection.sendall(data)
        for connection, data in zip(connections, step, strict=True):
            assert recv_exact(connection, len(data)) == data
    for connection in connections:
        connection.shutdown(socket.SHUT_WR)
    for connection in connections:
        assert connection.recv(1) == b""
        connection.close()


def test_200_clients_at_once(tmp_path, forked):
    clients, messages, drivers = slice_of(200, 60), slice_of(500, 40), 4
    with Served(tmp_path / "log", "--format", "record", "--max-children", "250") as server:
        before = server.descriptors()
        held, go = os.pipe()
        groups = [range(i, clients, drivers) for i in range(drivers)]
        running = [forked(drive, server.address, group, messages, held) for group in groups]
        for driver in running:
            driver.wait_ready()
        eventually(lambda: len(server.children()[0]) == clients + 1)
        os.write(go, b"." * drivers)
        most, seen, samples = 0, 0, 0
        while any(os.waitid(os.P_PID, d.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for d in running):
            living, dead = server.children()
            most = max(most, len(living) - 1)
            seen = max(seen, len(dead))
            # A child is a zombie until its parent ran, and no longer.
            eventually(lambda dead=dead: not set(dead) & set(server.children()[1]))
            samples += 1
            time.sleep(0.005)
        assert [driver.wait() for driver in running] == [0] * drivers
        os.close(held)
        os.close(go)
        eventually(lambda: server.descriptors() == before)  # no descriptor leaked
        code, printed = server.stop()
    assert code == 0, printed
    logged = {bytes(data) for data in streams(tmp_path / "log").values() if data != b"\n"}
    expected = {b"".join(sent_by(client, messages)) for client in range(clients)}
    assert logged == expected
    print(f"\n{clients} clients at once, {messages} messages each: {len(logged)} streams whole and in order; "
          f"{samples} samples, at most {most} children at a time; "
          f"zombies: at most {seen} in one sample, none that stayed")  # fmt: skip


# --- the death of the parent ----------------------------------------------------------------------


def test_kill_9_of_the_parent_takes_all_with_it(tmp_path):
    slowest = 0.0
    for number in range(slice_of(50, 5)):
        with Served(tmp_path / f"log{number}") as server:
            connections = [server.connect() for _ in range(10)]
            for connection in connections:
                assert exchange(connection, b"hello\n") == b"hello\n"
            eventually(lambda server=server: len(server.children()[0]) == 11)
            children = server.children()[0]
            server.process.kill()
            slowest = max(slowest, wait_gone(children))
            for connection in connections:
                connection.close()
        assert (tmp_path / f"log{number}").read_bytes() == b"hello\n" * 10
    print(f"\nkill -9 of the parent: all 11 children gone after at most {slowest * 1000:.1f} ms")

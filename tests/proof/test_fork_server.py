"""The fork server under load, killed, stopped and watched: nothing lost, nothing left.

By default a slice of each proof; the whole with IPCKIT_PROOF=1 (``make proof``).
"""

import contextlib
import errno
import os
import random
import signal
import socket
import time

import pytest
from conftest import eventually
from serving import Served, exchange, recv_exact, streams, wait_gone

WHOLE = os.environ.get("IPCKIT_PROOF") == "1"

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1500 if WHOLE else 120)]


def slice_of(whole, part):
    return whole if WHOLE else part


# --- many clients at once ------------------------------------------------------------------------


def message(chance, size):
    return (b"%d " % chance.randrange(10**9) * (size // 2 + 1))[: size - 1] + b"\n" if size else b""


def sent_by(client, messages):
    """The messages of one client: the first names it, the others are 1 to 8,192 bytes."""
    chance = random.Random(client)
    yield b"client %d\n" % client
    for _ in range(messages - 1):
        yield message(chance, chance.randint(1, 8192))


def drive(ready, address, clients, messages, go):
    """Clients in lock-step: each sends one message, each gets its echo, and so on."""
    connections = [socket.create_connection(address, timeout=60) for _ in clients]
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
            driver.wait_ready(60)
        eventually(lambda: len(server.children()[0]) == clients + 1)
        os.write(go, b"." * drivers)
        most, seen, zombies, samples = 0, 0, 0, 0
        while any(os.waitid(os.P_PID, d.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for d in running):
            living, dead = server.children()
            most = max(most, len(living) - 1)
            seen = max(seen, len(dead))
            zombies = max(zombies, lingering(server, dead))
            samples += 1
            time.sleep(0.005)
        assert [driver.wait() for driver in running] == [0] * drivers
        os.close(held)
        os.close(go)
        assert server.descriptors() == before, "descriptors leaked"
        code, printed = server.stop()
    assert code == 0, printed
    assert zombies == 0
    logged = {bytes(data) for data in streams(tmp_path / "log").values() if data != b"\n"}
    expected = {b"".join(sent_by(client, messages)) for client in range(clients)}
    assert logged == expected
    print(f"\n{clients} clients at once, {messages} messages each: {len(logged)} streams whole and in order; "
          f"{samples} samples, at most {most} children at a time; "
          f"zombies: at most {seen} in one sample, {zombies} that stayed")  # fmt: skip


def lingering(server, zombies, patience=1.0):
    """How many of *zombies* are there still after a moment: a child is a zombie until its parent ran."""
    end = time.monotonic() + patience
    while zombies and time.monotonic() < end:
        time.sleep(0.001)
        zombies = [pid for pid in zombies if pid in server.children()[1]]
    return len(zombies)


# --- kill -9 -------------------------------------------------------------------------------------


def client_under_fire(ready, address, number, path, stop):
    """Ping-pong until *stop* exists; each connection has a name; note what was sent and echoed."""
    chance = random.Random(number)
    ready()
    life = 0
    with open(path, "w") as notes:
        while not os.path.exists(stop):
            life += 1
            name = f"{number}.{life}"
            sent, echoed = bytearray(), bytearray()
            try:
                with socket.create_connection(address, timeout=30) as connection:
                    sent += b"%s\n" % name.encode()
                    echoed += exchange(connection, bytes(sent))
                    while len(echoed) == len(sent) and not os.path.exists(stop):
                        data = message(chance, chance.randint(1, 3000))
                        sent += data
                        echoed += exchange(connection, data)
                    connection.shutdown(socket.SHUT_WR)
                    echoed += recv_exact(connection, 1 << 30)
            except OSError as error:  # the child was killed
                assert error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN), error
            notes.write(f"{name} {sent.hex()} {len(echoed)}\n")
            assert sent.startswith(echoed)


def test_kill_9_of_children_and_logger(tmp_path, forked):
    kills = slice_of(1000, 60)
    chance = random.Random(4)
    stop = tmp_path / "stop"
    killed = {"logger": 0, "connection": 0}
    with Served(tmp_path / "log", "--format", "record") as server:
        clients = [
            forked(client_under_fire, server.address, n, tmp_path / f"notes{n}", stop) for n in range(8)
        ]
        for client in clients:
            client.wait_ready()
        while sum(killed.values()) < kills:
            time.sleep(chance.random() * 0.02)
            logger = server.logger()
            others = [pid for pid in server.children()[0] if pid != logger]
            victim = logger if chance.random() < 0.5 else (chance.choice(others) if others else None)
            if victim is None:
                continue
            with contextlib.suppress(ProcessLookupError):  # it ended between the look and the kill
                os.kill(victim, signal.SIGKILL)
                killed["logger" if victim == logger else "connection"] += 1
        stop.touch()
        assert [client.wait(60) for client in clients] == [0] * len(clients)
        code, printed = server.stop()
    assert code == 0, printed
    assert all(killed.values())
    logged = {
        bytes(data).partition(b"\n")[0].decode(): bytes(data) for data in streams(tmp_path / "log").values()
    }
    connections = echoed_bytes = cut = 0
    for n in range(8):
        for line in (tmp_path / f"notes{n}").read_text().splitlines():
            name, sent, echoed = line.split()
            sent, echoed = bytes.fromhex(sent), int(echoed)
            data = logged.get(name, b"")
            assert sent.startswith(data), f"{name}: doubled, reordered or invented"
            assert len(data) >= echoed, f"{name}: echoed {echoed} bytes, logged {len(data)}"
            connections, echoed_bytes, cut = (
                connections + 1,
                echoed_bytes + echoed,
                cut + (echoed < len(sent)),
            )
    assert cut >= killed["connection"] // 2, "the kills hit nobody"
    print(f"\n{killed['connection']} connection children and {killed['logger']} loggers killed under load: "
          f"{connections} connections, {cut} of them cut, {echoed_bytes:,} bytes echoed, all of them in the log once")  # fmt: skip


# --- SIGTERM and the death of the parent -----------------------------------------------------------


def test_sigterm_under_load(tmp_path, forked):
    rounds = slice_of(100, 8)
    chance = random.Random(5)
    slowest = 0.0
    for number in range(rounds):
        log, stop = tmp_path / f"log{number}", tmp_path / f"stop{number}"
        with Served(log, "--format", "record", "--stop-timeout", "10") as server:
            clients = [
                forked(client_until_closed, server.address, n, tmp_path / f"notes{number}.{n}")
                for n in range(4)
            ]
            for client in clients:
                client.wait_ready()
            time.sleep(chance.random() * 0.2)
            children = server.children()[0]
            start = time.monotonic()
            code, printed = server.stop(chance.choice([signal.SIGTERM, signal.SIGINT]))
            slowest = max(slowest, time.monotonic() - start)
            assert code == 0, printed
            wait_gone(children, 0.5)
            assert [client.wait() for client in clients] == [0] * 4
        logged = {bytes(d).partition(b"\n")[0].decode(): bytes(d) for d in streams(log).values()}
        for n in range(4):
            name, sent, echoed = (tmp_path / f"notes{number}.{n}").read_text().split()
            data = logged.get(name, b"")
            assert bytes.fromhex(sent).startswith(data)
            assert len(data) >= int(echoed)
        stop.touch()
    print(f"\n{rounds} stops under load: exit status 0 each time, the slowest took {slowest:.3f} s")


def client_until_closed(ready, address, number, path):
    chance = random.Random(number)
    sent, echoed = bytearray(b"client_%d\n" % number), bytearray()
    try:
        with socket.create_connection(address, timeout=30) as connection:
            echoed += exchange(connection, bytes(sent))
            ready()
            while len(echoed) == len(sent):
                data = message(chance, chance.randint(1, 3000))
                sent += data
                echoed += exchange(connection, data)
    except (ConnectionResetError, BrokenPipeError):
        pass
    assert sent.startswith(echoed)
    with open(path, "w") as notes:
        notes.write(f"client_{number} {sent.hex()} {len(echoed)}")


def test_kill_9_of_the_parent_takes_all_with_it(tmp_path):
    slowest = 0.0
    for number in range(slice_of(50, 5)):
        with Served(tmp_path / f"log{number}") as server:
            connections = [server.connect() for _ in range(10)]
            for connection in connections:
                assert exchange(connection, b"hello\n") == b"hello\n"
            children = server.children()[0]
            assert len(children) == 11
            server.process.kill()
            slowest = max(slowest, wait_gone(children, 1.0))
            for connection in connections:
                connection.close()
        assert (tmp_path / f"log{number}").read_bytes() == b"hello\n" * 10
    print(f"\nkill -9 of the parent: all 11 children gone after at most {slowest * 1000:.1f} ms")

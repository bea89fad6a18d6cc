"""Clients that check what comes back while the server is killed or stopped, and what its log must hold."""

import errno
import os
import random
import socket
from pathlib import Path

from serving import connect, exchange, recv_exact, streams

WHOLE = os.environ.get("IPCKIT_PROOF") == "1"


def slice_of(whole, part):
    """All of a proof, or by default a slice of it."""
    return whole if WHOLE else part


def message(chance, size):
    return (b"%d " % chance.randrange(10**9) * (size // 2 + 1))[: size - 1] + b"\n" if size else b""


def client_under_fire(ready, address, number, path, stop):
    """Connection after connection until *stop* exists, each with a name; note what was sent and echoed."""
    chance = random.Random(number)
    ready()
    life = 0
    with open(path, "w") as notes:
        while not os.path.exists(stop):
            life += 1
            name = f"{number}.{life}"
            sent, echoed = bytearray(), bytearray()
            try:
                with connect(address) as connection:
                    sent += b"%s\n" % name.encode()
                    echoed += exchange(connection, bytes(sent))
                    for _ in range(chance.randint(0, 300)):
                        if len(echoed) < len(sent) or os.path.exists(stop):
                            break
                        data = message(chance, chance.randint(1, 3000))
                        sent += data
                        echoed += exchange(connection, data)
                    connection.shutdown(socket.SHUT_WR)
                    echoed += recv_exact(connection, 1 << 30)
            except OSError as error:  # its process was killed
                assert error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN), error
            notes.write(f"{name} {sent.hex()} {len(echoed)}\n")
            assert sent.startswith(echoed)


def client_until_closed(ready, address, number, path):
    """One connection until the server ends it; the same notes."""
    chance = random.Random(number)
    sent, echoed = bytearray(b"client_%d\n" % number), bytearray()
    try:
        with connect(address) as connection:
            ready()
            echoed += exchange(connection, bytes(sent))
            while len(echoed) == len(sent):
                data = message(chance, chance.randint(1, 3000))
                sent += data
                echoed += exchange(connection, data)
    except (ConnectionResetError, BrokenPipeError):
        pass
    assert sent.startswith(echoed)
    Path(path).write_text(f"client_{number} {sent.hex()} {len(echoed)}\n")


def check_log(log, notes):
    """What was echoed is in the log, once and in order: connections, those cut short, bytes echoed."""
    logged = {}
    for data in map(bytes, streams(log).values()):
        name = data.partition(b"\n")[0].decode()
        assert name not in logged, f"{name}: twice in the log"
        logged[name] = data
    connections = cut = echoed_bytes = 0
    for line in "".join(Path(path).read_text() for path in notes).splitlines():
        name, sent, echoed = line.split()
        sent, echoed = bytes.fromhex(sent), int(echoed)
        data = logged.pop(name, b"")
        assert sent.startswith(data), f"{name}: doubled, reordered or invented"
        assert len(data) >= echoed, f"{name}: echoed {echoed} bytes, logged {len(data)}"
        connections, cut, echoed_bytes = connections + 1, cut + (echoed < len(sent)), echoed_bytes + echoed
    assert not logged, f"never sent: {list(logged)[:3]}"
    return connections, cut, echoed_bytes

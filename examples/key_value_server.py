# SPDX-License-Identifier: MIT
"""A tiny key-value service whose table is right under every model, also with a process per client.

python examples/key_value_server.py [MODEL [PORT]]

A client sends lines, and gets one for each: ``SET key value``, ``GET key``, ``DEL key``, ``KEYS``.

The table lies in shared memory, twice. A change writes the whole new table into the half that is not in
use, then one store of one byte says that it is the other half's turn. So whoever is killed, and wherever,
the table in use is whole, before the change or after it; the client gets its answer only after. The lock
keeps the changes of others out; it is robust: held by who was killed, it goes to the next who asks.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipckit
from ipckit.servers import Service, listen, serve

LONGEST = 10_000  # bytes of a line


class Table:
    """A dict[str, str] in memory that all processes forked from here share.

    Layout: one byte, which half is in use; the halves, each four bytes of length and so much JSON.
    """

    def __init__(self, size: int = 1 << 20) -> None:
        self._half = size // 2
        self._memory = ipckit.SharedMemory(64 + size)
        self._lock = ipckit.Lock()
        self._write({})

    def look(self) -> dict[str, str]:
        with self._lock:
            return self._read()

    @contextmanager
    def change(self) -> Iterator[dict[str, str]]:
        """The table, to be changed within the block; nobody else changes it meanwhile."""
        with self._lock:
            table = self._read()
            yield table
            self._write(table)

    def _room(self, half: int) -> memoryview:
        return self._memory.buf[64 + half * self._half :][: self._half]

    def _read(self) -> dict[str, str]:
        room = self._room(self._memory.buf[0])
        found: dict[str, str] = json.loads(bytes(room[4 : 4 + int.from_bytes(room[:4], "little")]))
        return found

    def _write(self, table: dict[str, str]) -> None:
        text = json.dumps(table).encode()
        if 4 + len(text) > self._half:
            raise ValueError("the table is full")
        other = 1 - self._memory.buf[0]
        room = self._room(other)
        room[:4] = len(text).to_bytes(4, "little")
        room[4 : 4 + len(text)] = text
        self._memory.buf[0] = other  # from here on it counts


class KeyValue(Service):
    table: Table

    def started(self) -> bytes:
        self.rest = b""
        return b""

    def received(self, piece: bytes) -> bytes:
        *lines, self.rest = (self.rest + piece).split(b"\n")
        if len(self.rest) > LONGEST:
            self.closing = True
            return b"ERROR the line is too long\n"
        return b"".join(self.answer(line.decode("utf-8", "replace")).encode() + b"\n" for line in lines)

    def answer(self, line: str) -> str:
        verb, _, rest = line.strip().partition(" ")
        verbs: dict[str, Callable[[str], str]] = {
            "SET": self.set, "GET": self.get, "DEL": self.delete, "KEYS": self.keys,
        }  # fmt: skip
        if verb not in verbs:
            return f"ERROR one of {', '.join(verbs)}, not {verb!r}"
        try:
            return verbs[verb](rest)
        except ValueError as error:
            return f"ERROR {error}"

    def set(self, rest: str) -> str:
        key, space, value = rest.partition(" ")
        if not (key and space):
            return "ERROR SET needs a key and a value"
        with self.table.change() as table:
            table[key] = value
        return "OK"

    def get(self, key: str) -> str:
        value = self.table.look().get(key)
        return "NONE" if value is None else f"VALUE {value}"

    def delete(self, key: str) -> str:
        with self.table.change() as table:
            return "NONE" if table.pop(key, None) is None else "OK"

    def keys(self, _: str) -> str:
        return " ".join(["KEYS", *sorted(self.table.look())])


def main(model: str, port: int) -> None:
    KeyValue.table = Table()  # before the server forks
    with ipckit.blocked((signal.SIGTERM, signal.SIGINT)), listen("127.0.0.1", port) as listener:
        print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
        print(serve(KeyValue, listener, model=model))


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("fork", "7007")[len(sys.argv) - 1 :]]
    main(arguments[0], int(arguments[1]))

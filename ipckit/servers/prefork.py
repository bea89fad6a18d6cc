# SPDX-License-Identifier: MIT
"""The fork server with the forks done beforehand: a supervised pool of processes.

::

    listen -> pipe + logger child -> fork a few workers -> loop: too few wait for clients? fork more
       each worker: wait -> accept -> echo and log -> close        too many? retire one
                     ^                                 |           one died? fork another
                     +---------------------------------+

Every message reaches the log before its echo reaches the client.
"""

import logging
import socket
from collections.abc import Sequence
from typing import Any, BinaryIO, ClassVar

from ipckit._arguments import INT_MAX, integer
from ipckit._native import lib
from ipckit._unpatched import os, signal, time
from ipckit.messagelog import MessageLog
from ipckit.process import Child, ExitStatus
from ipckit.servers.children import ChildServer
from ipckit.servers.connection import ENDS
from ipckit.servers.loop import READ
from ipckit.servers.scoreboard import Backoff, Events, Scoreboard
from ipckit.servers.server import event, tells_of_connections
from ipckit.servers.worker import Maker, Worker

__all__ = ["PreforkServer"]

_SHRINK_EVERY = 0.1  # seconds
_CALM = 1.0  # seconds since it last grew; clients come in waves


class PreforkServer(ChildServer):
    """Serve each connection by one of a pool of processes, which wait for clients before those come.

    Args: min_spare: so many idle workers wait for clients; when fewer do, more are forked at once.
        max_spare: of more idle ones than that one is retired each 100 ms, from a second after the last
            fork on; None: twice min_spare.
        max_requests: a worker ends by itself after so many connections, or up to a quarter fewer, so
            that not all end together; 0: never. The others: see Server.

    A worker that dies is replaced at once if it had a client, or lived for a second, or somebody was served
    since the last one died, else after 10 ms, 20 ms, ... 10 s; serve() ends with RuntimeError at the tenth
    time in a row.
    """

    model: ClassVar[str] = "prefork"

    def __init__(
        self,
        listeners: "socket.socket | Sequence[socket.socket]",
        log: MessageLog | None = None,
        *,
        min_spare: int = 4,
        max_spare: int | None = None,
        max_requests: int = 0,
        **options: Any,
    ) -> None:
        min_spare = integer(min_spare, "min_spare", 1, INT_MAX)
        max_spare = (
            2 * min_spare if max_spare is None else integer(max_spare, "max_spare", min_spare, INT_MAX)
        )
        max_requests = integer(max_requests, "max_requests", 0, INT_MAX)
        super().__init__(listeners, log, **options)
        if len(self.listeners) > lib.IK_PREFORK_LISTENERS:
            raise ValueError(f"at most {lib.IK_PREFORK_LISTENERS} listeners, not {len(self.listeners)}")
        self._min_spare, self._max_spare, self._max_requests = min_spare, max_spare, max_requests
        self._board = Scoreboard(self._max_connections, min_spare)
        self._backoff = Backoff()
        self._pool: dict[Child, Worker] = {}
        self._newest: Worker | None = None
        self._owed = 0  # workers that died and are not replaced yet
        self._shrinking = False
        self._grew = 0.0
        self._maker: Maker | None = None
        self._bell: BinaryIO | None = None
        self._events: Events | None = None

    def _open(self) -> int:
        return self._board.busy()

    def _begin(self) -> None:
        bell = self._hang_bell()
        if tells_of_connections():
            self._events = Events()
            self.loop.watch(self._events, READ, self._tell_events)
        listeners = [listener.fileno() for listener in self.listeners]
        events = self._events.writer if self._events else -1
        counters = self._counted.fileno()
        self._maker = Maker(self._terms, self._board, counters, listeners, bell, events, self._max_requests)
        self.loop.watch(self._reaper, READ, self._reap)

    def _hang_bell(self) -> int:
        self._bell = open(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), "rb", buffering=0)  # noqa: SIM115
        self.loop.watch(self._bell, READ, self._rung)
        return self._bell.fileno()

    # --- growing and shrinking

    def _listen(self) -> None:
        """Have enough workers wait for clients: this is how a pool listens."""
        idle = self._board.look() - sum(
            worker.retired and self._board.waits(worker.index) for worker in self._pool.values()
        )
        while (idle < self._min_spare or self._owed) and self._may_fork():
            if not self._try("fork", self._start_worker):
                break
            idle += 1
        if idle < self._min_spare:  # it can't be helped now; what changes that calls us, not the bell
            self._board.native.rung = 1
        if len(self._pool) > self._max_spare and not self._shrinking:
            self._shrinking = True
            self.loop.after(_SHRINK_EVERY, self._shrink)

    def _may_fork(self) -> bool:
        if self._stopping or self._paused or len(self._pool) >= self._max_connections:
            return False
        if self._backoff.crashes and self._newest:
            self._backoff.forgives(self._served(), self._newest.born)
        return not self._backoff.holds()

    def _start_worker(self) -> Worker | None:
        self._grew = time.monotonic()
        assert self._maker is not None
        worker = self._maker.make(self._grew)
        if not self._adopt(worker.child):
            self._board.free(worker.index)
            return None
        self._newest = self._pool[worker.child] = worker
        self._owed = max(0, self._owed - 1)
        if self._backoff.crashes:  # the next one when this one has proved of use, or has had its time
            self.loop.after(self._backoff.hold(), self._listen)
        return worker

    def _shrink(self) -> None:
        """Retire the last idle worker, if there are too many; one that has a client serves it first."""
        self._shrinking = False
        idle = [w for w in self._pool.values() if not w.retired and self._board.waits(w.index)]
        if len(idle) > self._max_spare and time.monotonic() - self._grew > _CALM:
            last = max(idle, key=lambda worker: worker.index)
            last.retired = True
            last.child.send_signal(signal.SIGUSR2)
        self._listen()

    # --- what workers tell, and how they end

    def _rung(self, _: int) -> None:
        assert self._bell is not None
        self._bell.read(8)
        if error := self._board.native.shortage:
            self._board.native.shortage = 0
            self._pause("accept", OSError(error, os.strerror(error)))
        self._listen()

    def _tell_events(self, _: int = 0) -> None:
        for client, end in self._events or ():
            if end == lib.IK_END_OPEN:
                self._started(client)
            else:
                self._ended(*client, ENDS[end])
        if lost := self._board.native.untold:  # we were slower than a pipe is long
            self._board.native.untold = 0
            event("events lost", "%d events were lost", lost, level=logging.WARNING, lost=lost)

    def _tell(self) -> None:
        self._tell_events()  # what was before comes before
        super()._tell()

    def _reap(self, _: int = 0) -> None:
        dead = [self._bury(self._pool.pop(child), status) for child, status in self._reaper.reap()]
        self._replace([worker for worker in dead if worker])
        self._freed()

    def _bury(self, worker: Worker, status: ExitStatus) -> Worker | None:
        """The one to replace as a crash: it did not end in order, and not with a client, whose fault it
        may be: each client can cost one worker at the most, and no more than its fork is paid for that.
        """
        client = self._board.client(worker.index)
        if client:
            self._killed += 1
            self._tell_events()  # that it began
            self._ended(*client, "killed")
        self._board.free(worker.index)
        if worker is self._newest:
            self._newest = None
        if self._stopping:
            return None
        if status.code == 0:
            # Told to end by somebody else, it may have left the client that woke it, and nobody else.
            self._owed += not worker.retired
            return None
        pid, how = worker.child.pid, str(status)
        event("worker died", "worker %d %s", pid, how, level=logging.WARNING, pid=pid, how=how)
        self._replaced += 1
        self._owed += 1
        return None if client else worker

    def _replace(self, dead: "list[Worker]") -> None:
        if not dead:
            return
        self._backoff.died(self._served(), min(worker.born for worker in dead))
        if self._backoff.crashes:
            self.loop.after(self._backoff.hold(), self._listen)

    def _served(self) -> int:
        """Connections that have ended, but for those of workers that were killed."""
        return sum(self.stats().ends.values()) - self._killed

    def _end(self, deadline: float) -> None:
        if self._maker is not None:
            self._maker.close()
        self._end_children(deadline)
        self._tell_events()
        for file in (self._bell, self._events):
            if file:
                file.close()

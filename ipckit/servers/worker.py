# SPDX-License-Identifier: MIT
"""A worker of the prefork server: what it is given at its fork, and its life if its service is in Python.

An echo worker lives in C (``csrc/prefork.c``).
"""

import random
from dataclasses import dataclass

from ipckit._native import ffi, lib
from ipckit._spawner import WORKER, Spawner
from ipckit.process import Child
from ipckit.servers.children import fork_child
from ipckit.servers.connection import Connection, Terms, new_block
from ipckit.servers.scoreboard import Scoreboard

__all__ = ["Maker", "Worker"]


@dataclass(eq=False)
class Worker:
    """One process of the pool."""

    child: Child
    index: int
    """in the scoreboard"""
    born: float
    retired: bool = False


class Maker:
    """Makes workers, which all get the same but for their place in the scoreboard.

    Args: counters: descriptor of the memory of the server's counters. listeners: descriptors.
        bell: an eventfd. events: the pipe to tell of connections, or -1.
        max_requests: as PreforkServer.
    """

    def __init__(
        self,
        terms: Terms,
        board: Scoreboard,
        counters: int,
        listeners: "list[int]",
        bell: int,
        events: int,
        max_requests: int,
    ) -> None:
        self._terms, self._board, self._max_requests = terms, board, max_requests
        self._spawner = Spawner()
        self._job = job = ffi.new("ik_prefork_worker *")
        job.n_listeners, job.listeners[0 : len(listeners)] = len(listeners), listeners
        job.board, job.bell, job.events = board.native, bell, events
        terms.fill(ffi.addressof(job, "form"))
        if terms.log:
            job.log, job.form.log = terms.log.native[0], ffi.addressof(job, "log")
        told = [events] if events >= 0 else []
        self._fds = [board.memory.fileno(), counters, bell, *told, *listeners, *terms.log_descriptors]

    def make(self, now: float) -> Worker:
        """Another one. Raises: OSError, see fork(2)."""
        index, job = self._board.take(), self._job
        job.index = index
        job.limit = random.randint(self._max_requests - self._max_requests // 4, self._max_requests)
        try:
            return Worker(self._fork(), index, now)
        except BaseException:
            self._board.free(index)
            raise

    def close(self) -> None:
        """Make no more; those that there are go on."""
        self._spawner.close()

    def _fork(self) -> Child:
        if self._terms.native_service:
            return self._spawner.start(WORKER, self._job, self._fds)
        return fork_child(self._work)

    def _work(self) -> int:
        """The life of a worker whose service is in Python."""
        job, block = self._job, new_block()
        client = ffi.addressof(self._board.place(job.index), "connection")
        rc: int = lib.ik_prefork_begin(job)
        while rc >= 0 and (rc := lib.ik_prefork_next(job)) > 0:
            lib.ik_prefork_served(job, Connection(self._terms, client, block).run())
        return -rc

# SPDX-License-Identifier: MIT
"""The servers' loop on top of one of asyncio's, or of uvloop's."""

import asyncio
from collections.abc import Callable

from ipckit._arguments import Descriptor, fileno_of
from ipckit._unpatched import time
from ipckit.servers.loop import READ, WRITE, Handler, Loop, delay

__all__ = ["AsyncioLoop", "new_event_loop"]


def new_event_loop(uvloop: bool | None) -> asyncio.AbstractEventLoop:
    """True: uvloop's; False: asyncio's own; None: uvloop's if it is installed."""
    if uvloop is not False:
        try:
            from uvloop import new_event_loop as of_uvloop
        except ImportError:
            if uvloop:
                raise
        else:
            made: asyncio.AbstractEventLoop = of_uvloop()
            return made
    return asyncio.new_event_loop()


class AsyncioLoop(Loop):
    """It turns by itself until ``wake()``; what asyncio calls directly doesn't end a ``turn()``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.asyncio = loop
        self._failure: BaseException | None = None

    def watch(self, source: Descriptor, events: int, handler: Handler) -> None:
        fd = fileno_of(source, "source")
        self.handlers[fd] = handler
        if events & READ:
            self.asyncio.add_reader(fd, self._call, handler, READ)
        if events & WRITE:
            self.asyncio.add_writer(fd, self._call, handler, WRITE)

    def forget(self, source: Descriptor) -> None:
        fd = fileno_of(source, "source")
        if self.handlers.pop(fd, None) is not None:
            self.asyncio.remove_reader(fd)
            self.asyncio.remove_writer(fd)

    def rest(self, source: Descriptor) -> None:
        self.forget(source)

    def after(self, seconds: float, handler: Callable[[], object]) -> None:
        self.asyncio.call_later(delay(seconds, "seconds"), self._call, handler)

    def every(self, seconds: float, handler: Callable[[], object]) -> None:
        def again() -> None:
            self.every(seconds, handler)
            handler()

        self.after(seconds, again)

    def _call(self, handler: Callable[..., object], *events: int) -> None:
        """asyncio would tell its logger of an error, and go on."""
        try:
            handler(*events)
        except BaseException as error:
            self._failure = error
            self.wake()

    def turn(self, until: float | None = None) -> None:
        timer = self.asyncio.call_later(
            1e6 if until is None else max(0.0, until - time.monotonic()), self.wake
        )
        self.asyncio.run_forever()
        timer.cancel()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wake(self) -> None:
        self.asyncio.stop()

    def close(self) -> None:
        for fd in list(self.handlers):
            self.forget(fd)
        self.asyncio.close()

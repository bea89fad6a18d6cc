# SPDX-License-Identifier: MIT
"""What a command shows while it runs: drawn again and again in one place of the terminal.

rich draws; this is about what happens to the terminal meanwhile. Ctrl-Z gives it back as it was, and in
the background nothing is drawn, until the shell's fg. A new size is drawn anew. A terminal that can't
move its cursor (TERM=dumb) gets a line now and then. One that has been closed gets nothing.
"""

import contextlib
import math
import sys
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleDimensions
from rich.constrain import Constrain
from rich.live import Live

from ipckit._unpatched import os, signal, time

if TYPE_CHECKING:
    from rich.console import RenderableType
    from typing_extensions import Self

__all__ = ["Screen"]

_LINE_EVERY = 5.0  # seconds


class Screen:
    """The place on standard error, inside a with-statement in the main thread.

    ``fileno()`` is readable when ``respond()`` is due: for Ctrl-Z, and after a change of the size.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._live: Live | None = None
        self._noted: set[int] = set()
        self._next_line = -math.inf

    def __enter__(self) -> "Self":
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._measure()
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTSTP, signal.SIGWINCH)}
        for number, handler in self._handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hide()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._news)

    def fileno(self) -> int:
        return self._news

    def draw(self, what: "RenderableType", line: str) -> None:
        """Show *what* in place of what was shown before; or *line*, where only lines can be."""
        if not self.console.is_terminal:
            return
        if self.console.is_dumb_terminal:
            self._print(line)
        elif self._is_ours():
            self._show(what)
        else:
            self._hide()

    def respond(self, _: int = 0) -> None:
        """Do what the signals since the last call ask for. Blocks while this process is stopped."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._news)
        noted, self._noted = self._noted, set()
        if signal.SIGWINCH in noted:
            self._resize()
        if signal.SIGTSTP in noted:
            self._suspend()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted.add(number)
        os.eventfd_write(self._news, 1)

    def _suspend(self) -> None:
        self._hide()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # and here we stand until SIGCONT
        signal.signal(signal.SIGTSTP, self._note)

    def _resize(self) -> None:
        """Of lines that were broken by a narrower terminal nobody knows how many there are: clear it."""
        before = self.console.width
        self._measure()
        if self._live is not None and self.console.width < before:
            self._hide()
            self.console.clear()

    def _measure(self) -> None:
        """What the terminal is, whatever COLUMNS says: that was right when somebody exported it."""
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(2)
            if columns and lines:
                self.console.size = ConsoleDimensions(columns, lines)

    def _is_ours(self) -> bool:
        try:
            return os.tcgetpgrp(2) == os.getpgrp()
        except OSError:  # not the terminal that controls us: nobody stops us
            return True

    def _print(self, line: str) -> None:
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + _LINE_EVERY
            with contextlib.suppress(OSError):
                print(line, file=sys.stderr, flush=True)

    def _show(self, what: "RenderableType") -> None:
        with contextlib.suppress(OSError):  # EIO: the terminal has been closed; a signal says so too
            if self._live is None:
                self._live = self._new_live()
                self._live.start()
            # The terminal's echo of a key, ^Z, comes after it, and must not begin a new line.
            self._live.update(Constrain(what, self.console.width - len("^Z") - 1), refresh=True)

    def _new_live(self) -> Live:
        """What is printed meanwhile comes above it, if it goes to this terminal."""
        stdout = sys.stdout.isatty()
        return Live(console=self.console, auto_refresh=False, transient=True, redirect_stdout=stdout)

    def _hide(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

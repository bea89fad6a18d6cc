# SPDX-License-Identifier: MIT
"""How a running server is shown: its events as lines or as JSON, its figures live, the table at the end.

rich is imported only where it draws: what a server has loaded makes its forks dearer.
"""

import contextlib
import json
import logging
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

import click

from ipckit._unpatched import os, time
from ipckit.servers import Server, ServerStats
from ipckit.servers.listening import endpoint
from ipckit.servers.loop import READ
from ipckit.servers.server import event

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["JsonCommand", "LiveView", "introduce", "show", "tell_events"]

_REFRESH = 0.5  # seconds


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # before Python 3.11 it takes no parameter
    _StreamHandler = logging.StreamHandler


# --- events --------------------------------------------------------------------------------------


def tell_events(*, verbose: bool, as_json: bool = False) -> None:
    """Print the events of servers: the warnings or all on standard error; all as JSON on standard output."""
    handler = _Printer("stdout" if as_json else "stderr")
    if as_json:
        handler.setFormatter(_JsonLines())
        logging.captureWarnings(True)  # of Python's; they would go to standard error
    elif verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(logging.Formatter("ipckit: %(message)s"))
    logging.basicConfig(handlers=[handler])
    if verbose or as_json:
        logging.getLogger("ipckit").setLevel(logging.INFO)


class _Printer(_StreamHandler):
    """Prints on a standard stream, whatever that is at the moment: rich's, above what it draws.

    Who reads it may go away, and the terminal be closed: the server goes on.
    """

    def __init__(self, name: str) -> None:
        logging.Handler.__init__(self)
        self._stream = name

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        found: TextIO = getattr(sys, self._stream)
        return found

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _JsonLines(logging.Formatter):
    """An object a line: time (seconds since the epoch), event, level, text, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 6),
            "event": getattr(record, "event", "message"),
            "level": record.levelname.lower(),
            "text": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class JsonCommand(click.Command):
    """A command that with --json tells its errors as it tells all else, from the first wrong option on."""

    def make_context(
        self, info_name: str | None, args: "list[str]", *more: Any, **extra: Any
    ) -> click.Context:
        as_json = "--json" in args
        if as_json:
            tell_events(verbose=True, as_json=True)  # before a service is loaded that warns of something
        with _errors_told(as_json=as_json):
            return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _errors_told(as_json=ctx.params["as_json"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def _errors_told(*, as_json: bool) -> Iterator[None]:
    try:
        yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except click.ClickException as error:
        if not as_json:
            raise
        _tell_failure(error.format_message())
        raise click.exceptions.Exit(error.exit_code) from None
    except Exception as error:
        if not as_json:
            raise
        _tell_failure(f"{type(error).__name__}: {error}", exc_info=True)
        raise click.exceptions.Exit(1) from None


def _tell_failure(text: str, *, exc_info: bool = False) -> None:
    extra = {"event": "failed", "fields": {}}
    logging.getLogger("ipckit.servers").error("%s", text, exc_info=exc_info, extra=extra)


def introduce(listeners: "list[socket.socket]", log: str | None, *, as_json: bool) -> None:
    """Say where the server is and where its log goes; with a log on standard output not there."""
    text = "logging nothing" if log is None else f"logging to {'standard output' if log == '-' else log}"
    if as_json:  # the server's own event says where it listens
        event("logging", "%s", text, log=log)
        return
    for listener in listeners:
        click.echo(f"listening on {endpoint(listener)}", err=log == "-")
    click.echo(text, err=log == "-")


# --- while it runs -------------------------------------------------------------------------------


class LiveView:
    """The figures of a server on the terminal, twice a second, inside a with-statement.

    Drawn from the server's own loop: a thread for it would make each fork one of a threaded process.
    """

    def __init__(self, server: Server) -> None:
        from ipckit.cli.screen import Screen

        self._server = server
        self._screen = Screen()
        self._began = time.monotonic()
        self._last = (self._began, server.stats())
        server.loop.every(_REFRESH, self._refresh)

    def __enter__(self) -> "LiveView":
        self._screen.__enter__()
        self._server.loop.watch(self._screen, READ, self._respond)
        return self

    def __exit__(self, *exc: object) -> None:
        self._screen.__exit__()

    def _respond(self, _: int) -> None:
        self._screen.respond()
        self._refresh()

    def _refresh(self) -> None:
        (before, old), (now, new) = self._last, (time.monotonic(), self._server.stats())
        if now > before:
            self._last = (now, new)
            figures = _Figures(old, new, now - before, now - self._began)
            self._screen.draw(figures.table(self._screen.console.width), figures.line())


class _Figures:
    """What was done from *old* to *new*, in so many seconds."""

    def __init__(self, old: ServerStats, new: ServerStats, seconds: float, age: float) -> None:
        self._old, self._new, self._seconds = old, new, seconds
        self._title = f"{new.model}, process {os.getpid()}, {age:,.0f} s"

    def _rate(self, what: str) -> str:
        return f"{(getattr(self._new, what) - getattr(self._old, what)) / self._seconds:,.0f}"

    def line(self) -> str:
        new = self._new
        told = f"{self._title}: {new.open:,} connections, {new.echoes:,} echoes, {new.bytes:,} bytes"
        return f"{told}, the log waits: {self._trouble()}" if self._trouble() else told

    def _trouble(self) -> str:
        return os.strerror(self._new.log.error) if self._new.log and self._new.log.error else ""

    def table(self, width: int) -> "Table":
        """Without lines between its columns, so that 60 columns of the terminal are enough."""
        from rich import box
        from rich.table import Table

        new, table = self._new, Table("", "now", "per second", "in all", box=box.SIMPLE_HEAD, show_edge=False)
        table.title, table.title_justify = self._title, "left"
        for column in table.columns[1:]:
            column.justify = "right"
            column.min_width = 11 if width > 60 else 10 if width > 56 else None  # wide enough not to jump
        table.add_row("connections", f"{new.open:,}", self._rate("connections"), f"{new.connections:,}")
        table.add_row("echoes", "", self._rate("echoes"), f"{new.echoes:,}")
        table.add_row("bytes", "", self._rate("bytes"), f"{new.bytes:,}")
        if new.log:
            table.add_row("log, bytes", f"{new.log.backlog:,} to go", "", f"{new.log.bytes:,}")
        table.add_row("workers", f"{new.workers:,}", "", f"{new.replaced:,} replaced")
        if self._trouble():
            table.caption = f"the log waits: {self._trouble()}"
        return table


# --- at the end ----------------------------------------------------------------------------------


def show(stats: ServerStats, *, as_json: bool) -> None:
    """What was done, on standard error: a table, or the last event."""
    if as_json:
        event("served", "served %d connections", stats.connections, **asdict(stats))
    else:
        # EIO: the terminal has been closed. For a broken pipe rich would end the program, with status 1.
        with contextlib.suppress(OSError, SystemExit):
            _show_table(stats)
    for stream in (sys.stdout, sys.stderr):
        _settle(stream)


def _settle(stream: TextIO) -> None:
    """What can't be written to a terminal that has been closed must not fail once more at the exit."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _show_table(stats: ServerStats) -> None:
    from rich.console import Console
    from rich.table import Table

    ends = ", ".join(f"{count} {how}" for how, count in sorted(stats.ends.items()))
    table = Table("", "count", title="served", title_justify="left")
    table.columns[1].justify = "right"
    table.add_row("connections", f"{stats.connections:,}" + (f" ({ends})" if ends else ""))
    table.add_row("echoes", f"{stats.echoes:,}")
    table.add_row("bytes", f"{stats.bytes:,}")
    if stats.log:
        table.add_row("log messages", f"{stats.log.messages:,}")
        table.add_row("logger restarts", f"{stats.log.restarts:,}")
    if stats.replaced:
        table.add_row("workers replaced", f"{stats.replaced:,}")
    Console(stderr=True).print(table)

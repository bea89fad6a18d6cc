# SPDX-License-Identifier: MIT
"""How a running server is shown: its events as lines or as JSON, its figures live, the table at the end.

rich is imported only where it draws: what a server has loaded makes its forks dearer.
"""

import contextlib
import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, TextIO

from ipckit._unpatched import os, time
from ipckit.servers import Server, ServerStats
from ipckit.servers.server import event

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LiveView", "show", "tell_events"]

_REFRESH = 0.5  # seconds


# --- events --------------------------------------------------------------------------------------


def tell_events(*, verbose: bool, as_json: bool) -> None:
    """Print the events of servers on standard error: the warnings, or all, or all as JSON lines."""
    handler = logging.StreamHandler()
    if as_json:
        handler.setFormatter(_JsonLines())
    elif verbose:
        handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(logging.Formatter("ipckit: %(message)s"))
    logging.basicConfig(handlers=[handler])
    if verbose or as_json:
        logging.getLogger("ipckit").setLevel(logging.INFO)


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


def _print_events_to(stream: TextIO) -> None:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(stream)


# --- while it runs -------------------------------------------------------------------------------


class LiveView:
    """The figures of a server on the terminal, twice a second, inside a with-statement.

    Drawn from the server's own loop: a thread for it would make each fork one of a threaded process.
    """

    def __init__(self, server: Server) -> None:
        from rich.console import Console
        from rich.live import Live

        self._server = server
        self._began = time.monotonic()
        self._last = (self._began, server.stats())
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        server.loop.every(_REFRESH, self._refresh)

    def __enter__(self) -> "LiveView":
        self._live.start()
        _print_events_to(sys.stderr)  # now one that writes above the figures
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()
        _print_events_to(sys.stderr)

    def _refresh(self) -> None:
        (before, old), (now, new) = self._last, (time.monotonic(), self._server.stats())
        self._last = (now, new)
        with contextlib.suppress(OSError):  # EIO: the terminal has been closed; a signal says so too
            self._live.update(_figures(old, new, now - before, now - self._began), refresh=True)


def _figures(old: ServerStats, new: ServerStats, seconds: float, age: float) -> "Table":
    from rich.table import Table

    title = f"{new.model}, process {os.getpid()}, {age:,.0f} s"
    table = Table("", "now", "per second", "in all", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify, column.min_width = "right", 14  # wide enough not to jump

    def rate(what: str) -> str:
        return f"{(getattr(new, what) - getattr(old, what)) / seconds:,.0f}"

    table.add_row("connections", f"{new.open:,}", rate("connections"), f"{new.connections:,}")
    table.add_row("echoes", "", rate("echoes"), f"{new.echoes:,}")
    table.add_row("bytes", "", rate("bytes"), f"{new.bytes:,}")
    if new.log:
        table.add_row("log backlog, bytes", f"{new.log.backlog:,}", "", f"{new.log.bytes:,}")
    table.add_row("workers", f"{new.workers:,}", "", f"{new.replaced:,} replaced")
    if new.log and new.log.error:
        table.caption = f"the log waits: {os.strerror(new.log.error)}"
    return table


# --- at the end ----------------------------------------------------------------------------------


def show(stats: ServerStats, *, as_json: bool) -> None:
    """What was done, on standard error: a table, or the last event."""
    if as_json:
        event("served", "served %d connections", stats.connections, **asdict(stats))
    else:
        with contextlib.suppress(OSError):  # EIO: the terminal has been closed
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

# SPDX-License-Identifier: MIT
"""What all commands have in common; each adds itself to the group."""

import contextlib
import re
import socket
from collections.abc import Iterator
from typing import Any

import click

from ipckit import __version__, _arguments
from ipckit._unpatched import os
from ipckit.sockets import check_path


class Seconds(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """As every room takes them, "inf" too."""

    name = "seconds"

    def __init__(self, *, zero: bool = False) -> None:
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = _arguments.seconds(float(value), "it")
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        if seconds == 0 and not self._zero:
            self.fail(f"{value!r} is not more than 0 seconds.", param, ctx)
        return seconds


class SocketPath(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """What a socket file can be called."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return check_path(value)
        except (ValueError, OSError) as error:
            self.fail(str(getattr(error, "filename", None) or error), param, ctx)


class Mode(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Permissions, in octal as chmod(1) takes them."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not re.fullmatch("(0o)?0*[0-7]{1,3}", value):
            self.fail(f"{value!r} is no mode in octal, as 660.", param, ctx)
        return int(value, 8)


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.?)", re.DOTALL)
_KNOWN = dict(zip(b"abefnrtv\\\"'", b"\a\b\x1b\f\n\r\t\v\\\"'", strict=True))


class Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes, with the usual backslash escapes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        try:
            return _ESCAPE.sub(self._byte, os.fsencode(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}.", param, ctx)

    def _byte(self, escape: "re.Match[bytes]") -> bytes:
        what = escape[1]
        if what[:1] == b"x" and len(what) == 3:
            return bytes([int(what[1:], 16)])
        if what[:1].isdigit() and int(what, 8) <= 255:
            return bytes([int(what, 8)])
        if len(what) == 1 and what[0] in _KNOWN:
            return bytes([_KNOWN[what[0]]])
        raise ValueError(f"{escape[0].decode(errors='replace')} is no escape; a backslash itself is \\\\")


class Refused(click.ClickException):
    """Options that do not go together: one line, and the exit status of wrong usage."""

    exit_code = 2


# HOST:PORT, [::1]:PORT, and HOST PORT.
_HOST_PORT = re.compile(r"(\[\S+\]|[^\s:]+):([0-9]{1,5})|(\S+) ([0-9]{1,5})")


def server_address(words: "tuple[str, ...]", unix: str | None) -> "tuple[str, int] | str":
    """Where a server is: of HOST:PORT, HOST PORT or --unix PATH."""
    if unix is not None and not words:
        return unix
    if unix is None and (found := _HOST_PORT.fullmatch(" ".join(words))):
        host, port = (found[1] or found[3]).strip("[]"), int(found[2] or found[4])
        if 1 <= port <= 65535:
            return host, port
    given = " ".join([*words, *([f"--unix {unix}"] if unix else [])]) or "nothing"
    raise Refused(
        f"name the server as HOST:PORT, with a port from 1 to 65535, or by --unix PATH; not {given}"
    )


def shown(address: "tuple[str, int] | str") -> str:
    """As it is written on the command line."""
    if isinstance(address, str):
        return address
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def examples(*lines: str) -> str:
    """The end of a command's --help."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """An error of the kernel becomes one line and exit status 1."""
    try:
        yield
    except socket.gaierror as error:
        raise click.ClickException(f"{what}: {error.strerror}") from None
    except OSError as error:
        named = str(error.filename)
        if what in named:  # the error says more about it
            what = named
        raise click.ClickException(f"{what}: {error.strerror or error}") from None


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples("ipckit demo", "ipckit serve --help"),
)
@click.version_option(__version__, prog_name="ipckit")
def group() -> None:
    """Inter-process communication: servers with a log, and the named objects of this machine.

    `ipckit demo` shows a server at work. `ipckit COMMAND --help` tells the options of a command.
    """

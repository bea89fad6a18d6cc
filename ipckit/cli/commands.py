# SPDX-License-Identifier: MIT
"""What all commands have in common; each adds itself to the group."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import click

from ipckit import __version__, _arguments
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ipckit")
def group() -> None:
    """Inter-process communication: servers with a log, and the named objects of this machine.

    `ipckit demo` shows a server at work. `ipckit COMMAND --help` tells the options of a command.
    """

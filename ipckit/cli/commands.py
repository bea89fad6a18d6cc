# SPDX-License-Identifier: MIT
"""What all commands have in common; each adds itself to the group."""

import contextlib
import socket
from collections.abc import Iterator

import click

from ipckit import __version__


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

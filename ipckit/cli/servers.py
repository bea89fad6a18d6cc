# SPDX-License-Identifier: MIT
"""serve, client, demo: the options; what they do stands in the rooms."""

import contextlib
import importlib
import importlib.util
import logging
import resource
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.core import ParameterSource

from ipckit import _procfs
from ipckit._unpatched import os, signal, threading, time
from ipckit.cli import serving
from ipckit.cli.commands import (
    Mode,
    Refused,
    Seconds,
    SocketPath,
    examples,
    group,
    one_line,
    server_address,
    shown,
)
from ipckit.limits import raise_descriptors
from ipckit.messagelog import MessageLog
from ipckit.servers import MODELS, Server, Service, listening, server_class
from ipckit.servers import client as split_client
from ipckit.servers.server import event, taken_signals
from ipckit.servers.terminal import terminal
from ipckit.signals import SelfPipe, sigaction

_SPARE_DESCRIPTORS = 16  # for what is open for a moment only
_SECONDS = Seconds()
_COUNT = click.IntRange(min=1)
_PORT = click.IntRange(0, 65535)

_LOG_MOMENT = 1.0

_SERVER_OPTIONS: "list[tuple[str, Any, str, str]]" = [
    ("--max-connections", _COUNT, "N", "Connections at a time; further ones wait."),
    (
        "--idle-timeout",
        _SECONDS,
        "SECONDS",
        "Close a connection whose client is silent, or does not read its answer, for so long.",
    ),
    ("--total-timeout", _SECONDS, "SECONDS", "Close a connection that is so old, whatever its client does."),
    ("--max-output", _COUNT, "BYTES", "--service: the longest answer."),
    ("--max-children", _COUNT, "N", "fork, prefork: processes at a time."),
    ("--min-spare", _COUNT, "N", "prefork: idle processes kept ready."),
    ("--max-spare", _COUNT, "N", "prefork: idle processes that may stay."),
    (
        "--max-requests",
        click.IntRange(min=0),
        "N",
        "prefork: connections after which a process is replaced; 0: never.",
    ),
]

_Command = Callable[..., None]


def _log_option(text: str, kind: click.Path) -> Callable[[_Command], _Command]:
    return click.option(
        "-l",
        "--log",
        "path",
        type=kind,
        default="echomsg.txt",
        show_default=True,
        help=text,
    )


def _service_class(value: str) -> "type[Service]":
    """MODULE:CLASS or FILE.py:CLASS, a subclass of ipckit.servers.Service."""
    with _ended_by(signal.SIGTERM, signal.SIGINT):
        return _loaded_class(value)


@contextlib.contextmanager
def _ended_by(*numbers: int) -> Iterator[None]:
    """What is done in a with-statement may take any time, or wait for ever: such a signal ends it, and us."""
    came: list[int] = []

    def end(number: int, _: object) -> None:
        came.append(number)
        raise SystemExit(0)

    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.enter_context(sigaction(number, end))
        try:
            yield
        finally:
            if came:  # even if something has caught it
                raise SystemExit(0)


def _loaded_class(value: str) -> "type[Service]":
    where, _, name = value.rpartition(":")
    if not (where and name):
        raise _bad_service(f"{value!r} is not MODULE:CLASS or FILE.py:CLASS")
    try:
        module = _load_file(where) if where.endswith(".py") else _load_module(where)
    except Exception as error:  # whatever the module does when it is loaded
        raise _bad_service(f"{where!r} can't be loaded: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Service)):
        what = "nothing" if found is None else repr(found)
        raise _bad_service(f"{value!r} must be a subclass of ipckit.servers.Service, and is {what}")
    return found


def _bad_service(why: str) -> click.BadParameter:
    return click.BadParameter(why, param_hint="'--service'")


def _load_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    return importlib.import_module(name)


def _load_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _server_options(command: _Command) -> _Command:
    """The options that are keywords of the model's class; one that isn't given keeps its default there."""
    defaults = Server.options()
    for option, kind, unit, text in reversed(_SERVER_OPTIONS):
        default = defaults.get(_keyword(option))
        told = text if default is None else f"{text}  [default: {default}]"
        command = click.option(option, type=kind, metavar=unit, help=told)(command)
    return command


def _keyword(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


@group.command(
    cls=serving.JsonCommand,
    epilog=examples(
        "ipckit serve                                      127.0.0.1:7007, logging to echomsg.txt",
        "ipckit serve -m epoll -H 0.0.0.0 -H :: -p 7 -v    every address, each event told",
        "ipckit serve -u echo.sock --unix-mode 660 --live",
        "ipckit serve --durability synced --format record -l echo.log",
        "ipckit serve --no-log --service upper.py:Upper --json | jq .text",
    ),
)
@click.option(
    "-m",
    "--model",
    type=click.Choice(list(MODELS)),
    default="fork",
    show_default=True,
    help="fork: a process for each client; prefork: a pool of processes; thread: a thread for each; "
    "iterative: one client after the other; select, poll, epoll, asyncio: one process for all at once.",
)
@click.option(
    "-H",
    "--host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="An address to listen on, or a name: all addresses that it has; also several times. "
    "[default: 127.0.0.1, unless --unix or --activated is given]",
)
@click.option(
    "-p",
    "--port",
    type=_PORT,
    metavar="PORT",
    default=7007,
    show_default=True,
    help="The port to listen on; 0 takes a free one and prints it.",
)
@click.option(
    "-u",
    "--unix",
    type=SocketPath(),
    multiple=True,
    metavar="PATH",
    help="A socket file to listen on; also several times.",
)
@click.option(
    "--unix-mode",
    type=Mode(),
    metavar="MODE",
    help="Permissions of the socket files, as of chmod; who may write may connect.  [default: 600]",
)
@click.option("--activated", is_flag=True, help="Listen on the sockets that systemd passes (LISTEN_FDS).")
@_log_option(
    "The file to which each message is appended; a server has one of its own. -: standard output, for a "
    "journal or a pipe.",
    click.Path(dir_okay=False, allow_dash=True),
)
@click.option("--no-log", is_flag=True, help="Log no messages.")
@click.option(
    "--format",
    type=click.Choice(["raw", "record"]),
    default="raw",
    show_default=True,
    help="Of the log. raw: the bytes as they came; record: a JSON line for each message.",
)
@click.option(
    "--durability",
    type=click.Choice(["none", "written", "synced"]),
    default="none",
    show_default=True,
    help="An echo waits until its message is in the pipe to the log (none), in the file (written), "
    "on the disk (synced).",
)
@click.option(
    "-s",
    "--service",
    metavar="WHERE:CLASS",
    help="Serve by this class in place of the echo: MODULE:CLASS or FILE.py:CLASS, a subclass of "
    "ipckit.servers.Service.",
)
@_server_options
@click.option(
    "--keyboard/--no-keyboard",
    default=None,
    help="iterative, select, poll, epoll: read lines from standard input too; quit ends the server. "
    "[default: if it is a terminal]",
)
@click.option(
    "--uvloop/--no-uvloop",
    default=None,
    help="asyncio: run on uvloop instead of asyncio's own loop.  [default: if it is installed]",
)
@click.option(
    "--stop-timeout",
    type=_SECONDS,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="When the server is stopped, connections may go on for so long.",
)
@click.option("-v", "--verbose", is_flag=True, help="Print each event to standard error.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print all there is to say as JSON objects, one a line, on standard output: events, errors, and the "
    "figures at the end.",
)
@click.option("--live", is_flag=True, help="Show the figures on the terminal while it runs.")
def serve(
    model: str,
    hosts: "tuple[str, ...]",
    port: int,
    unix: "tuple[str, ...]",
    unix_mode: int | None,
    activated: bool,
    path: str,
    no_log: bool,
    format: str,
    durability: str,
    keyboard: bool | None,
    stop_timeout: float,
    verbose: bool,
    as_json: bool,
    live: bool,
    **options: Any,
) -> None:
    """Run the message-logging echo server.

    It sends each client's bytes back, and writes them to the log first. Ctrl-C or SIGTERM ends it: no new
    clients, the bytes that have come are logged and echoed, then it exits with status 0. SIGHUP opens
    the log again after a rotation, SIGUSR1 prints the figures so far.
    """
    if live and (as_json or not sys.stderr.isatty()):
        raise Refused("--live needs standard error to be a terminal, without --json")
    if unix_mode is not None and not unix:
        raise Refused("--unix-mode is of the socket files of --unix, and there are none")
    if as_json and keyboard:
        raise Refused("--keyboard prints what is typed on standard output, which is all JSON with --json")
    if no_log:
        _refuse_log_options()
    elif path == "-":
        _refuse_for_stdout(durability, as_json)
    given = _check(model, options, keyboard, live or as_json)
    _name_processes()
    if not as_json:
        serving.tell_events(verbose=verbose)
    terminal()  # as it is at the start
    # From here on a signal is kept until the server takes it: none comes too early.
    with SelfPipe(taken_signals()), contextlib.ExitStack() as stack:
        if "service" in given:
            given["service"] = _service_class(given["service"])
        listeners = [
            stack.enter_context(each) for each in _listeners(hosts, port, unix, activated, unix_mode)
        ]
        log = None if no_log else _open_log(path, format, durability)
        server = _made(model, listeners, log, given)
        _make_room(server)
        serving.introduce(listeners, None if no_log else path, as_json=as_json)
        with serving.LiveView(server) if live else contextlib.nullcontext():
            _run(server, stop_timeout)
        stats = server.stats()
        finished = log is None or _close_log(log, server.deadline)
        if not _is_kept_by_a_thread():
            for number in taken_signals():  # asked twice: we end anyway, and with status 0
                sigaction(number, signal.SIG_IGN)
    serving.show(stats, as_json=as_json)
    if not finished:
        raise click.exceptions.Exit(1)


def _close_log(log: MessageLog, deadline: float) -> bool:
    """Within the stop's time; a moment there is in any case, as clients may have used all of it."""
    try:
        log.close(timeout=max(_LOG_MOMENT, deadline - time.monotonic()))
    except OSError as error:
        event("log unfinished", "%s", str(error), level=logging.ERROR, unwritten=log.unwritten)
        return False
    return True


def _is_kept_by_a_thread() -> bool:
    """Whether the interpreter will wait for a thread of the service: then it must help to ask twice."""
    return any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def _refuse_log_options() -> None:
    """With --no-log. It takes back a --log, of an alias perhaps; but these promise something of the log."""
    context = click.get_current_context()
    for name in ("durability", "format"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise Refused(f"--{name} says how to log, and --no-log that nothing is logged")


def _refuse_for_stdout(durability: str, as_json: bool) -> None:
    """Of --log -: who reads it rotates and syncs it; a file is locked and rotated by its name."""
    if as_json:
        raise Refused("--log - and --json both want standard output")
    if durability == "synced":
        raise Refused("--durability synced is of a file; nothing is synced through standard output")
    if stat.S_ISREG(os.fstat(1).st_mode):
        raise Refused(
            "--log - is for a pipe or a journal, and standard output is a file: name it, by --log FILE"
        )


def _name_processes() -> None:
    """So that ps and top tell them apart: the supervisor, and what it forks in Python, its workers."""
    _name_process("ipckit-serve")
    os.register_at_fork(after_in_child=lambda: _name_process("ipckit-worker"))


def _name_process(name: str) -> None:
    with contextlib.suppress(OSError), open(_procfs.path("self/comm"), "w") as comm:  # no /proc: no name
        comm.write(name)


def _make_room(server: Server) -> None:
    """Raise the soft RLIMIT_NOFILE to what that many connections need, and say if the hard one is lower.

    Processes that a service starts inherit it: hardly any minds, but what calls select(2) must not be given
    descriptors beyond 1,023, and gets them only if it opens so many.
    """
    wanted, _ = raise_descriptors(server.max_connections + _SPARE_DESCRIPTORS)
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if wanted > allowed != resource.RLIM_INFINITY:
        event(
            "limited",
            "%d connections need %d descriptors, and the hard RLIMIT_NOFILE is %d: further ones wait; "
            "raise it with ulimit -Hn %d (systemd: LimitNOFILE), or ask for fewer",
            *(server.max_connections, wanted, allowed, wanted),
            level=logging.WARNING,
            needed=wanted,
            allowed=allowed,
        )


def _check(model: str, options: "dict[str, Any]", keyboard: bool | None, quiet: bool) -> "dict[str, Any]":
    """Those that were given, for the class of *model*; a usage error names one that it lacks."""
    given = {name: value for name, value in options.items() if value is not None}
    known = server_class(model).options()
    if keyboard is None and "keyboard" in known:
        keyboard = not quiet and os.isatty(0)
    if keyboard is not None:
        given["keyboard"] = 0 if keyboard else None
    for name in given:
        if name not in known:
            having = ", ".join(other for other in MODELS if name in server_class(other).options())
            option = "--" + name.replace("_", "-")
            raise Refused(f"{option} is no option of the model {model}, only of {having or 'none'}")
    return given


def _listeners(
    hosts: "tuple[str, ...]", port: int, unix: "tuple[str, ...]", activated: bool, mode: int | None
) -> "Iterator[socket.socket]":
    """Open them one after the other."""
    if activated:
        with one_line("--activated"):
            given = listening.activated()
        if not given:
            raise click.ClickException("--activated: there are no sockets of a service manager (LISTEN_FDS)")
        yield from given
    for host in hosts or ([] if unix or activated else ["127.0.0.1"]):
        with one_line(f"{host}:{port}"):
            at_host = listening.listen_all(host, port)
        yield from at_host
    for path in unix:
        with one_line(path):
            listener = listening.listen_unix(path, **({} if mode is None else {"mode": mode}))
        yield listener


def _open_log(path: str, format: str, durability: str) -> MessageLog:
    with one_line(path):
        return MessageLog(1 if path == "-" else path, format=format, durability=durability)


def _made(
    model: str, listeners: "list[socket.socket]", log: MessageLog | None, given: "dict[str, Any]"
) -> Server:
    try:
        return server_class(model)(listeners, log, **given)
    except (ValueError, ModuleNotFoundError) as error:
        if log is not None:
            log.close()
        raise Refused(str(error)) from None


def _run(server: Server, stop_timeout: float) -> None:
    try:
        server.serve(stop_timeout=stop_timeout)
    except RuntimeError as error:  # its workers, or its logger, die again and again
        logging.getLogger("ipckit.servers").info("the server failed", exc_info=True)
        raise click.ClickException(str(error)) from None


@group.command(
    epilog=examples(
        "ipckit client 127.0.0.1:7007",
        "echo hello | ipckit client localhost:7007",
        "ipckit client -u echo.sock < file > answer",
    )
)
@click.argument("address", nargs=-1, metavar="[HOST:PORT]")
@click.option("-u", "--unix", type=SocketPath(), metavar="PATH", help="A Unix socket, in place of HOST:PORT.")
def client(address: "tuple[str, ...]", unix: str | None) -> None:
    """Talk to a server at HOST:PORT, or at a Unix socket.

    One process sends the lines that you type, another one prints the answers. A line that is only q or
    Q, or the end of the input, ends the sending; the rest of the answer still comes. Standard input may be
    a file or a pipe.

    Exit status: 0 if the server closed after its answers; 1, and one line that says why, if nobody is
    there or the server broke the connection, or closed it when fewer lines (and bytes) had come back than
    were sent; 2 for wrong usage, 130 after Ctrl-C.
    """
    where = server_address(address, unix)
    try:
        with one_line(shown(where)):
            split_client.run(*([where] if isinstance(where, str) else where))
    except KeyboardInterrupt:
        raise click.exceptions.Exit(128 + 2) from None


@group.command(epilog=examples("ipckit demo", "ipckit demo --clients 32 --messages 10000 -l /tmp/demo.txt"))
@click.option(
    "--clients",
    type=click.IntRange(1, 64),
    metavar="N",
    default=8,
    show_default=True,
    help="Clients at a time.",
)
@click.option(
    "--messages",
    type=click.IntRange(1),
    metavar="N",
    default=2000,
    show_default=True,
    help="Messages of each.",
)
@_log_option("The file to which each message is appended.", click.Path(dir_okay=False))
def demo(clients: int, messages: int, path: str) -> None:
    """Run the echo server with real clients, verify its log.

    The server listens on a free port of 127.0.0.1, the clients are processes of their own, all at once. Exit
    status 0 if each message came back, and stands in the log whole, once, in the order of its client.
    """
    from ipckit.cli import demo as demonstration

    with one_line(path):
        raise click.exceptions.Exit(demonstration.run(clients, messages, path))

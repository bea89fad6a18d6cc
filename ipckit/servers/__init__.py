# SPDX-License-Identifier: MIT
"""Runnable servers, one file per model, all with the same service, log, options and promises.

::

    from ipckit.servers import EchoService, listen, serve

    with listen("127.0.0.1", 7007) as listener, ipckit.MessageLog("echomsg.txt") as log:
        serve(EchoService, listener, model="epoll", log=log)
"""

import importlib
import socket
from collections.abc import Sequence
from typing import Any

from ipckit.messagelog import MessageLog
from ipckit.servers.listening import listen
from ipckit.servers.server import Server, ServerStats
from ipckit.servers.service import EchoService, Service

__all__ = [
    "MODELS", "EchoService", "Server", "ServerStats", "Service", "listen", "serve", "server", "server_class",
]  # fmt: skip

MODELS: "dict[str, str]" = {
    "fork": "ForkServer",
    "prefork": "PreforkServer",
    "thread": "ThreadServer",
    "iterative": "IterativeServer",
    "select": "SelectServer",
    "poll": "PollServer",
    "epoll": "EpollServer",
    "asyncio": "AsyncioServer",
}
"""the models, each a module of this package, and the class in it"""


def server_class(model: str) -> "type[Server]":
    """The class of that model; its ``options()`` tell what it takes. Raises: ValueError for no model."""
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, not {model!r}")
    found: type[Server] = getattr(importlib.import_module(f"ipckit.servers.{model}"), MODELS[model])
    return found


def server(
    model: str,
    listeners: "socket.socket | Sequence[socket.socket]",
    log: MessageLog | None = None,
    **options: Any,
) -> Server:
    """A server of that model; its options are those of its class, most of them those of Server.

    Raises: ValueError for an unknown model or a bad value; TypeError for an option that the model lacks.
    """
    return server_class(model)(listeners, log, **options)


def serve(
    service: "type[Service]",
    listeners: "socket.socket | Sequence[socket.socket]",
    *,
    model: str = "fork",
    log: MessageLog | None = None,
    stop_timeout: float | None = 10.0,
    **options: Any,
) -> ServerStats:
    """Run *service* under *model* until SIGTERM or SIGINT; what was done until then.

    Blocks; see Server and ``Server.serve()`` for the options, the signals and the promises.
    """
    running = server(model, listeners, log, service=service, **options)
    running.serve(stop_timeout=stop_timeout)
    return running.stats()

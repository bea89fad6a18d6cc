# SPDX-License-Identifier: MIT
"""The verbs that every endpoint has, written down for type checkers and for ``isinstance``.

An endpoint is what messages go into or come out of: an end of a pipe, of a duplex channel, a System V
or POSIX queue. A function that takes a ``Sender`` or a ``Receiver`` works with each of them:

    def forward(source: Receiver, target: Sender) -> None:
        for message in source:
            target.send(message)

What the verbs promise is the same everywhere, and one test body holds all endpoints to it. What one
of them can do beyond (the type or the priority of a message, say) are further keywords.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Buffer
else:
    Buffer = object

__all__ = ["Endpoint", "Receiver", "Sender"]


@runtime_checkable
class Endpoint(Protocol):
    """What all have. ``with endpoint:`` closes it at the end, as for files."""

    @property
    def closed(self) -> bool:
        """Was close() called here?"""

    def close(self) -> None:
        """Close this handle in this process; again does nothing. Every verb raises Closed afterwards."""

    def fileno(self) -> int:
        """For select, poll, epoll and asyncio; of a receiver: readable when a receive would not block."""


@runtime_checkable
class Sender(Endpoint, Protocol):
    """What messages go into.

    ``timeout`` is seconds for the whole operation, None for ever, 0 not at all; when it runs out that
    is a TimeoutError (ETIMEDOUT), and the message was not sent and never will be. A message that can
    never be sent is OSError EMSGSIZE, before anything was.
    """

    def send(self, data: Buffer, *, timeout: float | None = None) -> None:
        """Send one message; block while there is no room."""

    def send_many(self, messages: Iterable[Buffer], *, timeout: float | None = None) -> int:
        """Send messages in order, with few system calls. Returns: how many were sent."""

    async def asend(self, data: Buffer, *, timeout: float | None = None) -> None:
        """As send(), for asyncio. A cancelled send was not sent."""


@runtime_checkable
class Receiver(Endpoint, Protocol):
    """What messages come out of. The end of a stream, where there is one, is EOFError."""

    def recv(self, *, timeout: float | None = None) -> bytes:
        """Receive one message; block until there is one."""

    def recv_into(self, buffer: Buffer, *, timeout: float | None = None) -> int:
        """As recv(), into *buffer*. Returns: bytes of the message.

        OSError EMSGSIZE if *buffer* is too small: the message stays for the next receive.
        """

    def recv_many(self, max: int | None = None, *, timeout: float | None = None) -> list[bytes]:
        """Receive what is ready, at least one message and at most *max*; block until there is one."""

    async def arecv(self, *, timeout: float | None = None) -> bytes:
        """As recv(), for asyncio. A cancelled receive has taken nothing."""

    def __iter__(self) -> Iterator[bytes]:
        """Message after message, until the end of the stream."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """As iter(), for asyncio."""

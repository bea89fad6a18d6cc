# SPDX-License-Identifier: MIT
"""The messages of a log in record format, read back from its file."""

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ipckit._unpatched import os

__all__ = ["Record", "records"]


@dataclass(frozen=True)
class Record:
    """One message of a log in record format."""

    time: float
    """seconds since the epoch"""
    peer: str
    connection: int
    """0 if none was given"""
    data: bytes


def records(
    path: "str | os.PathLike[str]", *, on_torn: Callable[[int, bytes], object] | None = None
) -> Iterator[Record]:
    """The messages of a log in record format, in order; the file may grow meanwhile.

    Lines that are no whole record (power was lost, or one was split: see ``reopen()``) are passed
    over; *on_torn* is called with their line number and bytes.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            record = _parse(line)
            if record is not None:
                yield record
            elif line != b"\n" and on_torn is not None:
                on_torn(number, line)


def _parse(line: bytes) -> Record | None:
    try:
        fields = json.loads(line)
        if "text" in fields:
            data = fields["text"].encode()
        else:
            data = base64.b64decode(fields["base64"], validate=True)
        whole = len(data) == fields["length"]
        return Record(fields["time"], fields["peer"], fields.get("connection", 0), data) if whole else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None

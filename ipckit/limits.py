# SPDX-License-Identifier: MIT
"""The kernel's limits on what has a name: what they are here, and how to change them.

A limit that is reached shows as an errno that means many things ("no space left on device" for one
message queue too many). The rooms ask here, and say which limit it was. See proc_sys_kernel(5),
mq_overview(7).
"""

from contextlib import suppress
from pathlib import Path

__all__ = ["advice", "value"]

# One file with four numbers; the names are those of semget(2).
_SEMAPHORES = ("kernel.sem.semmsl", "kernel.sem.semmns", "kernel.sem.semopm", "kernel.sem.semmni")


def _numbers(file: str) -> list[int]:
    with suppress(OSError, ValueError):
        return [int(word) for word in Path("/proc/sys", *file.split(".")).read_text().split()]
    return []


def value(name: str) -> int | None:
    """The limit *name* (``kernel.msgmax``, ``kernel.sem.semmni``, ...) as it is now for this process.

    Returns: the number; None if the kernel has no such limit or doesn't show it here.
    """
    if name in _SEMAPHORES:
        numbers = _numbers("kernel.sem")
        return numbers[_SEMAPHORES.index(name)] if len(numbers) == len(_SEMAPHORES) else None
    numbers = _numbers(name)
    return numbers[0] if numbers else None


def _command(name: str, wanted: int) -> str:
    if name not in _SEMAPHORES:
        return f"sysctl -w {name}={wanted}"
    numbers = _numbers("kernel.sem") or [0] * len(_SEMAPHORES)
    numbers[_SEMAPHORES.index(name)] = wanted
    return f'sysctl -w kernel.sem="{" ".join(map(str, numbers))}"'


def advice(name: str, wanted: int) -> str:
    """What an error says of the limit *name* when it should be *wanted*, with the command."""
    now = value(name)
    if now is None:
        return f"the limit {name} can't be read here"
    return f"{name} is {now}; raise it with: {_command(name, wanted)}"

# SPDX-License-Identifier: MIT
"""POSIX message queues, semaphores and shared memory by name. See mq_overview(7).

A name is a slash and 1 to 255 bytes without another one. What it names lives in the kernel until
``unlink()`` or the end of the boot, whoever ends; ``close()`` and ``with`` only let go of it. Other
programs, in C or with the ``posix_ipc`` package, find the same things under the same names.
"""

from ipckit.posix.memory import SharedMemory as SharedMemory
from ipckit.posix.queue import Message as Message
from ipckit.posix.queue import MessageQueue as MessageQueue
from ipckit.posix.queue import QueueStat as QueueStat
from ipckit.posix.semaphore import Semaphore as Semaphore

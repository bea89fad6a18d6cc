# SPDX-License-Identifier: MIT
"""System V message queues, shared memory and semaphores. See sysvipc(7)."""

from ipckit.sysv.keys import ftok as ftok
from ipckit.sysv.memory import SegmentStat as SegmentStat
from ipckit.sysv.memory import SharedMemory as SharedMemory
from ipckit.sysv.memory import in_use as in_use
from ipckit.sysv.queue import Message as Message
from ipckit.sysv.queue import MessageQueue as MessageQueue
from ipckit.sysv.queue import QueueStat as QueueStat
from ipckit.sysv.semaphore import Semaphore as Semaphore
from ipckit.sysv.semaphore import SemaphoreStat as SemaphoreStat

# SPDX-License-Identifier: MIT
"""ipckit: inter-process communication for Python on Unix.

The rooms, lowest first; each imports only from those before it:

    errors      Closed, PeerDied, Corrupt; every other error is the OSError that errno means
    wait        timeouts as one deadline per operation; waiting for a descriptor
    endpoints   the verbs that all have which messages go into or come out of
    vectored    readv, writev and variants that move everything
    sockets     flags, time limits, urgent data, descriptors, credentials, socket files
    pipes       framed messages and bytes over one pipe and over two; splice, tee
    signals     sigaction with its flags and siginfo, signals by descriptor, sigqueue
    process     fork, children held by a pidfd, the reaper
    limits      the kernel's limits on named objects, and how to raise them
    registry    who made and who uses what has a name in the kernel
    memory      shared memory: a sealed memfd, or a named file; views pin it; numpy
    sync        locks, events, semaphores, conditions, barriers that survive kill -9
    ring        a ring of messages in shared memory: the engine
    channel     two ends over shared memory that notice each other's death
    queues      many producers, many consumers, crash-safe; multiprocessing.Queue's methods
    sysv        System V message queues, shared memory and semaphores, by key or id
    posix       POSIX message queues, semaphores and shared memory, by name
    inventory   what has a name on this machine, who uses it, what is orphaned
    messagelog  many writers, one pipe, a logger child, a file
    load        load on an echo server: latencies, and every byte checked
    servers     servers in every classical model, services of your own, the split client
    cli         ipckit serve, client, demo, load, ls, rm, gc, doctor

What most programs need is at the top: ``ipckit.Queue``. So is each room, by its name: ``ipckit.queues``. But
``ipckit.channel`` is the function; ``from ipckit.channel import ...`` reaches that room.
"""

import typing as _typing
from importlib import import_module as _import_module

from ipckit import sockets as sockets
from ipckit.channel import Channel as Channel
from ipckit.channel import ChannelStats as ChannelStats
from ipckit.channel import Listener as Listener
from ipckit.channel import channel as channel
from ipckit.channel import connect as connect
from ipckit.errors import Closed as Closed
from ipckit.errors import Corrupt as Corrupt
from ipckit.errors import PeerDied as PeerDied
from ipckit.memory import SharedMemory as SharedMemory
from ipckit.messagelog import Append as Append
from ipckit.messagelog import LogStats as LogStats
from ipckit.messagelog import LogWriter as LogWriter
from ipckit.messagelog import MessageLog as MessageLog
from ipckit.messagelog import Record as Record
from ipckit.messagelog import Reopening as Reopening
from ipckit.messagelog import records as records
from ipckit.pipes import duplex as duplex
from ipckit.pipes import pipe as pipe
from ipckit.pipes import splice as splice
from ipckit.pipes import tee as tee
from ipckit.process import Child as Child
from ipckit.process import ExitStatus as ExitStatus
from ipckit.process import Reaper as Reaper
from ipckit.process import die_with_parent as die_with_parent
from ipckit.process import fork as fork
from ipckit.process import fork_native as fork_native
from ipckit.process import wait_any as wait_any
from ipckit.queues import Ended as Ended
from ipckit.queues import JoinableQueue as JoinableQueue
from ipckit.queues import Queue as Queue
from ipckit.queues import QueueStats as QueueStats
from ipckit.queues import ShutDown as ShutDown
from ipckit.ring import Ring as Ring
from ipckit.ring import RingStats as RingStats
from ipckit.signals import SA_NOCLDSTOP as SA_NOCLDSTOP
from ipckit.signals import SA_NOCLDWAIT as SA_NOCLDWAIT
from ipckit.signals import SA_NODEFER as SA_NODEFER
from ipckit.signals import SA_RESETHAND as SA_RESETHAND
from ipckit.signals import SA_RESTART as SA_RESTART
from ipckit.signals import Action as Action
from ipckit.signals import SelfPipe as SelfPipe
from ipckit.signals import SigInfo as SigInfo
from ipckit.signals import SignalQueue as SignalQueue
from ipckit.signals import blocked as blocked
from ipckit.signals import pending as pending
from ipckit.signals import sigaction as sigaction
from ipckit.signals import sigqueue as sigqueue
from ipckit.sync import Barrier as Barrier
from ipckit.sync import BoundedSemaphore as BoundedSemaphore
from ipckit.sync import BrokenBarrierError as BrokenBarrierError
from ipckit.sync import Condition as Condition
from ipckit.sync import Event as Event
from ipckit.sync import Lock as Lock
from ipckit.sync import RLock as RLock
from ipckit.sync import Semaphore as Semaphore
from ipckit.vectored import preadv as preadv
from ipckit.vectored import pwritev as pwritev
from ipckit.vectored import readv as readv
from ipckit.vectored import readv_exact as readv_exact
from ipckit.vectored import writev as writev
from ipckit.vectored import writev_all as writev_all

# pyproject.toml reads it here.
__version__ = "0.1.0"

# Of no use to most programs, so each is imported when it is first asked for.
_LATER = {"cli", "endpoints", "inventory", "limits", "load", "posix", "servers", "sysv"}

if _typing.TYPE_CHECKING:
    from ipckit import cli as cli
    from ipckit import endpoints as endpoints
    from ipckit import inventory as inventory
    from ipckit import limits as limits
    from ipckit import load as load
    from ipckit import posix as posix
    from ipckit import servers as servers
    from ipckit import sysv as sysv
else:

    def __getattr__(name):
        if name in _LATER:
            return _import_module(f"ipckit.{name}")
        raise AttributeError(f"module 'ipckit' has no attribute {name!r}")

    def __dir__():
        return sorted(globals().keys() | _LATER)

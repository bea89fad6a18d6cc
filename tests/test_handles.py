"""Every handle: at each descriptor that is missing while it is made, at the exit, and where it may go."""

import copy
import errno
import gc
import importlib
import inspect
import os
import pickle
import pkgutil
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, open_descriptors, tidy_registries

import ipckit
from ipckit import posix, sockets, sysv
from ipckit._handles import finalizer
from ipckit.load import Load
from ipckit.messagelog import MessageLog
from ipckit.servers import MODELS, server
from ipckit.servers.listening import listen, listen_unix
from ipckit.servers.server import Server
from ipckit.servers.service import Service


class Talk(Service):
    def received(self, piece):
        return piece


def served(model, service):
    with listen() as listener:
        return server(model, listener, service=service)


def watched():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return sockets.UrgentWatcher(listener)


NAME = f"half-{os.getpid()}"
MAKERS = {
    "pipe": ipckit.pipe,
    "duplex": ipckit.duplex,
    "channel": ipckit.channel,
    "Listener": lambda: ipckit.Listener("listener.sock"),
    "Ring": lambda: ipckit.Ring(1 << 14),
    "Queue": ipckit.Queue,
    "JoinableQueue": ipckit.JoinableQueue,
    "named Queue": lambda: ipckit.Queue.open(NAME),
    "SharedMemory": lambda: ipckit.SharedMemory(4096),
    "named SharedMemory": lambda: ipckit.SharedMemory(4096, name=NAME, create=True),
    "Lock": ipckit.Lock,
    "RLock": ipckit.RLock,
    "Semaphore": ipckit.Semaphore,
    "BoundedSemaphore": ipckit.BoundedSemaphore,
    "Event": ipckit.Event,
    "Condition": ipckit.Condition,
    "Barrier": lambda: ipckit.Barrier(2),
    "MessageLog": lambda: MessageLog("a.log"),
    "synced MessageLog": lambda: MessageLog("b.log", durability="synced", format="record"),
    "SelfPipe": lambda: ipckit.SelfPipe([signal.SIGUSR1]),
    "SignalQueue": lambda: ipckit.SignalQueue([signal.SIGUSR1]),
    "Child": lambda: ipckit.fork(lambda: 0),
    "Reaper": ipckit.Reaper,
    "UrgentWatcher": watched,
    "Load": lambda: Load(("127.0.0.1", 1), connections=2, messages=1),
    "sysv.MessageQueue": lambda: sysv.MessageQueue(create=True),
    "sysv.SharedMemory": lambda: sysv.SharedMemory(size=4096, create=True),
    "sysv.Semaphore": lambda: sysv.Semaphore(create=True),
    "posix.MessageQueue": lambda: posix.MessageQueue(f"/{NAME}", create=True),
    "posix.SharedMemory": lambda: posix.SharedMemory(f"/{NAME}", 4096, create=True),
    "posix.Semaphore": lambda: posix.Semaphore(f"/{NAME}", create=True),
    "listen_unix": lambda: listen_unix("unix.sock"),
    **{f"server {model}": (lambda model=model: served(model, Talk)) for model in MODELS},
}


def left():
    tidy_registries()
    return open_descriptors(), sorted(os.listdir(".")), sorted(os.listdir("/dev/shm"))


def closed(made):
    """With its name or id, too."""
    for thing in made if isinstance(made, tuple) else (made,):
        if isinstance(thing, Server):
            close_unserved(thing)
        if isinstance(thing, ipckit.Child):
            thing.wait()
        forget_name(thing)
        if hasattr(thing, "close"):
            thing.close()


def forget_name(thing):
    if hasattr(thing, "remove"):
        thing.remove()
    elif getattr(thing, "name", None):
        thing.unlink()


def close_unserved(server):
    server.loop.close()
    for name in ("_reader", "_writer", "_reaper"):
        if hasattr(server, name):
            getattr(server, name).close()


OPENERS = {
    "named Queue": lambda made: ipckit.Queue.open(made.name, create=False),
    "named SharedMemory": lambda made: ipckit.SharedMemory(name=made.name),
    "posix.MessageQueue": lambda made: posix.MessageQueue(made.name),
    "posix.SharedMemory": lambda made: posix.SharedMemory(made.name),
    "posix.Semaphore": lambda made: posix.Semaphore(made.name),
    "sysv.MessageQueue": lambda made: sysv.MessageQueue.from_id(made.id),
    "sysv.SharedMemory": lambda made: sysv.SharedMemory.from_id(made.id),
    "sysv.Semaphore": lambda made: sysv.Semaphore.from_id(made.id),
    "SharedMemory": lambda made: made.readonly_fd(),
    "MessageLog": lambda made: made.reopen(),
}


def made_or_refused(make):
    """What it makes; None if a descriptor was missing."""
    try:
        return make()
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    return None


@pytest.mark.parametrize("what", MAKERS)
def test_whichever_descriptor_is_missing_nothing_is_left_or_said(what, forked, tmp_path):
    def target(ready):
        os.chdir(tmp_path)
        closed(MAKERS[what]())  # what is imported or opened once for all, and the files of logs
        closed(with_ever_more_descriptors(MAKERS[what]))

    assert forked(target).wait() == 0


@pytest.mark.parametrize("what", OPENERS)
def test_nor_is_it_when_something_is_opened(what, forked, tmp_path):
    def target(ready):
        os.chdir(tmp_path)
        made = MAKERS[what]()
        opened = with_ever_more_descriptors(lambda: OPENERS[what](made))
        if hasattr(opened, "close"):
            opened.close()
        closed(made)

    assert forked(target).wait() == 0


def with_ever_more_descriptors(make):
    """What is made at last; nothing was left, nor said, before."""
    complaints = []

    def complain(told):
        if "unclosed event loop" not in str(told.exc_value):  # asyncio says it of its own one, half made
            complaints.append(f"{told.object!r}: {told.exc_value!r}")

    sys.unraisablehook = complain
    gc.collect()
    gc.freeze()  # so that what is collected below is soon looked through
    highest = max(open_descriptors())
    while os.open("/dev/null", os.O_RDONLY) < highest:  # so that none below it is free
        pass
    before = left()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    made, missing = None, 0
    while made is None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0]) + 1 + missing, limits[1]))
        made = made_or_refused(make)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        gc.collect()
        assert complaints == [], missing
        assert made is not None or left() == before, missing
        missing += 1
    return made


def classes():
    modules = [ipckit] + [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(ipckit.__path__, "ipckit.")
        if found.name != "ipckit.__main__"
    ]
    found = {item for module in modules for item in vars(module).values() if isinstance(item, type)}
    return sorted((item for item in found if hasattr(item, "__del__")), key=lambda item: item.__qualname__)


def test_an_object_that_was_never_begun_goes_silently(monkeypatch):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    begun = 0
    for kind in classes():
        if not inspect.isabstract(kind):
            kind.__new__(kind)
            begun += 1
    gc.collect()
    assert complaints == []
    assert begun > 15


def test_what_lives_at_the_exit_goes_silently(tmp_path):
    """In a module that is older than ipckit's, whose globals are None by then."""
    code = """if True:
    import os, sys
    sys.path[:0] = sys.argv[1:]
    import test_handles
    class Last:
        def __del__(self, write=os.write):
            write(1, b"the last")
    os.held = [make() for make in test_handles.MAKERS.values()] + [Last()]
    for thing in os.held:
        test_handles.forget_name(thing)
    """
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, here], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "the last")


def test_what_fails_before_the_exit_is_told(monkeypatch):
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    kind = type("Kind", (), {"__del__": finalizer(lambda self: 1 / 0)})
    kind()
    gc.collect()
    assert [told.exc_type for told in complaints] == [ZeroDivisionError]
    complaints.clear()


ELSEWHERE = {
    "pipe", "duplex", "MessageLog", "synced MessageLog",  # by descriptors that multiprocessing hands out
    "server asyncio",  # uvloop keeps a pipe for good
}  # fmt: skip
BY_NAME = {what for what in MAKERS if "." in what or "named" in what}


@pytest.mark.parametrize("what", sorted(MAKERS.keys() - ELSEWHERE - BY_NAME))
def test_what_can_not_be_pickled_or_copied_says_what_it_is_and_why(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = MAKERS[what]()
    thing = made[0] if isinstance(made, tuple) else made
    for way in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError) as caught:
            way(thing)
        assert type(thing).__name__ in str(caught.value)
        if what != "listen_unix":  # whose text is the standard library's
            why = "only for a process of multiprocessing that is being started|works in its process and those"
            assert re.search(why, str(caught.value))
    closed(made)
    del made, thing, caught
    gc.collect()


def test_a_subclass_has_its_own_name():
    class Mine(ipckit.RLock):
        pass

    with pytest.raises(TypeError, match=r"<Mine\(owner=None\)> can be pickled only for a process"):
        pickle.dumps(Mine())

# SPDX-License-Identifier: MIT
"""Modules of the standard library as Python made them, whoever has changed them since.

``patch_all()`` of gevent, and its like, take ``select.epoll`` away, and put functions of an event loop in
the place of ``os.close``, ``os.fork``, ``time.sleep`` and the locks of ``threading``. What ipckit waits for
is in the kernel, what it closes must be closed when it goes on, and nobody else may reap its children: so
the rooms take these modules from here, and it makes no difference which was imported first.

``socket`` is not among them: the sockets of such a library serve, if they are told to be non-blocking.
"""

import os
import select
import signal
import threading
import time
from types import BuiltinFunctionType, ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["is_patched", "os", "select", "signal", "socketpair", "threading", "time"]

if TYPE_CHECKING:
    from _socket import socketpair
else:
    import _signal
    import _thread
    import posix
    from _socket import socketpair

    def _original(module: ModuleType, probe: str) -> ModuleType:
        """The module *module*, made once more if its function *probe* is no longer the one in C."""
        if isinstance(getattr(module, probe), BuiltinFunctionType):
            return module
        import importlib.util

        again = importlib.util.module_from_spec(module.__spec__)
        module.__spec__.loader.exec_module(again)
        return again

    def _seen(module: ModuleType, **originals: Any) -> ModuleType:
        """The module *module*, with *originals* for what it has under their names."""
        view = ModuleType(module.__name__, module.__doc__)
        vars(view).update(vars(module) | originals)
        return view

    def _handler(given: Any) -> Any:
        return signal.Handlers(given) if isinstance(given, int) else given

    def _signal_signal(signum: int, handler: Any) -> Any:
        return _handler(_signal.signal(signum, int(handler) if isinstance(handler, int) else handler))

    _locks = _original(_thread, "allocate_lock")
    time = _seen(_original(time, "sleep"))
    select = _seen(_original(select, "select"))
    os = _seen(
        os, **{name: value for name, value in vars(posix).items() if name != "environ" and name[:2] != "__"}
    )
    threading = _seen(threading, Lock=_locks.allocate_lock, RLock=_locks.RLock, get_ident=_locks.get_ident)
    signal = _seen(
        signal,
        signal=_signal_signal,
        getsignal=lambda signum: _handler(_signal.getsignal(signum)),
        set_wakeup_fd=_signal.set_wakeup_fd,
    )


def is_patched() -> bool:
    """Whether ``threading.Thread`` makes something else than threads at this moment."""
    import _thread

    return not isinstance(_thread.start_new_thread, BuiltinFunctionType)

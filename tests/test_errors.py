import errno

import pytest

import ipckit
from ipckit.errors import check


def test_success_is_returned():
    assert check(0) == 0
    assert check(7, "x") == 7


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EAGAIN, BlockingIOError),
        (errno.ETIMEDOUT, TimeoutError),
        (errno.EPIPE, BrokenPipeError),
        (errno.EACCES, PermissionError),
        (errno.EEXIST, FileExistsError),
        (errno.ECHILD, ChildProcessError),
        (errno.EMSGSIZE, OSError),
    ],
)
def test_errno_picks_the_class(number, kind):
    with pytest.raises(kind) as caught:
        check(-number, "the object")
    assert type(caught.value) is kind
    assert caught.value.errno == number
    assert caught.value.filename == "the object"
    assert "the object" in str(caught.value)


def test_an_object_is_named_by_its_str():
    with pytest.raises(OSError, match="descriptor 3|3"):
        check(-errno.EBADF, 3)


def test_states_without_an_errno_are_kinds_of_what_users_catch():
    assert issubclass(ipckit.Closed, ValueError)
    assert issubclass(ipckit.PeerDied, EOFError)
    assert issubclass(ipckit.Corrupt, RuntimeError)

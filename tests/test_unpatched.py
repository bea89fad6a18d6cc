"""The standard library that the rooms see, whatever has been put in its place."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ipckit
from ipckit import _unpatched

SCRIPT = Path(__file__).parent / "under_gevent.py"
ROOMS = sorted(Path(ipckit.__file__).parent.rglob("*.py"))
PATCHED = {"os", "select", "signal", "threading", "time"}


def imported(source):
    found = [node.names for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)]
    return {name.name for names in found for name in names}


def test_what_others_patch_the_rooms_take_from_here():
    wrong = {str(room): found for room in ROOMS if (found := imported(room.read_text()) & PATCHED)}
    assert len(wrong) == 1, f"import from ipckit._unpatched: {wrong}"
    assert _unpatched.__file__ in wrong


def test_where_nothing_is_patched_it_is_the_same():
    assert _unpatched.os.close is os.close
    assert _unpatched.os.environ is os.environ
    assert _unpatched.os.path is os.path
    assert not _unpatched.is_patched()


@pytest.mark.skipif(not importlib.util.find_spec("gevent"), reason="gevent is not installed")
@pytest.mark.parametrize("order", ["before", "after"])
def test_under_gevent(order, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", SCRIPT, order, tmp_path], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all"


@pytest.mark.skipif(not importlib.util.find_spec("gevent"), reason="gevent is not installed")
def test_a_child_that_gevent_reaped_is_told():
    code = """if True:
    from gevent import monkey; monkey.patch_all()
    import gevent, ipckit, os, subprocess
    subprocess.run(["true"])
    child = ipckit.fork(lambda: 4)
    while os.path.exists(f"/proc/{child.pid}"):
        gevent.sleep(0.001)
    try:
        child.wait()
    except ChildProcessError as error:
        print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert "was reaped by somebody else" in done.stdout, done.stdout

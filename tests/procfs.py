"""What the kernel shows of processes and threads in /proc: whether one sleeps, and how often it woke up."""

import signal
from pathlib import Path


def task(pid, tid=None):
    return Path(f"/proc/{pid}/task/{tid or pid}")


def state(pid, tid=None):
    """A letter, as of ps(1): R runs or could, S sleeps, T is stopped, Z is a zombie."""
    return task(pid, tid).joinpath("stat").read_text().rpartition(")")[2].split()[0]


def asleep(pid, tid=None, within=""):
    """Does it sleep in a function of the kernel whose name contains *within*?"""
    return state(pid, tid) == "S" and within in task(pid, tid).joinpath("wchan").read_text()


def wakeups(pid, tid=None):
    """How often it slept and woke up again. Being preempted by others does not count."""
    status = task(pid, tid).joinpath("status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def stopped_while(child, condition):
    """Stop the forked child while *condition* holds, and still does afterwards. False if it ended before."""
    while state(child.pid) != "Z":
        if condition():
            child.kill(signal.SIGSTOP)
            while state(child.pid) not in "TZ":
                pass
            if state(child.pid) == "T" and condition():
                return True
            child.kill(signal.SIGCONT)
    return False

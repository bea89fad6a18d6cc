from pathlib import Path

from ipckit import limits


def test_a_limit_is_what_the_kernel_says():
    assert limits.value("kernel.msgmax") == int(Path("/proc/sys/kernel/msgmax").read_text())


def test_the_four_of_one_file():
    numbers = [int(word) for word in Path("/proc/sys/kernel/sem").read_text().split()]
    names = ("semmsl", "semmns", "semopm", "semmni")
    assert [limits.value(f"kernel.sem.{name}") for name in names] == numbers


def test_what_the_kernel_does_not_have():
    assert limits.value("kernel.no_such_thing") is None
    assert limits.advice("kernel.no_such_thing", 5) == "the limit kernel.no_such_thing can't be read here"


def test_the_advice_is_a_command():
    now = limits.value("kernel.msgmax")
    assert limits.advice("kernel.msgmax", 10000) == (
        f"kernel.msgmax is {now}; raise it with: sysctl -w kernel.msgmax=10000"
    )


def test_the_advice_for_one_of_four_keeps_the_others():
    msl, mns, opm, _ = (int(word) for word in Path("/proc/sys/kernel/sem").read_text().split())
    text = limits.advice("kernel.sem.semmni", 64000)
    assert text.endswith(f'raise it with: sysctl -w kernel.sem="{msl} {mns} {opm} 64000"')

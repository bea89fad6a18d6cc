"""The engine killed, spoilt, modelled and mutated: ring and lock survive whatever ends a process.

By default a slice of each proof; the whole with IPCKIT_PROOF=1 (``make proof``). Each program prints
what it counted; ``make proof`` shows it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WHOLE = os.environ.get("IPCKIT_PROOF") == "1"
ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "build" / "proof"
TELLS = re.compile("(stepkill|stepspoil|killloop|scribble|mutants|LIVES|skipped|multiprocessing|.* flags )")

# Serial: what is asked of the engine is to go on within a second of a process's own running.
pytestmark = [pytest.mark.proof, pytest.mark.serial, pytest.mark.timeout(1500 if WHOLE else 600)]


def slice_of(whole, part):
    return whole if WHOLE else part


def start(*command, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT} | options
    return subprocess.Popen([str(word) for word in command], **options)


def finish(process):
    """The lines that the program printed last; it must end well, or say that it can't be run here."""
    output, _ = process.communicate()
    if process.returncode == 77:
        pytest.skip(output.strip())
    assert process.returncode == 0, output[-4000:]
    print("\n" + "\n".join(line for line in output.splitlines() if TELLS.match(line)))
    return output


def number_of(what, output):
    return sum(int(found) for found in re.findall(rf"(\d+) {what}", output))


# --- killed --------------------------------------------------------------------------------------


def test_killed_after_every_instruction():
    """Four at a time, because what they mostly do is wait for somebody to be woken."""
    every = slice_of(["-e", "1"], ["-e", "61"])
    parts = [start(PROGRAMS / "stepkill", *every, "-p", part, "-n", 4) for part in range(4)]
    output = "\n".join(finish(part) for part in parts)
    totals = re.findall(r"stepkill: (\d+) points.* ([\d.]+) ms", output)
    points, worst = sum(int(points) for points, _ in totals), max(float(ms) for _, ms in totals)
    print(f"step-kill: {points} points; worst kill to next delivery {worst} ms")
    assert len(totals) == 4 and points > slice_of(20_000, 300)


def test_killed_again_and_again_under_load():
    kills = slice_of(10_000, 500)
    output = finish(start(PROGRAMS / "killloop", "-k", kills, "-s", os.environ.get("SEED", "1")))
    assert number_of("kills,", output) == kills


@pytest.mark.skipif(not WHOLE, reason="what the standard library does is shown by make proof only")
def test_the_same_load_on_the_queue_of_multiprocessing():
    finish(start(sys.executable, ROOT / "tests/proof/killed_queue.py"))


# --- spoilt --------------------------------------------------------------------------------------


def test_everything_rewritten_by_another_process():
    for seed in range(slice_of(4, 1)):
        finish(start(PROGRAMS / "scribble", "-t", slice_of(10, 3), "-s", seed + 1))


@pytest.mark.skipif(not WHOLE, reason="make proof only")
def test_spoilt_after_every_instruction():
    finish(start(PROGRAMS / "stepspoil", 2))


@pytest.mark.parametrize("target", ["fuzz_attach", "fuzz_recv"])
def test_fuzz(target, tmp_path):
    if not (PROGRAMS / target).exists():
        pytest.skip("no clang: the fuzz targets were not built")
    seconds = os.environ.get("FUZZ_SECONDS", slice_of(30, 4))
    options = [f"-max_total_time={seconds}", "-timeout=60", "-max_len=1200", "-verbosity=0"]
    output = finish(
        start(PROGRAMS / target, *options, "-print_final_stats=1", cwd=tmp_path, stdout=subprocess.PIPE)
    )
    runs = int(re.findall(r"number_of_executed_units: (\d+)", output)[0])
    print(f"{target}: {runs} runs, 0 findings")
    assert runs


@pytest.mark.parametrize("sanitizers", ["asan", "tsan"])
@pytest.mark.skipif(not WHOLE, reason="make asan, make tsan, make proof")
def test_under_sanitizers(sanitizers):
    # Their slices do here: the whole has ten times the instructions, and is run without them.
    environ = {name: value for name, value in os.environ.items() if name != "IPCKIT_PROOF"}
    finish(start("make", "--no-print-directory", sanitizers, env=environ))


# --- modelled and mutated ------------------------------------------------------------------------


def test_model():
    if not shutil.which("spin"):
        pytest.skip("no spin: the model was not checked")
    small = "-DSENDERS=1 -DMESSAGES=2"
    for model in slice_of(["-DSENDERS=2 -DMESSAGES=1", "-DSENDERS=1 -DMESSAGES=3"], [small]):
        output = finish(start("make", "--no-print-directory", "model", f"MODEL={model}"))
        print("model ({}): {} states, 0 errors".format(model, re.findall(r"(\S+) states, stored", output)[0]))


@pytest.mark.skipif(not WHOLE, reason="make mutants, make proof")
def test_mutants():
    finish(start(sys.executable, ROOT / "tests/proof/mutants.py"))

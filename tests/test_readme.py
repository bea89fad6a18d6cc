"""The README, run as a stranger would: each block in the environment that `make demo` makes, in an empty folder."""

import contextlib
import importlib.metadata
import os
import pkgutil
import re
import select
import signal
import socket
import subprocess
import venv
from itertools import chain, pairwise
from pathlib import Path

import pytest
from conftest import PATIENCE
from packaging.requirements import Requirement
from pages import ROOT, assert_prints, consoles, run, scripts

import ipckit

README = ROOT / "README.md"
PORT = "7007"  # of the README; the tests take a free one
CONSOLES = consoles(README)
OF_THE_CLONE = [block for block in CONSOLES if block[0].line.startswith(("make ", "pip "))]
# A block with a server is followed by one with its clients.
SERVERS = [pair for pair in pairwise(CONSOLES) if pair[0][0].line.startswith("ipckit serve ")]
OTHERS = [block for block in CONSOLES if block not in (*OF_THE_CLONE, *chain(*SERVERS))]


# --- the environment of `make demo`: '.[cli]' and nothing else ------------------------------------


def needed(name, extras=("",)):
    """The distributions that pip installs for it."""
    found = {name}
    for line in importlib.metadata.requires(name) or []:
        wanted = Requirement(line)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
            found |= needed(wanted.name, ("", *wanted.extras))
    return found


def link(name, site):
    """What is installed of that distribution here, there too."""
    distribution = importlib.metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
    for top in tops:
        (site / top).symlink_to(distribution.locate_file(top))


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """bin/ of an environment of its own, without what only developers have."""
    folder = tmp_path_factory.mktemp("demo") / "venv"
    venv.EnvBuilder(symlinks=True).create(folder)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "ipckit").symlink_to(Path(ipckit.__file__).parent)  # -e: as it is here
    for name in needed("ipckit-unix", ("", "cli")) - {"ipckit-unix"}:
        link(name, site)
    command = folder / "bin" / "ipckit"
    command.write_text(f"#!{folder}/bin/python\nfrom ipckit.cli import main\nmain()\n")
    command.chmod(0o755)
    return folder / "bin"


@pytest.fixture
def variables(environment):
    """Those of the process, with that environment in front of PATH, and nothing that adds to it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PATH": f"{environment}:{os.environ['PATH']}"}


def test_the_environment_has_what_a_user_has_and_no_more(variables, tmp_path):
    asked = "import importlib.util as u; print(*(n for n in {} if u.find_spec(n)))"
    names = ["ipckit", "cffi", "click", "rich", "numpy", "pytest", "psutil", "sysv_ipc", "tests"]
    ran = run(["python", "-c", asked.format(names)], tmp_path, variables)
    assert ran == (0, "ipckit cffi click rich\n", "")


# --- the scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code, output, method", list(scripts(README)))
def test_a_block_runs(code, output, method, variables, tmp_path):
    assert output is not None, "the README shows what each block prints"
    assert_prints("python", code, output, method, tmp_path, variables)


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def port():
    """A port that nobody else gets: bound, which a server may be too, and never listened on."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield str(keeper.getsockname()[1])


@contextlib.contextmanager
def started(line, shown, folder, variables):
    """The server of that line, from when it has said what is shown until Ctrl-C, which it ends with 0 by."""
    server = subprocess.Popen(
        ["sh", "-c", f"exec {line}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=variables,
        start_new_session=True,
    )
    with server:
        try:
            assert said(server, len(shown)) == shown
            yield
            server.send_signal(signal.SIGINT)
            _, complaint = server.communicate(timeout=PATIENCE)
            assert server.returncode == 0, complaint
        finally:
            if server.returncode is None:
                os.killpg(server.pid, signal.SIGKILL)


def said(server, size):
    """So many characters of what it says."""
    got = b""
    while len(got) < size:
        readable, _, _ = select.select([server.stdout], [], [], PATIENCE)
        assert readable, f"it said only {got!r}"
        piece = os.read(server.stdout.fileno(), size - len(got))
        assert piece, f"it ended after {got!r}: {server.communicate()[1]!r}"
        got += piece
    return got.decode()


@pytest.mark.parametrize("server, clients", SERVERS, ids=lambda block: block[0].line.split()[-1])
def test_a_server_and_the_commands_for_another_terminal(server, clients, port, tmp_path, variables):
    [[line, shown]] = server
    with started(line.replace(PORT, port), shown.replace(PORT, port), tmp_path, variables):
        for line, shown in clients:
            status, printed, complaint = run(line.replace(PORT, port), tmp_path, variables)
            assert status == 0, complaint
            assert not shown or printed == shown


def test_the_commands_about_the_kernel(tmp_path, variables):
    [block] = OTHERS
    for line, _ in block:
        status, _, complaint = run(line, tmp_path, variables)
        assert status == 0, complaint


def test_make_demo_runs_the_demo_which_verifies_its_log(tmp_path, variables):
    """The making of the environment apart, which is the fixture's."""
    status, would_run, complaint = run(["make", "-n", "demo"], ROOT)
    assert (status, "bin/ipckit demo" in would_run) == (0, True), complaint
    status, printed, complaint = run("ipckit demo", tmp_path, variables)
    assert (status, printed.splitlines()[-1], complaint) == (0, "verified", "")


def test_the_commands_of_the_clone_are_these():
    assert [command.line for block in OF_THE_CLONE for command in block] == [
        "make demo",
        "pip install '.[cli]'",
    ]
    assert "cli" in importlib.metadata.metadata("ipckit-unix").get_all("Provides-Extra")


# --- the rest -------------------------------------------------------------------------------------


def test_the_map_has_a_line_for_each_room():
    rooms = {room.name for room in pkgutil.iter_modules(ipckit.__path__) if not room.name.startswith("_")}
    rows = re.findall(r"^\| \[`(\w+)`\]\(docs/reference/(\w+)\.md\) \|", README.read_text(), re.MULTILINE)
    assert all(room == page for room, page in rows)
    assert sorted(room for room, _ in rows) == sorted(rooms)


def test_the_commands_of_the_tutorial_are_among_those_of_the_readme():
    shown = {command for block in CONSOLES for command in block}
    commands = [command for block in consoles(ROOT / "docs" / "tutorial.md") for command in block]
    assert len(commands) == 3
    assert set(commands) <= shown


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]*))?\)", README.read_text())
    assert links
    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        heads = re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.MULTILINE)
        assert not anchor or anchor in {head.lower().replace(" ", "-") for head in heads}, anchor

# SPDX-License-Identifier: MIT
"""ls, rm, gc, doctor: how the named objects and the limits of this machine are shown."""

import json
import pwd
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

from ipckit import inventory, limits, registry
from ipckit._unpatched import os, time
from ipckit.cli.commands import examples, group, one_line
from ipckit.inventory import Object
from ipckit.limits import Limit

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_WIDE = 130  # columns from which on everything about an object fits beside it
_VERY_WIDE = 195  # and about a limit, whose command isn't broken then
_COLOURS = {"live": "green", "orphan": "red", "foreign": "dim", "unknown": "yellow"}

_json = click.option(
    "--json", "as_json", is_flag=True, help="For scripts: JSON, sizes in bytes, times in seconds."
)


# --- words for numbers ----------------------------------------------------------------------------


def _plain(text: str) -> str:
    """A name may hold anything; what would upset a terminal is shown as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    number, units = float(count), iter("KMGTPE")
    unit = next(units)
    while (number := number / 1024) >= 999.5:
        unit = next(units)
    text = f"{number:.1f}" if number < 99.95 else f"{number:.0f}"
    return f"{text.removesuffix('.0')} {unit}iB"


def _ago(moment: float | None) -> str:
    """How long ago, in the largest unit that fits."""
    if moment is None:
        return "-"
    seconds = max(0, int(time.time() - moment))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _size(obj: Object) -> str:
    if obj.kind == "sysv-semaphore":
        return f"{obj.size} sem"
    return _bytes(obj.size)


def _key(obj: Object) -> str:
    if obj.key is None:
        return "-"
    return f"0x{obj.key & 0xFFFFFFFF:08x}" if obj.key else "private"


# --- ls -------------------------------------------------------------------------------------------


def _console() -> "Console":
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)  # names are shown as they are
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200  # a pipe has no width: a line an object is best for grep
    return console


def _as_dict(obj: Object) -> dict[str, Any]:
    return {
        "id": obj.id,
        "kind": obj.kind,
        "ident": obj.ident,
        "key": obj.key,
        "uid": obj.uid,
        "owner": _user(obj.uid),
        "mode": f"{obj.mode:04o}",
        "size": obj.size,
        "users": obj.users,
        "creator": obj.creator,
        "created": obj.created,
        "active": obj.active,
        "verdict": obj.verdict,
        "why": obj.why,
    }


def _verdict(obj: Object) -> "Text":
    from rich.text import Text

    return Text(obj.verdict, _COLOURS[obj.verdict])


def _id(obj: Object, why: bool) -> "Text":
    from rich.text import Text

    return Text(_plain(obj.id)).append(f"\n  {_plain(obj.why)}" if why else "", "dim")


# Heading, content, and whether it is shown where there is little room.
_COLUMNS: tuple[tuple[str, Callable[[Object], "str | Text"], bool], ...] = (
    ("key", _key, False),
    ("owner", lambda obj: _user(obj.uid), True),
    ("mode", lambda obj: f"{obj.mode:04o}", False),
    ("size", _size, True),
    ("users", lambda obj: str(obj.users), True),
    ("age", lambda obj: _ago(obj.created), True),
    ("last", lambda obj: _ago(obj.active), False),
    ("verdict", _verdict, True),
    ("why", lambda obj: _plain(obj.why), False),
)
_NUMBERS = ("size", "users", "age", "last")


def _show_objects(found: Iterable[Object]) -> None:
    from rich.table import Table

    console = _console()
    wide = console.width >= _WIDE
    columns = [(name, content) for name, content, always in _COLUMNS if wide or always]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", overflow="fold")  # never cut: it is what rm takes
    for name, _ in columns:
        table.add_column(
            name,
            justify="right" if name in _NUMBERS else "left",
            no_wrap=name != "why",
            overflow="fold",
        )
    for obj in found:
        table.add_row(_id(obj, not wide), *(content(obj) for _, content in columns))
    console.print(table)


@group.command(
    epilog=examples("ipckit ls", "ipckit ls --mine -k sysv-queue", "ipckit ls --json | jq '.[].verdict'")
)
@click.option(
    "-k",
    "--kind",
    "kinds",
    type=click.Choice(registry.KINDS),
    multiple=True,
    metavar="KIND",
    help=f"Only of this kind: {', '.join(registry.KINDS)}; may be repeated.",
)
@click.option("--mine", is_flag=True, help="Only what belongs to this user.")
@_json
def ls(kinds: tuple[str, ...], mine: bool, as_json: bool) -> None:
    """List named objects, who uses them, and which are orphans.

    System V queues, segments and semaphores, POSIX ones, and ipckit's named memory and queues.

    \b
    verdict   means
    live      a living process uses it
    orphan    made by ipckit; its users ended, one of them without closing it
    foreign   another user's
    unknown   neither is proven; only what is proven dead is removed by gc

    The id is what `ipckit rm` takes. Users are living processes. In a narrow terminal key, mode and last
    activity are left out.
    """
    with one_line("/proc"):
        found = [
            obj
            for obj in inventory.objects()
            if (not kinds or obj.kind in kinds) and (not mine or obj.verdict != "foreign")
        ]
        missing = inventory.unlisted() if not kinds or "posix-queue" in kinds else None
    if as_json:
        click.echo(json.dumps([_as_dict(obj) for obj in found], indent=2))
    elif found:
        _show_objects(found)
    if missing:
        click.echo(missing, err=True)


# --- rm, gc ---------------------------------------------------------------------------------------


def _pick(found: list[Object], asked: str) -> Object:
    """The object that is called so: by its id, or by number or name where that is only one's."""
    exact = [obj for obj in found if asked in (obj.id, _plain(obj.id))]
    if candidates := exact or [obj for obj in found if asked in (obj.ident, _plain(obj.ident))]:
        if len(candidates) == 1:
            return candidates[0]
        raise LookupError(f"{asked} may be {', '.join(obj.id for obj in candidates)}: say which")
    raise LookupError(f"{asked}: no such object; `ipckit ls` lists them")


def _why_not(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _remove(found: list[Object], asked: str, force: bool) -> None:
    obj = _pick(found, asked)
    if obj.verdict == "live" and not force:
        raise LookupError(f"{_plain(obj.id)} is {obj.why}; --force removes it all the same")
    inventory.remove(obj)
    click.echo(f"removed {_plain(obj.id)}")


@group.command(epilog=examples("ipckit rm sysv-queue:3", "ipckit rm -f memory:frames posix-queue:/jobs"))
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.option("-f", "--force", is_flag=True, help="Also what living processes use.")
def rm(ids: tuple[str, ...], force: bool) -> None:
    """Remove named objects, by their ids.

    An id is what `ipckit ls` prints: sysv-queue:5, posix-queue:/jobs, memory:frames. The number or name
    alone will do where only one object has it. What a living process uses is refused, and what is another
    user's always.
    """
    with one_line("/proc"):
        found = inventory.objects()
    failed = False
    for asked in ids:
        try:
            _remove(found, asked, force)
        except (LookupError, OSError) as error:
            failed = True
            why = _why_not(error) if isinstance(error, OSError) else error.args[0]
            click.echo(f"Error: {why}", err=True)
    raise click.exceptions.Exit(failed)


@group.command(epilog=examples("ipckit gc -n", "ipckit gc --dead"))
@click.option(
    "--dead",
    is_flag=True,
    help="Also what ipckit made and nobody uses, though all its users ended in good order.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@_json
def gc(dead: bool, dry_run: bool, as_json: bool) -> None:
    """Remove orphans: made by ipckit, and without a living user.

    Never another user's, never what a living process uses (a stopped one lives), never what ipckit
    didn't make, never what was used in another pid namespace.
    """
    try:
        removed = inventory.collect(dead=dead, dry_run=dry_run)
    except OSError as error:
        raise click.ClickException(_why_not(error)) from None
    if as_json:
        return click.echo(json.dumps([_as_dict(obj) for obj in removed], indent=2))
    verb = "would remove" if dry_run else "removed"
    for obj in removed:
        click.echo(f"{verb} {_plain(obj.id)}: {_plain(obj.why)}")
    left = 0 if dead else sum(obj.left for obj in inventory.objects())
    more = f"; {left} more left in good order by users who ended: --dead" if left else ""
    click.echo(f"{verb} {len(removed)}{more}")


# --- doctor ---------------------------------------------------------------------------------------


def _amount(number: int, unit: str) -> str:
    return _bytes(number) if unit == "bytes" else f"{number:,}"


def _value(limit: Limit) -> str:
    if limit.value is None:
        return "not here"
    if limit.unlimited:
        return "no limit"
    return limit.value if isinstance(limit.value, str) else _amount(limit.value, limit.unit)


def _used(limit: Limit) -> str:
    return "" if limit.used is None else _amount(limit.used, limit.unit)


def _counts(limit: Limit) -> bool:
    """Whether the value is a count, that wants its unit where no column says what it is."""
    return isinstance(limit.value, int) and not limit.unlimited and limit.unit != "bytes"


def _show_limits(found: list[Limit]) -> None:
    console = _console()
    (_show_limits_wide if console.width >= _VERY_WIDE else _show_limits_narrow)(console, found)
    tight = [limit.name for limit in found if limit.tight]
    console.print(f"tight: {len(tight)} of {len(found)}" + (f" ({', '.join(tight)})" if tight else ""))


def _show_limits_wide(console: "Console", found: list[Limit]) -> None:
    from rich.table import Table

    table = Table(
        "limit", "value", "in use", "stops", "change with", box=None, pad_edge=False, header_style="bold"
    )
    table.columns[1].justify = table.columns[2].justify = "right"
    for limit in found:
        style = "yellow" if limit.tight else None
        command = limit.change if len(limit.change) < 80 else limit.change.replace("&& ", "&&\n")
        table.add_row(limit.name, _value(limit), _used(limit), limit.stops, command, style=style)
    console.print(table)


def _show_limits_narrow(console: "Console", found: list[Limit]) -> None:
    for limit in found:
        unit = f" {limit.unit}" if _counts(limit) else ""
        used = f", {_used(limit)} in use" if _used(limit) else ""
        console.print(
            f"{limit.name:24} {_value(limit)}{unit}{used}", style="bold yellow" if limit.tight else "bold"
        )
        console.print(f"    stops: {limit.stops}")
        if limit.change:
            console.print(f"    {limit.change}", style="dim", soft_wrap=True)  # to be copied whole


@group.command(epilog=examples("ipckit doctor", "ipckit doctor --json | jq '.[] | select(.tight)'"))
@_json
def doctor(as_json: bool) -> None:
    """Show the limits of this machine or container.

    Those that named objects, pipes and processes meet, each with its value, what it stops, how much is in
    use where that is known, and the command that changes it. Marked is what is tight: nearly used up,
    lower than usual, or known to bite.
    """
    with one_line("/proc"):
        found = limits.survey()
    if as_json:
        click.echo(json.dumps([{**vars(limit), "unlimited": limit.unlimited} for limit in found], indent=2))
    else:
        _show_limits(found)

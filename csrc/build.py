"""Build ipckit._native: the cffi module over the plain C library in this folder.

Each declaration is written once: the header that gcc compiles is also what cffi reads, with
its preprocessor lines dropped. So a room's header holds only '#' lines, comments, enums,
structs and prototypes; anything else belongs in the .c file.
"""

import hashlib
import os
import re
import sys
from pathlib import Path

from cffi import FFI

if not sys.platform.startswith("linux"):
    sys.exit(f"ipckit builds on Linux so far, and this is {sys.platform}")

HERE = Path("csrc")
# A program, not a part of the module.
PROGRAMS = {HERE / "spawner_main.c"}
SOURCES = sorted(set(HERE.glob("*.c")) - set(HERE.glob("hot*.c")) - PROGRAMS)
DEPENDS = sorted(set(HERE.glob("*.h")) - {HERE / "hot.h"})
HEADERS = sorted(set(DEPENDS) - set(HERE.glob("*_impl.h")))
WARNINGS = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("IPCKIT_WERROR") else [])


def fingerprint() -> str:
    """Sixteen digits that tell this source from another: module and program must be of one build.

    Of just those files whose change has the module compiled anew.
    """
    digest = hashlib.sha256()
    for path in DEPENDS + SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def declarations(header: Path) -> str:
    lines = header.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def declare(header: Path, declared: set[Path]) -> None:
    """Give *header* to cffi, those that it includes first, each once."""
    if header in declared:
        return
    declared.add(header)
    for name in re.findall(r'^#include "(.*)"', header.read_text(), re.MULTILINE):
        declare(HERE / name, declared)
    ffi.cdef(declarations(header))


ffi = FFI()
_declared: set[Path] = set()
for _header in HEADERS:
    declare(_header, _declared)
ffi.set_source(
    "ipckit._native",
    "\n".join(f'#include "{header.name}"' for header in HEADERS),
    sources=[str(path) for path in SOURCES],
    depends=[str(path) for path in DEPENDS],
    include_dirs=[str(HERE)],
    define_macros=[("_GNU_SOURCE", None), ("IK_BUILD", f'"{fingerprint()}"')],
    # The generated file passes unused parameters by design of its interface.
    extra_compile_args=["-std=gnu11", "-O2", *WARNINGS, "-Wno-unused-parameter"],
    extra_link_args=["-pthread"],
)

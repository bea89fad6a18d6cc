# SPDX-License-Identifier: MIT
"""Sphinx: `make docs` builds docs/_build/html, warnings as errors."""

import re
from importlib.metadata import version as version_of
from typing import Any

project = "ipckit"
version = release = version_of("ipckit-unix")
copyright = "the ipckit authors"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# From Sphinx 9 on the type bytes of an annotation is looked for among our own names too, and several classes
# have a field of that name: "more than one target found".
suppress_warnings = ["ref.python"]
html_theme = "furo"
html_title = f"ipckit {version}"

_FIELD = re.compile(r"(Args|Returns|Yields|Raises|Signals|Fork|Threads|Fork and threads): +(.*)")


def as_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the house's ``Args: ...`` paragraphs into the field lists that Sphinx sets as a table."""
    shown: list[str] = []
    in_field = False
    for line in lines:
        if field := _FIELD.fullmatch(line):
            if not in_field:
                shown.append("")
            shown.append(f":{field[1]}: {field[2]}")
            in_field = True
        elif in_field and line and shown[-1] and not line.startswith("See "):
            shown[-1] += " " + line.strip()
        else:
            if in_field and line:
                shown.append("")
            in_field = in_field and not line
            shown.append(line)
    lines[:] = shown


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_fields)

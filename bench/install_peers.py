# SPDX-License-Identifier: MIT
"""Install what bench_engine.py compares with, the extra ``bench``, as far as it installs here."""

import importlib.metadata
import subprocess
import sys

PIP = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", "constraints.txt"]

for requirement in importlib.metadata.requires("ipckit-unix") or []:
    name, _, extra = requirement.partition(";")
    if extra.strip() == 'extra == "bench"' and subprocess.run([*PIP, name.strip()], check=False).returncode:
        print(f"skipped: {name.strip()} does not install")

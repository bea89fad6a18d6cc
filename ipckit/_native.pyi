"""The cffi module over csrc/: its names are the declarations of csrc/*.h."""

from typing import Any

ffi: Any
lib: Any

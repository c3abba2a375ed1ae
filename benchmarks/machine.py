"""What a benchmark ran on, for the head of its page."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """The machine in words."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and "model name" in (text := info.read_text()):
        model = text.split("model name")[1].split(":", 1)[1].splitlines()[0].strip()
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}, shared with other work"
    )

"""What the system says of this process's memory. Linux only."""

from __future__ import annotations

from pathlib import Path


def resident(field: str) -> int:
    """Bytes of memory this process has now (VmRSS; RssAnon without files), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

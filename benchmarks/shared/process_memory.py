"""Memory of this process as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def resident(field: str) -> float:
    """MiB of this process: VmRSS (now) or VmHWM (highest so far). Not getrusage: its maximum is inherited from the parent process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")  # no /proc on this system: no number rather than a wrong one
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024

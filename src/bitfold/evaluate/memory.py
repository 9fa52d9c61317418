"""Peak resident memory of this process."""

import resource
import sys
from pathlib import Path

__all__ = ["peak_rss_mb"]

LINUX_STATUS = Path("/proc/self/status")


def peak_rss_mb() -> float:
    """The most memory this process has held resident, in MiB (2²⁰ bytes).

    Linux: VmHWM of /proc/self/status, because ru_maxrss of getrusage(2) is inherited through fork
    and exec, so that a small command started by a large one would report the large one's peak.
    Elsewhere getrusage, in bytes on macOS and kilobytes on others.
    """
    if LINUX_STATUS.exists():
        for line in LINUX_STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024

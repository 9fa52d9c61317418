"""What came out of an export."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Exported"]


@dataclass(frozen=True)
class Exported:
    """path, format; bytes on disk; types: how many weights there are of each of the format's types; notes: what the
    user should read."""

    path: Path
    format: str
    bytes: int
    types: dict[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"path": str(self.path), "notes": list(self.notes)}

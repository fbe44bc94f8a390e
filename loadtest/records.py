"""One row per request, the same for live and simulated runs.

Times are seconds since the run's start. Latency counts from the intended time, never from when we got round to sending.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["VERSION", "Row", "Run"]

VERSION = 1


@dataclass(slots=True)
class Row:
    """What became of one request."""

    id: str
    intended: float
    """When the workload says it arrives."""
    sent: float
    """When it left; the load generator's own lag is the difference."""
    first: float | None = None
    """First token of the answer."""
    end: float | None = None
    tokens: int = 0
    preemptions: int = 0
    slices: int = 0
    error: str = ""
    """Empty: completed."""

    @property
    def jct(self) -> float:
        """Job completion time in seconds. Raises ValueError for a request that never ended."""
        if self.end is None:
            raise ValueError(f"request {self.id} never ended")
        return self.end - self.intended

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds."""
        return None if self.first is None else self.first - self.intended

    @property
    def lag(self) -> float:
        return self.sent - self.intended


@dataclass(slots=True)
class Run:
    """One workload under one setting."""

    setting: str
    workload: str
    """Hash of the workload."""
    rows: list[Row]

    @property
    def lag(self) -> float:
        """Worst delay of the load generator itself; a run where it matters measures the generator."""
        return max((row.lag for row in self.rows), default=0.0)

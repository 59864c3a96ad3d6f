"""What one process holds by lease: memory of a device, and its part of the one host pool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from tiermem.config import Config
from tiermem.leased import LeasedPlanner
from tiermem.pooling import Pooling
from tiermem.sharing import Sharing


@dataclass(frozen=True, slots=True)
class Leases:
    """Opened before the tiers and closed after them; None is what is not shared."""

    sharing: Sharing | None = None
    pooling: Pooling | None = None

    @classmethod
    def open(cls, config: Config) -> Leases:
        """Join the ledgers that a configuration asks for. Raises as they do, holding nothing."""
        with ExitStack() as opened:
            sharing = Sharing.open(config) if config.share.enabled else None
            if sharing is not None:
                opened.callback(sharing.close)
            pooling = Pooling.open(config) if config.share.host and config.host.enabled else None
            opened.pop_all()
        return cls(sharing, pooling)

    @property
    def first_gpu(self) -> int | None:
        """Bytes of GPU memory to begin with; None: all of gpu.budget."""
        return None if self.sharing is None else self.sharing.terms.first

    def start(self, planner: LeasedPlanner, wake: Callable[[], None]) -> None:
        """The tiers are made, and this planner's turns follow the leases. wake: from any thread."""
        if self.sharing is not None:
            self.sharing.start(planner, wake)
        if self.pooling is not None:
            self.pooling.start(planner, wake)

    def close(self) -> None:
        """The tiers have given all memory back; a second call does nothing."""
        if self.sharing is not None:
            self.sharing.close()
        if self.pooling is not None:
            self.pooling.close()


NO_LEASES = Leases()

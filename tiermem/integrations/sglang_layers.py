"""A prefill begins with its first layer while the bytes of later ones are on their way.

Before SGLang reads a layer of the pool it asks the pool's `layer_transfer_counter` to wait for it;
that is how HiCache hides its loads. Here the forward stream waits for the front part of each page,
as far as the layer reaches (`PageMajor`).

Not every model or backend need ask, so nobody relies on it unseen: a prefill waits layer by layer
only once one before it has asked for every layer, in order, and is held against the same.
"""

from __future__ import annotations

from collections.abc import Callable

from tiermem.slices import Arriving


class LayerWaits:
    """The `layer_transfer_counter` of one pool. The scheduler's thread makes all calls."""

    def __init__(
        self, arriving: Arriving, stream: Callable[[], int | None], layers: int, layer_bytes: int
    ) -> None:
        """stream: the one that a batch runs on. layer_bytes: of one layer in a page."""
        self._arriving = arriving
        self._stream = stream
        self._layers = layers
        self._layer_bytes = layer_bytes
        self._prefills = False
        self._asked = 0
        self.trusted = False
        """Whether the last prefill has asked for every layer."""
        self.overlapped = 0
        """Batches that were queued while some of their pages were on their way."""

    def begin(self, prefills: bool) -> None:
        """A batch is queued next."""
        self.overlapped += bool(len(self._arriving))
        self._prefills = prefills
        self._asked = 0

    def wait_until(self, layer: int) -> None:
        """SGLang is about to queue what reads this layer, numbered from 0."""
        if layer == self._asked:
            self._asked += 1
        self._arriving.order(self._stream(), (layer + 1) * self._layer_bytes)

    def end(self) -> bool:
        """The batch is queued. False if it may have read what was not there yet."""
        if not self._prefills:
            return True
        self._prefills = False
        self.trusted = self._asked == self._layers
        waited = not len(self._arriving)
        self._arriving.order(self._stream())
        return waited

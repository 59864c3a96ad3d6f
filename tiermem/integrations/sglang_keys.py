"""What a page's content is called, and whose bytes a slab holds: names that outlive a process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from tiermem.keyindex import Keys

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json")


class KeyChain:
    """Keys of the pages of one sequence of tokens: each names all tokens up to its page's end."""

    def __init__(self, page_size: int, extra: str | None) -> None:
        """extra: what tells apart equal tokens whose bytes differ: an adapter, a salt."""
        self._page_size = page_size
        self._last = xxhash.xxh3_128_digest(b"" if extra is None else b"x" + extra.encode())
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self, tokens: Sequence[int] | npt.NDArray[np.int64], pages: int) -> Keys:
        """uint64[pages, 2]: of the first `pages` whole pages; tokens begin as they did before."""
        done = len(self._keys)
        if pages > done:
            size = self._page_size
            fresh = np.asarray(tokens[done * size : pages * size], np.int64).tobytes()
            step = size * 8
            for start in range(0, len(fresh), step):
                self._last = xxhash.xxh3_128_digest(self._last + fresh[start : start + step])
                self._keys.append(self._last)
        joined = b"".join(self._keys[:pages])
        keys: Keys = np.frombuffer(joined, np.uint64).reshape(-1, 2).copy()
        keys[~keys.any(axis=1), 0] = 1  # a key is not zero
        return keys


def weights_identity(model: str, revision: str | None, load_format: str, seed: int | None) -> str:
    """Which weights these are. A folder's files count by name, size and time of change.

    Random ones (load_format "dummy") are told apart by their seed.
    """
    told = [model, revision or "", load_format, str(seed) if load_format == "dummy" else ""]
    folder = Path(model)
    if folder.is_dir():
        files = sorted({file for kind in _WEIGHTS for file in folder.glob(kind)})
        for file in files:
            found = file.stat()
            told.append(f"{file.name} {found.st_size} {found.st_mtime_ns}")
    return xxhash.xxh3_128_hexdigest("\n".join(told).encode())


def digest(fingerprint: Mapping[str, str]) -> str:
    """One word for a fingerprint, in any order of its fields."""
    told = "\n".join(f"{name}={fingerprint[name]}" for name in sorted(fingerprint))
    return xxhash.xxh3_128_hexdigest(told.encode())

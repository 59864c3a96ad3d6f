"""Load or recompute: how much of a chain to fetch, and from where on computing is cheaper.

A chain's blocks are needed in order: what is loaded must be a prefix, the rest is computed. So the
question is one number: the length of the loaded prefix with the least time to the first token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.tier import Place

Places = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Speeds:
    """Measured on this machine (`tiermem bench offload`) and of this model.

    prefill_tokens_per_s: as measured at short prompts; attention_s_per_token2: what each token
    costs more for each token before it (attention grows with length), 0 if not known.
    """

    host_gbps: float
    nvme_gbps: float
    prefill_tokens_per_s: float
    attention_s_per_token2: float = 0.0
    host_latency_s: float = 0.0
    nvme_latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """Load blocks [0, load), compute the rest. Times of the two parts and of loading none."""

    load: int
    load_s: float
    compute_s: float
    compute_all_s: float


def split(
    places: Places, block_bytes: int, block_tokens: int, speeds: Speeds, overlap: bool = False
) -> Split:
    """The cheapest cut of a chain.

    places: uint8[n], where each block is, first block first; what lies behind the first NONE or
    LOST block must be computed. overlap: loads run beside the computation of the rest (an engine
    that starts computing while layers arrive), so the longer of the two counts, not the sum.
    """
    n = len(places)
    gone = np.flatnonzero((places == Place.NONE) | (places == Place.LOST))
    reach = int(gone[0]) if len(gone) else n
    load_s = _load_s(places[:reach], block_bytes, speeds)
    compute_s = _compute_s(n, reach, block_tokens, speeds)
    both = np.maximum(load_s, compute_s) if overlap else load_s + compute_s
    # Of equals the longer prefix: it leaves the processors free.
    cut = reach - int(both[::-1].argmin())
    return Split(cut, float(load_s[cut]), float(compute_s[cut]), float(compute_s[0]))


def _load_s(places: Places, block_bytes: int, speeds: Speeds) -> npt.NDArray[np.float64]:
    """Seconds to load each prefix; the two routes run side by side."""
    host, nvme = (_counts(places == place) for place in (Place.HOST, Place.NVME))
    host_s = host * block_bytes / (speeds.host_gbps * 1e9) + (host > 0) * speeds.host_latency_s
    nvme_s = nvme * block_bytes / (speeds.nvme_gbps * 1e9) + (nvme > 0) * speeds.nvme_latency_s
    return np.maximum(host_s, nvme_s)


def _counts(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(mask)])


def _compute_s(n: int, reach: int, block_tokens: int, speeds: Speeds) -> npt.NDArray[np.float64]:
    """Seconds to compute all behind each prefix."""
    done = np.arange(reach + 1) * block_tokens
    whole = n * block_tokens
    linear = (whole - done) / speeds.prefill_tokens_per_s
    # The sum of positions from `done` to the end.
    return linear + speeds.attention_s_per_token2 * (whole**2 - done**2) / 2

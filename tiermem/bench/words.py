"""How figures and rows are put into words, the same in tables, pictures and verdicts."""

from __future__ import annotations

from tiermem.bench.result import Row
from tiermem.units import format_exactly


def verb(row: Row) -> str:
    """What the row does, as a plural noun seen from the GPU."""
    src, dst = kind(row.src), kind(row.dst)
    if row.route == "in-place":
        return "reads in place"
    if dst == "gpu" and src != "gpu":
        return f"loads from {src}"
    if src == "gpu" and dst != "gpu":
        return f"stores to {dst}"
    if "nvme" in (src, dst):
        return "disk reads" if src == "nvme" else "disk writes"
    return f"copies {src} to {dst}"


def kind(end: str) -> str:
    """gpu of gpu:0."""
    return end.partition(":")[0]


def conditions(row: Row) -> str:
    """What else names the row: both ways, pager: steal, 2 GPUs, beside the disk."""
    parts = []
    if row.direction == "both":
        parts.append("both ways")
    if row.work:
        named = {"ceiling": "one large copy", "kvikio": "by kvikio"}
        parts.append(named.get(row.work, f"pager: {row.work}"))
    if row.gpus > 1:
        parts.append(f"{row.gpus} GPUs")
    if row.beside:
        parts.append(f"beside {'the disk' if row.beside == 'disk' else 'a Python thread'}")
    return ", ".join(parts)


def title(row: Row) -> str:
    """loads from host 2MiB x 64, both ways."""
    more = conditions(row)
    return f"{verb(row)} {format_exactly(row.page_bytes)} x {row.group}" + (
        f", {more}" if more else ""
    )


def times(ratio: float) -> str:
    """doubled, halved, +35 %: a ratio of two times; empty when about equal."""
    for low, high, word in ((1.85, 2.2, "doubled"), (2.7, 3.3, "tripled"), (0.45, 0.55, "halved")):
        if low <= ratio <= high:
            return word
    if 0.95 <= ratio <= 1.05:
        return ""
    return f"x {ratio:.1f}" if ratio > 2 else f"{(ratio - 1) * 100:+.0f} %"

"""What the runs of `bench/vllm_gpu.py` say side by side: a table, the bars, a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Runs = dict[str, dict[str, Any]]
COLD, CACHED = "cold_ttft_ms", "ttft_ms"


def merged(out: Path, lengths: list[str]) -> dict[str, Any]:
    """All modes in a folder; writes the picture beside them."""
    runs: Runs = {}
    for file in sorted(out.glob("vllm-*-*.json")):
        one = json.loads(file.read_text())
        runs[one["mode"]] = one
    rows = {length: {mode: row(one, length) for mode, one in runs.items()} for length in lengths}
    judged = [bar for length in lengths for bar in bars(runs, length)]
    if runs:
        picture(rows, out / "vllm.svg")
    return {"schema": "tiermem.vllm_gpu.merged.v2", "rows": rows, "bars": judged}


def row(run: dict[str, Any], length: str) -> dict[str, Any]:
    found = run["lengths"][length]
    return {
        "cold_ttft_ms": found[COLD]["median"],
        "ttft_ms": found[CACHED]["median"],
        "ttft_p99_ms": found[CACHED]["p99"],
        "at_once_s": statistics.median(found["at_once_s"]),
        "gb_per_s": {
            route: moved / busy_s / 1e9
            for route, (moved, busy_s) in found["moved"].items()
            if busy_s
        },
    }


def bars(runs: Runs, length: str) -> Iterator[dict[str, Any]]:
    """Each bar of which the modes are there: what was compared, the figure, whether it is met."""
    of = {mode: run["lengths"][length] for mode, run in runs.items()}
    resident = of.get("resident")
    if resident and "fits" in of:
        for what, key in (("cold", "cold_rounds_ms"), ("cached", "ttft_rounds_ms")):
            low, middle, high = quartiles(of["fits"][key], resident[key])
            text = f"{what}: fits / resident, prompt by prompt ({low:.3f}-{high:.3f})"
            yield judge(length, text, middle, 1.02)
    if resident and "host" in of:
        moved, busy_s = of["host"]["moved"]["host-gpu"]
        link = runs["host"]["ceilings_gbps"]["h2d"]
        ideal_ms = resident[CACHED]["median"] + moved / of["host"][CACHED]["n"] / link / 1e6
        text = f"cached: host / (resident + bytes over the link, {ideal_ms:.1f} ms)"
        yield judge(length, text, of["host"][CACHED]["median"] / ideal_ms, 1.2)
        text = f"host to GPU while copies run: {link:.1f} GB/s of one large copy / reached"
        yield judge(length, text, link / (moved / busy_s / 1e9), 1 / 0.8)
    if "host" in of and "offload" in of:
        theirs, ours = (statistics.median(of[mode]["at_once_s"]) for mode in ("offload", "host"))
        yield judge(length, f"all at once: host / offload ({theirs:.3f} s)", ours / theirs, 1.0)
        ratio = of["host"][CACHED]["median"] / of["offload"][CACHED]["median"]
        yield judge(length, "cached, one by one: host / offload", ratio, 1.0)
    if resident and "nvme" in of:
        text = "cached: nvme / computed by vLLM alone"
        ratio = of["nvme"][CACHED]["median"] / resident[COLD]["median"]
        yield judge(length, text, ratio, 1.0)
    if resident:
        theirs_tokens = runs["resident"]["tokens"][length]
        for mode in sorted(of.keys() - {"resident"}):
            pairs = zip(runs[mode]["tokens"][length], theirs_tokens, strict=True)
            differ = sum(a != b for a, b in pairs)
            yield judge(length, f"{mode}: answers that differ from resident's", differ, 0)


def judge(length: str, text: str, figure: float, most: float) -> dict[str, Any]:
    return {"tokens": length, "bar": text, "figure": figure, "most": most, "met": figure <= most}


def quartiles(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float, float]:
    """Of the ratios of times that were taken turn about."""
    ratios = [a / b for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def picture(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Milliseconds to the first token, cached and cold, a panel for each length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, _ = plt.subplots(1, len(rows), figsize=(5 * len(rows), 3.5), layout="constrained")
    for panel, (length, modes) in zip(figure.axes, rows.items(), strict=True):
        names = sorted(modes, key=lambda mode: modes[mode]["ttft_ms"])
        panel.barh(names, [modes[name]["cold_ttft_ms"] for name in names], color="#dddddd")
        panel.barh(names, [modes[name]["ttft_ms"] for name in names], height=0.5, color="#2a6f97")
        panel.set_title(f"prompts of {length} tokens")
        panel.set_xlabel("ms to the first token: cached, and (grey) cold")
    figure.savefig(file)
    plt.close(figure)

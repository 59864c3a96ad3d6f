"""A result as one self-contained HTML page: tables and inline pictures, no script, no network.

The page's own policy forbids whatever would be fetched, so a mistake here shows as an error in the
browser's console instead of a request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Annotated

import typer

from tiermem.bench import chart, output, result, words
from tiermem.bench.result import AGREE, Result, Row
from tiermem.units import format_bytes, format_exactly

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5b6675;--line:#d5dae1;--paper:#fff;
--panel:#f5f7f9;--bad:#c4291c}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#9aa5b4;--line:#3a4453;
--paper:#141920;--panel:#1c232d;--bad:#ff7466}}
*{box-sizing:border-box}
body{margin:0 auto;padding:32px 24px 64px;max-width:1160px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 12px}
.soft{color:var(--soft)}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(196px,1fr));gap:12px;
margin:24px 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums}
.card small{color:var(--soft);display:block}
figure{margin:0 0 16px;padding:8px;border:1px solid var(--line);border-radius:10px;overflow-x:auto}
svg{display:block;max-width:100%;height:auto}
table{border-collapse:collapse;font-size:12.5px;width:100%;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{text-align:left;padding:5px 8px 5px 0;border-bottom:1px solid var(--line);
white-space:nowrap}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:0}
dt{color:var(--soft)}dd{margin:0}
""".strip()


def html(found: Result, title: str = "Offload benchmark") -> str:
    """The whole page."""
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">{escape(_subtitle(found))}</p>',
            *_warnings(found),
            _cards(found.rows),
            "<h2>Rates</h2>",
            *(f"<figure>{picture}</figure>" for picture in charts(found.rows)),
            "<h2>Machine</h2>",
            _machine(found),
            "<h2>Every measurement</h2>",
            _table(found.rows),
            *_figures(found),
            *_checks(found),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _subtitle(found: Result) -> str:
    where = ", ".join(found.machine.gpus) or found.machine.cpu
    version = found.machine.versions.get("tiermem", "unknown")
    rounds = sorted({row.gbps.n for row in found.rows})
    spread = "-".join(str(n) for n in dict.fromkeys((rounds[0], rounds[-1]))) if rounds else "0"
    return (
        f"{where}; {found.started}; {len(found.rows)} measurements of {spread} rounds in "
        f"{found.took_s:.0f} s; tiermem {version}"
    )


def _warnings(found: Result) -> Iterator[str]:
    if not found.complete:
        yield '<p class="bad">This run was interrupted: some measurements are missing.</p>'
    if found.device == "cpu":
        yield (
            '<p class="bad">Emulated device: bytes moved within host memory. These figures say '
            "nothing about a GPU.</p>"
        )
    for note in found.notes:
        yield f'<p class="soft">{escape(note)}</p>'


def _plain(row: Row) -> bool:
    return row.direction == "one-way" and not row.beside and not row.work and row.gpus == 1


def best(rows: Iterable[Row], name: Callable[[Row], str]) -> dict[str, Row]:
    """The fastest row under each name, in the order in which names first appear."""
    found: dict[str, Row] = {}
    for row in rows:
        known = found.get(name(row))
        if known is None or row.gbps.median > known.gbps.median:
            found[name(row)] = row
    return found


def _cards(rows: Sequence[Row]) -> str:
    cards = []
    for name, row in best(filter(_plain, rows), words.verb).items():
        link = "" if row.percent_of_link is None else f", {row.percent_of_link:.0f} % of the link"
        cards.append(
            f'<div class="card"><small>{escape(name)}</small><b>{row.gbps.median:.1f} GB/s</b>'
            f"<small>{format_exactly(row.page_bytes)} x {row.group}{link}</small></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def charts(rows: Sequence[Row]) -> list[str]:
    """Pictures of what the rows allow: links, disk, other conditions, page times, CPU time."""
    plain = [row for row in rows if _plain(row)]
    disk = [row for row in plain if "nvme" in (words.kind(row.src), words.kind(row.dst))]
    links = [row for row in plain if row not in disk]
    rate = "GB/s, median, p5 to p95"
    pictures = [
        _by_size("Memory and GPU, by page size", rate, links, _rate),
        _by_size("NVMe, by page size", rate, disk, _rate),
        _by_conditions(rows),
        _page_times(plain),
        _by_size("Processor time", "CPU seconds per GiB", plain, _cpu),
    ]
    return [picture for picture in pictures if picture]


def _rate(row: Row) -> chart.Bar | None:
    hint = f"{words.title(row)}: {row.gbps.median:.2f} GB/s, n={row.gbps.n}, {row.path}"
    return chart.Bar(row.gbps.median, row.gbps.p5, row.gbps.p95, hint)


def _cpu(row: Row) -> chart.Bar | None:
    if row.cpu_s_per_gib is None:
        return None
    return chart.Bar(row.cpu_s_per_gib, hint=f"{words.title(row)}: {row.cpu_s_per_gib:.4f} s/GiB")


def _by_size(
    title: str, unit: str, rows: Sequence[Row], bar: Callable[[Row], chart.Bar | None]
) -> str:
    """The fastest group of each page size, one bar for each verb."""
    verbs = list(dict.fromkeys(words.verb(row) for row in rows))
    sizes: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        sizes[row.page_bytes].append(row)
    groups = []
    for nbytes in sorted(sizes):
        fastest = best(sizes[nbytes], words.verb)
        drawn = tuple(bar(fastest[verb]) if verb in fastest else None for verb in verbs)
        if any(drawn):
            groups.append(chart.Group(f"pages of {format_exactly(nbytes)}", drawn))
    return chart.bars(title, unit, verbs, groups) if groups else ""


def _by_conditions(rows: Sequence[Row]) -> str:
    """The fastest row of each verb alone, both ways, beside something else, on several GPUs."""
    fastest = best(rows, lambda row: f"{words.verb(row)}, {words.conditions(row) or 'alone'}")
    crowded = {words.verb(row) for row in rows if not _plain(row)}
    groups = [
        chart.Group(name, (_rate(row),))
        for name, row in sorted(fastest.items())
        if words.verb(row) in crowded
    ]
    title = "Alone, both ways, and beside other work"
    return chart.bars(title, "GB/s, median, p5 to p95", ("rate",), groups) if groups else ""


def _page_times(rows: Sequence[Row]) -> str:
    timed = best([row for row in rows if row.page_us], words.verb).values()
    groups = [
        chart.Group(
            words.title(row),
            tuple(chart.Bar(value, hint=f"{value:.1f} us") for value in (time.p50, time.p99)),
        )
        for row in timed
        if (time := row.page_us)
    ]
    return chart.bars("Time of a page", "microseconds", ("p50", "p99"), groups) if groups else ""


def _machine(found: Result) -> str:
    machine = found.machine
    virtual = {True: "yes", False: "no", None: "unknown"}[machine.virtual]
    facts = {
        "GPUs": ", ".join(machine.gpus) or "none",
        "driver, CUDA": f"{machine.driver or 'unknown'}, {machine.cuda or 'unknown'}",
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "memory": f"{format_bytes(machine.memory_bytes)}, {machine.numa_nodes} NUMA nodes",
        "kernel": machine.kernel,
        "virtual machine": virtual,
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
    }
    lines = (f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{''.join(lines)}</dl>"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("what", lambda row: words.title(row)),
    ("from", lambda row: row.src),
    ("to", lambda row: row.dst),
    ("path", lambda row: row.path),
    ("relation", lambda row: row.relation),
    ("GB/s", lambda row: f"{row.gbps.median:.2f}"),
    ("p5", lambda row: f"{row.gbps.p5:.2f}"),
    ("p95", lambda row: f"{row.gbps.p95:.2f}"),
    ("n", lambda row: str(row.gbps.n)),
    ("% of link", lambda row: _or_dash(row.percent_of_link, ".0f")),
    ("p50 us", lambda row: _or_dash(row.page_us.p50 if row.page_us else None, ".1f")),
    ("p99 us", lambda row: _or_dash(row.page_us.p99 if row.page_us else None, ".1f")),
    ("CPU s/GiB", lambda row: _or_dash(row.cpu_s_per_gib, ".4f")),
)
TEXT_COLUMNS = 5


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: Sequence[Row]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        styles = (' class="n"' if i >= TEXT_COLUMNS else "" for i in range(len(COLUMNS)))
        made = (f"<{tag}{s}>{escape(c)}</{tag}>" for s, c in zip(styles, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    head = line((name for name, _ in COLUMNS), "th")
    body = "\n".join(line((cell(row) for _, cell in COLUMNS), "td") for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _figures(found: Result) -> Iterator[str]:
    """What is no rate: driver calls, faults, allocations."""
    if not found.figures:
        return
    lines = (
        f'<tr><td>{escape(name)}</td><td class="n">{figure.median:,.2f}</td>'
        f'<td class="n">{figure.p99:,.2f}</td><td>{escape(figure.unit)}</td>'
        f'<td class="n">{figure.n}</td></tr>'
        for name, figure in found.figures.items()
    )
    yield "<h2>Calls, faults, allocations</h2>"
    yield (
        '<div class="wide"><table><thead><tr><th>what</th><th class="n">median</th>'
        '<th class="n">p99</th><th>unit</th><th class="n">n</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _checks(found: Result) -> Iterator[str]:
    """Our figures beside those of tools that share no code with us."""
    if not found.checks:
        return
    lines = (
        f"<tr><td>{escape(check.what)}</td><td>{escape(check.tool)}</td>"
        f'<td class="n">{check.ours_gbps:.2f}</td><td class="n">{check.theirs_gbps:.2f}</td>'
        f'<td class="n">{check.ratio:.3f}</td><td class="n">{check.interval}</td>'
        f'<td class="n">{check.n}</td><td>{check.verdict}</td></tr>'
        for check in found.checks
    )
    yield f"<h2>Beside independent tools (agree: within {AGREE:.0%})</h2>"
    yield (
        '<div class="wide"><table><thead><tr><th>what</th><th>tool</th><th class="n">ours GB/s</th>'
        '<th class="n">theirs</th><th class="n">ratio</th><th class="n">95 %</th>'
        '<th class="n">n</th><th></th></tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def command(
    measured: Annotated[Path, typer.Argument(help="Result of bench offload.")],
    to: Annotated[Path, typer.Argument(help="HTML file to write.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Offload benchmark",
) -> None:
    """Write a result as one HTML page that needs nothing else."""
    output.save(to, html(result.read(measured), title))
    typer.echo(f"written: {to}")

"""Who may import whom, read from the syntax trees; and what `import tiermem` leaves alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tiermem"
LEAVES = ("gpu", "host", "nvme", "policies")
LEVEL = {
    **dict.fromkeys(("config", "errors", "sections", "settings", "units"), 0),
    **dict.fromkeys(("fences", "interrupts", "keyindex", "native", "plan", "slices"), 1),
    **dict.fromkeys(("table", "tier", "toolchain"), 1),
    **dict.fromkeys(LEAVES, 2),
    **dict.fromkeys(
        ("ascent", "books", "descent", "executor", "ledger", "pager", "planner", "ranking", "room"),
        3,
    ),
    **dict.fromkeys(("stats", "trace"), 3),
    **dict.fromkeys(("attic", "backup", "board", "compaction", "contents", "inplace", "single"), 3),
    **dict.fromkeys(
        ("ledger_file", "ledger_records", "ledger_pass", "ledger_shares", "ledger_wake"), 3
    ),
    **dict.fromkeys(("crossover", "drive", "keeping", "leased"), 4),
    **dict.fromkeys(("leases", "membership", "peers", "pooling", "sharing", "supply"), 4),
    **dict.fromkeys(("assemble", "metrics", "mover", "region", "space"), 4),
    **dict.fromkeys(("__init__", "__main__", "bench", "cli", "integrations", "testing"), 5),
    **dict.fromkeys(("directed", "evicting", "facts", "foresight", "watch"), 4),
}
"""The levels of the drawing in docs/design.md, by the first name below `tiermem`."""

INTERFACES = {"tiermem.policies.base"}
"""Modules of leaves that only declare protocols; level 3 may name them."""

HEAVY = ("cryptography", "cuda", "kvikio", "matplotlib", "numba", "pynvml", "torch")


def test_modules_import_downwards_and_leaves_know_no_other_leaf() -> None:
    assert list(faults(read_package())) == []


def test_modules_import_one_another_without_cycles() -> None:
    TopologicalSorter(imports(read_package())).prepare()


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("tiermem.table", "from tiermem.space import Space", "imports upwards"),
        ("tiermem.units", "import tiermem", "imports upwards"),
        ("tiermem.tier", "def f() -> None:\n    from tiermem import planner", "imports upwards"),
        ("tiermem.gpu.vmm", "from tiermem.host.pinned import Pool", "knows another leaf"),
        ("tiermem.gpu.vmm", "from ..host import pinned", "knows another leaf"),
        ("tiermem.nvme.slab", "from tiermem.planner import Planner", "imports upwards"),
        ("tiermem.planner", "from tiermem.gpu import vmm", "knows a leaf"),
        ("tiermem.mystery", "import os", "has no level"),
    ],
)
def test_a_planted_import_against_the_rule_is_found(module: str, source: str, says: str) -> None:
    known = ("space", "planner", "table", "host.pinned", "gpu.vmm", "policies.base", "__init__")
    tree = {f"tiermem.{name}": "" for name in known}
    found = list(faults({**tree, module: source}))
    assert len(found) == 1
    assert says in found[0]


def test_a_planted_cycle_is_found() -> None:
    tree = {"tiermem.units": "from tiermem import errors", "tiermem.errors": "import tiermem.units"}
    with pytest.raises(CycleError):
        TopologicalSorter(imports(tree)).prepare()


def test_importing_the_package_and_its_public_names_takes_nothing_heavy() -> None:
    code = (
        "import sys, tiermem\n"
        "for name in tiermem.__all__: getattr(tiermem, name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout == "[]\n"


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    import tiermem

    with pytest.raises(AttributeError, match="no attribute 'Spaec'"):
        _ = tiermem.Spaec  # type: ignore[attr-defined]


def read_package() -> dict[str, str]:
    """Source text by module name; a package stands under its `__init__` only at the top."""
    return {
        ".".join(("tiermem", *file.relative_to(PACKAGE).with_suffix("").parts)): file.read_text()
        for file in PACKAGE.rglob("*.py")
    }


def imports(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules of `sources` that each module imports, inside functions as well."""
    return {name: set(_imported(name, text, sources)) for name, text in sources.items()}


def faults(sources: Mapping[str, str]) -> Iterator[str]:
    """One line for each import against the rule."""
    for module, targets in imports(sources).items():
        part = _part(module)
        if part not in LEVEL:
            yield f"{module} has no level: give {part} one in LEVEL and in docs/design.md"
            continue
        for target in targets:
            if fault := _fault(part, _part(target), target):
                yield f"{module} {fault}: {target}"


def _fault(part: str, other: str, target: str) -> str | None:
    if part == other:
        return None
    if LEVEL.get(other, 0) > LEVEL[part]:
        return "imports upwards"
    if part in LEAVES and other in LEAVES:
        return "knows another leaf"
    if LEVEL[part] == 3 and other in LEAVES and target not in INTERFACES:
        return "knows a leaf"
    return None


def _imported(module: str, text: str, known: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (_module(alias.name, known) for alias in node.names if _ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = _base(module, node)
            if _ours(base):
                yield from (_module(f"{base}.{alias.name}", known) for alias in node.names)


def _base(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".")[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def _module(name: str, known: Mapping[str, str]) -> str:
    """The module that an imported name is, or is taken from."""
    while name not in known and f"{name}.__init__" not in known and "." in name:
        name = name.rpartition(".")[0]
    return name if name in known else f"{name}.__init__"


def _ours(name: str) -> bool:
    return name == "tiermem" or name.startswith("tiermem.")


def _part(module: str) -> str:
    return module.split(".")[1]

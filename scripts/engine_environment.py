"""What the environments of all engines have in common: PyTorch for a CPU, and tiermem in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import make_environment

ROOT = Path(__file__).parents[1]
TORCH = "torch==2.13.0"


def make(folder: Path, needed: Sequence[str], alone: Sequence[str]) -> str:
    """An environment in `folder` that has these packages; its interpreter.

    alone: what is installed without what it requires: engines, and all that requires CUDA.
    $TORCH_INDEX: an index or a folder that holds nothing but CPU builds of PyTorch, if any.
    """
    make_environment.main(folder)
    python = make_environment.python_of(folder)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if index := os.environ.get("TORCH_INDEX"):
        make_environment.run([*pip, "--index-url", index, TORCH])
    make_environment.run([*pip, TORCH, *needed])
    make_environment.run([*pip, "--no-deps", *alone])
    make_environment.run([*pip, "-e", str(ROOT)])
    return python

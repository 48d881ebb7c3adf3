"""The suite as other processors round: other BLAS, convolution and vector kernels, one thread and two.

    python tests/processors.py [--setting NAME …] [pytest's arguments]

No sum's order is promised, so no test may depend on it. The settings choose the kernels that numpy (OpenBLAS), torch
(ATen), MKL and oneDNN would choose on another processor; processes that tests start inherit them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# MKL_CBWR=COMPATIBLE is the one path that MKL takes on every vendor's processors; ATen's default is SSE alone. Two
# threads wait passively: where tests start several processes, threads that spin would take the cores from each other.
TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
SETTINGS = {
    "haswell": {
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "1",
    },
    "zen": {
        "OPENBLAS_CORETYPE": "Zen",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        **TWO_THREADS,
    },
    "skylakex": {"OPENBLAS_CORETYPE": "SkylakeX", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", **TWO_THREADS},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="this one alone; may be repeated")
    chosen, arguments = parser.parse_known_args()
    failed = []
    for name in chosen.setting or SETTINGS:
        setting = SETTINGS[name]
        print(f"== tests as on {name}:", *(f"{key}={value}" for key, value in setting.items()), flush=True)
        if name == "skylakex" and not _has_avx512():
            print("skipped: this processor has no AVX-512", flush=True)
            continue
        workers = max(1, (os.cpu_count() or 1) // int(setting["OMP_NUM_THREADS"]))
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-n", str(workers), "--dist", "loadscope"]
        if subprocess.run([*command, *arguments], cwd=ROOT, env=os.environ | setting).returncode:
            failed.append(name)
    print("failed as on: " + ", ".join(failed) if failed else "the suite is green under these settings")
    return int(bool(failed))


def _has_avx512() -> bool:
    import torch

    return "AVX512" in torch.backends.cpu.get_cpu_capability()


if __name__ == "__main__":
    sys.exit(main())

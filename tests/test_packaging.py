"""What gets installed, what gets imported, and what that costs."""

from __future__ import annotations

import math
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(code: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)  # type: ignore[call-overload]


def test_the_kernels_folder_is_no_package_of_that_name() -> None:
    """transformers, diffusers and peft probe for a PyPI package called 'kernels' and break on an impostor."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for project in (ROOT, ROOT / "kernels"):
        find = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
        assert all(pattern.startswith("fastpref") for pattern in find["include"])


def test_wheels_ship_their_own_package_whole_and_nothing_else(tmp_path: Path) -> None:
    for name in ("fastpref", "kernels/fastpref_kernels"):
        project = (ROOT / name).parent
        copy = tmp_path / Path(name).name
        shutil.copytree(ROOT / name, copy / Path(name).name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
            if (project / file).is_file():
                shutil.copy(project / file, copy)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
        subprocess.run([*command, str(copy)], check=True, capture_output=True, timeout=120)
        (wheel,) = tmp_path.glob(f"{copy.name}-*.whl")
        shipped = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
        sources = {p.relative_to(copy).as_posix() for p in (copy / copy.name).rglob("*") if p.is_file()}
        assert shipped == sources


def test_kernels_import_neither_diffusers_nor_fastpref() -> None:
    result = run_python(
        "import sys, fastpref_kernels\n"
        "assert not {'diffusers', 'transformers', 'peft', 'fastpref'} & set(sys.modules), 'heavy import'"
    )
    assert result.returncode == 0, result.stderr


def test_help_needs_neither_torch_nor_diffusers() -> None:
    result = run_python(
        "import sys; sys.argv = ['fastpref', '--help']\n"
        "from fastpref.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'pydantic'} & set(sys.modules), 'heavy import'"
    )
    assert result.returncode == 0, result.stderr


def test_help_costs_little_more_than_the_library_of_the_command_line() -> None:
    """Processor time, the best of three of each, taken in turns: neither a busy machine nor a slow one decides it."""
    least = {("-c", "import typer, rich.console"): math.inf, ("-m", "fastpref.cli", "--help"): math.inf}
    for _ in range(3):
        for arguments in least:
            began = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
            least[arguments] = min(least[arguments], spent)
    library, command = least.values()
    assert command < 2 * library


def test_training_needs_no_pipelines_no_tracker_and_libraries_import_with_the_repository_root_on_the_path() -> None:
    """Training first; then nothing at the top of the repository hides a package that the libraries look for."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import fastpref.train.job\n"
        "assert not {'diffusers', 'transformers', 'peft', 'tensorboard', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "import diffusers.models.unets.unet_2d_condition\n"
        "assert 'diffusers.pipelines.stable_diffusion_xl' not in sys.modules\n"
        "from transformers import CLIPTextModel, CLIPModel\n"
        "from diffusers import StableDiffusionXLPipeline\n"
        "from peft import LoraConfig, get_peft_model_state_dict\n"
    )
    result = run_python(code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_constraints_pin_every_dependency_that_decides_numerics() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert {"torch", "triton", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed"} <= set(
        pins
    )

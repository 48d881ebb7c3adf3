"""Which scheduler configs are a DDPM schedule, and that ᾱ is the one their own class computes."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, schedulers
from typer.testing import CliRunner

from fastpref.cli import app
from fastpref.config import load_config
from fastpref.errors import UserError
from fastpref.models.loading import load_noise_schedule, resolve_model_dir
from fastpref.models.noise_schedule import DEFAULT_BETAS, ddim_settings, noise_schedule

SHORT = {"num_train_timesteps": 50}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **SHORT}
ZERO_SNR = {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SETTINGS: dict[str, dict[str, Any]] = {
    "the class's own betas": {},
    "linear": {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear", **SHORT},
    "scaled_linear": SCALED,
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2", **SHORT},
    "trained_betas": {"trained_betas": [0.01 + 0.001 * i for i in range(50)], **SHORT},
}
ZERO_SNR_CLASSES = [
    "DDIM",
    "DDIMParallel",
    "DDPM",
    "DDPMParallel",
    "DPMSolverMultistep",
    "EulerDiscrete",
    "UniPCMultistep",
]


def schedule(config: dict[str, Any]) -> torch.Tensor:
    return noise_schedule(ddim_settings(config, "here"), "here").alphas_cumprod


@pytest.fixture
def open_class(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A scheduler's class by its name; that of one imports a package which its ᾱ has no need of."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    monkeypatch.delitem(sys.modules, "diffusers.schedulers.scheduling_dpmsolver_sde", raising=False)
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    found = {"DPMSolverSDEScheduler": module.DPMSolverSDEScheduler}
    return lambda name: found.get(name) or getattr(schedulers, name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", sorted(DEFAULT_BETAS))
def test_alphas_are_bit_for_bit_those_of_the_class_itself(
    open_class: Callable[[str], Any], name: str, settings: dict[str, Any]
) -> None:
    own = open_class(name)(**settings).alphas_cumprod.double()
    assert torch.equal(schedule({"_class_name": name, **settings}), own)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZERO_SNR_CLASSES)
def test_zero_terminal_snr_is_that_of_the_class(open_class: Callable[[str], Any], name: str) -> None:
    """Some put 2^-24 in place of ᾱ_T = 0, so that their σ = √(1/ᾱ - 1) is finite; a model is trained with 0."""
    own = open_class(f"{name}Scheduler")(**ZERO_SNR).alphas_cumprod.double()
    ours = schedule({"_class_name": f"{name}Scheduler", **ZERO_SNR})
    assert torch.equal(ours[:-1], own[:-1]) and ours[-1] == 0 and own[-1] in (0, 2.0**-24)


def test_zero_terminal_snr_survives_a_change_of_class() -> None:
    """A config keeps the setting when the pipeline changes to a class without it; diffusers' trainers honour it."""
    left = {"_class_name": "PNDMScheduler", **ZERO_SNR}
    assert torch.equal(schedule(left), DDPMScheduler.from_config(left).alphas_cumprod.double())
    assert schedule(left)[-1] == 0


FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"_class_name": name}, f"the scheduler is {name}") for name in (FLOW, "EDMEulerScheduler", "LCMScheduler")),
        ({"_class_name": FLOW}, "a flow-matching model"),
        ({"_class_name": "LCMScheduler"}, "distilled to few steps"),
        ({"_class_name": "TCDScheduler"}, "distilled to few steps"),
        ({"_class_name": "DDIMInverseScheduler"}, "which fastpref does not know"),
        ({"_class_name": ["DDIMScheduler"]}, "which fastpref does not know"),
        ({"_class_name": None}, "names no class"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type is continuous"),
        ({"variance_type": "learned_range"}, "variance_type is learned_range"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"timestep_spacing": "cubic"}, "timestep_spacing is 'cubic'"),
        ({"beta_end": 1.0}, "a beta is 1.0"),
        ({"beta_start": -0.1}, "a beta is -0.1"),
        ({"beta_start": "0.1"}, "a beta is '0.1'"),
        ({"beta_end": float("nan")}, "a beta is nan"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000 timesteps"),
        ({"trained_betas": 0.1}, "no trained_betas"),
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 1.5, 0.2]}, "a beta is 1.5"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": 1000.5}, "num_train_timesteps is 1000.5"),
        ({"_use_default_values": 5}, "_use_default_values is not a list"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is set with prediction_type epsilon"),
        ({"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes'"),
        ({"beta_start": 1e-12, "beta_end": 1e-12}, "the noise levels do not rise"),
        ({"beta_start": 0.5, "beta_end": 0.99}, "the noise levels do not rise"),  # ᾱ underflows
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 1 - 1e-9, 0.1]}, "the noise levels do not rise"),
        ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.1, 1 - 1e-9]}, "nothing is left of the picture"),
    ],
)
def test_anything_else_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as found:
        schedule({"_class_name": "DDIMScheduler", **settings})
    assert "here" in str(found.value)


@pytest.fixture
def folder(sdxl: Path, tmp_path: Path) -> Path:
    """A copy of the random SDXL whose scheduler can be written to."""
    copy = tmp_path / "model"
    shutil.copytree(sdxl, copy, copy_function=lambda a, b: Path(b).hardlink_to(a))
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        text = (copy / name).read_text()
        (copy / name).unlink()
        (copy / name).write_text(text)
    return copy


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def name_in_index(folder: Path, entry: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scheduler": entry}))


@pytest.mark.parametrize(
    "command",
    [
        *(f"train RECIPE method={method}" for method in ("sft", "dpo", "rpo", "spo", "lpo")),
        *(f"train RECIPE train=full method={method}" for method in ("spm", "lrm")),
        "prepare RECIPE",
        "prepare RECIPE --dry-run",
        "prepare RECIPE --reference method=dpo",
        "plan RECIPE",
        "plan RECIPE method=spo",
        "sample RECIPE --prompt red --out OUT",
        "evaluate MODEL --out OUT",
        "make-pairs RECIPE --prompts PROMPTS --style pixels --out OUT",
    ],
)
def test_every_command_refuses_before_it_begins(folder: Path, tmp_path: Path, command: str) -> None:
    rewrite(folder, _class_name=FLOW)
    places = {"RECIPE": tmp_path / "recipe.yaml", "MODEL": folder, "OUT": tmp_path / "out"}
    places["PROMPTS"] = tmp_path / "prompts.txt"
    places["PROMPTS"].write_text("a red cat\n")
    made = [f"store: {tmp_path / 'store'}", f"output_dir: {tmp_path / 'runs'}"]
    places["RECIPE"].write_text("\n".join([f"model: {folder}", *made]))
    before = set(tmp_path.rglob("*"))
    answer = CliRunner().invoke(app, [str(places.get(word, word)) for word in command.split()])
    assert isinstance(answer.exception, UserError), answer.output
    assert f"the scheduler is {FLOW}, which is for a flow-matching model" in str(answer.exception)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["diffusers", FLOW], f"the scheduler is {FLOW}"),
        (["my_module", "DDIMScheduler"], "says that the scheduler is"),
        ([None, None], "says that the scheduler is"),
        ("DDIMScheduler", "says that the scheduler is"),
    ],
)
def test_the_class_in_model_index_counts_too(folder: Path, entry: Any, message: str) -> None:
    """diffusers opens the class that model_index.json names, so neither may be of another process."""
    name_in_index(folder, entry)
    with pytest.raises(UserError, match=message):
        resolve_model_dir(str(folder))


def test_two_known_classes_may_differ(folder: Path) -> None:
    """Betas that the config leaves out are those of the class that diffusers opens."""
    kept = {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(kept))
    name_in_index(folder, ["diffusers", "HeunDiscreteScheduler"])
    found = load_noise_schedule(folder)
    heun = schedulers.HeunDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    assert torch.equal(found.alphas_cumprod, heun.alphas_cumprod.double())
    assert found.prediction_type == "v_prediction"


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_broken_config_is_one_line(folder: Path, text: str | None) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=r"scheduler_config\.json"):
        resolve_model_dir(str(folder))


def test_the_bundled_model_has_a_known_schedule() -> None:
    assert load_noise_schedule(resolve_model_dir(load_config("").model)).num_train_timesteps == 1000

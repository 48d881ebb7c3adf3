"""Which files of a model's folder are its weights: sharded or not, safetensors or pickled, with or without a variant.

Everything that opens, counts, copies or describes weights asks here, so that all of it means the same files.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.errors import UserError
from fastpref.models.state_dict import read_state_dict

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIANTS = ("fp32", "fp16", "bf16")  # the most precise first; others, such as ema and non_ema, are other weights
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STEMS = {"safetensors": ("diffusion_pytorch_model", "model"), "bin": ("diffusion_pytorch_model", "pytorch_model")}
_ANY = ("*.safetensors", "*.bin", "*.safetensors.index*.json", "*.bin.index*.json")


@dataclass(frozen=True)
class Weights:
    """The weights that are loaded from a folder."""

    folder: Path
    suffix: str  # safetensors or bin
    variant: str | None
    index: Path | None  # of shards
    files: tuple[Path, ...]

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` has to be told to open them."""
        return {"variant": self.variant, "use_safetensors": self.suffix == "safetensors"}

    @property
    def on_disk(self) -> tuple[Path, ...]:
        """Every file they consist of, the index among them."""
        return self.files if self.index is None else (*self.files, self.index)

    def plain_name(self, file: Path) -> str:
        """The name under which ``from_pretrained`` finds a file without being told a variant; shards keep theirs."""
        if self.variant is None or (self.index is not None and file != self.index):
            return file.name
        return file.name.replace(f".{self.variant}.", ".")


def find_weights(folder: Path) -> Weights | None:
    """The weights in a folder, or None.

    Those without a variant come first, as in diffusers and transformers; a folder that holds nothing else is opened
    by its variant.

    Raises:
        UserError: an index is damaged or names a file that is not there.
    """
    for variants in ((None,), VARIANTS):
        for suffix, stems in _STEMS.items():
            for variant in variants:
                middle = "" if variant is None else f".{variant}"
                for stem in stems:
                    whole = folder / f"{stem}{middle}.{suffix}"
                    index = folder / f"{stem}.{suffix}.index{middle}.json"
                    # With both there, diffusers opens the shards and transformers the whole file.
                    kinds = (index, whole) if stem.startswith("diffusion") else (whole, index)
                    found = next((file for file in kinds if file.is_file()), None)
                    if found is not None:
                        shards = _shards(index) if found == index else (whole,)
                        return Weights(folder, suffix, variant, index if found == index else None, shards)
    return None


def weights_of(folder: Path) -> Weights:
    """The weights in a folder.

    Raises:
        UserError: there are none, or an index is damaged.
    """
    found = find_weights(folder)
    if found is None:
        others = sorted(file.name for pattern in _ANY for file in folder.glob(pattern))
        has = (
            f"there are only {', '.join(others[:3])}"
            if others
            else "it needs diffusion_pytorch_model.safetensors or the like"
        )
        raise UserError("no weights that can be loaded", str(folder), f"{has}; copy the model again")
    return found


def weight_files(folder: Path) -> set[Path]:
    """All files of a folder that hold weights or list them, loaded or not."""
    return {file for pattern in (*_ANY, "*.msgpack", "*.onnx*", "*.ckpt", "*.h5") for file in folder.glob(pattern)}


def tensor_facts(file: Path) -> Iterator[tuple[str, str, torch.Size]]:
    """(name, safetensors dtype, shape) of every tensor in a file; of safetensors only the header is read.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        names = {dtype: name for name, dtype in FLOATS.items()}
        for name, tensor in read_state_dict(file, "state_dict").items():
            yield name, names.get(tensor.dtype, str(tensor.dtype)), tensor.shape
        return
    try:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored = opened.get_slice(name)
                yield name, stored.get_dtype(), torch.Size(stored.get_shape())
    except (OSError, SafetensorError) as error:
        raise UserError("cannot read the weights", str(file), f"{error}; copy the file again") from error


def stored_dtype(source: Path) -> torch.dtype:
    """The floating-point dtype that most values of a folder's weights, or of a file, have."""
    values: Counter[str] = Counter()
    for file in (source,) if source.is_file() else weights_of(source).files:
        for _, dtype, shape in tensor_facts(file):
            values[dtype] += shape.numel() if dtype in FLOATS else 0
    return FLOATS[values.most_common(1)[0][0]] if values.total() else torch.float32


def stored_values(folder: Path) -> int:
    """Values in the weights that are loaded from a folder; in one of another layout, in all its safetensors."""
    found = find_weights(folder)
    files = found.files if found else folder.glob("*.safetensors")
    return sum(shape.numel() for file in files for _, _, shape in tensor_facts(file))


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = tuple(sorted(index.parent / Path(name).name for name in names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("cannot read the index of the shards", str(index), f"{error}; copy the model again") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        lost = f"{missing[0]} is not there" if missing else "it lists none"
        raise UserError(f"a shard of the weights is missing: {lost}", str(index), "copy the model again")
    return files

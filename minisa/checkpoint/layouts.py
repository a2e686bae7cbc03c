"""open_checkpoint: which format lies at a path, the model's config and where each tensor is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from minisa.checkpoint import ggml, names
from minisa.checkpoint.description import config_from_gguf, config_from_hf, config_from_params
from minisa.checkpoint.files import DataFile, FileTensor, StoredTensor
from minisa.checkpoint.gguf import TensorInfo, find_gguf, read_gguf_parts
from minisa.checkpoint.pth import read_pth
from minisa.checkpoint.safetensors import read_safetensors
from minisa.checkpoint.shards import merge, read_shards
from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.files import read_json

BESIDE_THE_WEIGHTS = (
    "config.json", "params.json", "generation_config.json", "added_tokens.json", "tekken.json", "tokenizer.json",
    "tokenizer.model*", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
    "original/tokenizer.model",
)  # fmt: skip

_Read = Callable[[Path], dict[str, FileTensor]]
# Description, name and suffix of the weights, their reader, the format; a folder is read as the first that is there.
_LAYOUTS: tuple[tuple[str, str, str, _Read, str], ...] = (
    ("config.json", "model", ".safetensors", read_safetensors, "Hugging Face safetensors"),
    ("config.json", "pytorch_model", ".bin", read_pth, "Hugging Face pytorch_model.bin"),
    ("params.json", "consolidated", ".safetensors", read_safetensors, "Mistral's consolidated.safetensors"),
    ("params.json", "consolidated", ".pth", read_pth, "consolidated.pth"),
)
_ROWS = 256  # compared at once


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, of which only the headers have been read.

    tensors: by the model's parameter names, in the order they lie in the files.
    unknown: the names of tensors that no Llama has; load_weights refuses them.
    interleaved: the RoPE pairs of a q or k head are rows (0, 1), (2, 3), …, not (0, d/2), (1, d/2+1), …
    format: for messages. files: where the weights lie.
    replaced: the parameters that a plan's delta brings; these are never interleaved.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    unknown: tuple[str, ...]
    interleaved: bool
    format: str
    files: tuple[DataFile, ...]
    replaced: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """What the weights take on disk."""
        return sum(file.size for file in self.files)


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Whole heads of wq or wk [out, in] as an interleaved checkpoint has them: its row 2j + p is p · head_dim/2 + j."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path: a directory in Hugging Face's, Meta's or Mistral's layout, or a GGUF file.

    Raises MinisaError when there is none, or its headers are not those of a Llama.
    """
    try:
        return _open_directory(path) if path.is_dir() else _open_gguf(path)
    except OSError as error:
        raise MinisaError(
            f"{error.filename or path}: {error.strerror}: expected a readable .gguf file or checkpoint directory"
        ) from None


def _open_directory(path: Path) -> Checkpoint:
    for description, stem, suffix, read, format in _LAYOUTS:
        if (path / description).is_file() and (ranks := _read_weights(path, stem, suffix, read)):
            return _open_described(path / description, ranks, format)
    models = find_gguf(path)
    if len(models) == 1:
        return _open_gguf(models[0])
    if models:
        raise MinisaError(f"{path}: holds {len(models)} GGUF models: name one, such as {models[0]}")
    raise MinisaError(
        f"{path}: no model in this directory: looked for config.json with model.safetensors or pytorch_model.bin (or "
        "an index of either), params.json with consolidated.*.pth or consolidated.safetensors, or one .gguf file"
    )


def _read_weights(path: Path, stem: str, suffix: str, read: _Read) -> list[dict[str, FileTensor]]:
    """The tensors of one file, or of all that an index lists, or of each of Meta's ranks; [] where none is there."""
    if (single := path / f"{stem}{suffix}").is_file():
        return [read(single)]
    if (index := path / f"{stem}{suffix}.index.json").is_file():
        return [read_shards(index, suffix, read)]
    ranks = sorted(path.glob("consolidated.[0-9][0-9].pth")) if suffix == ".pth" else []
    for i, rank in enumerate(ranks):
        if rank.name != (expected := f"consolidated.{i:02}.pth"):
            raise MinisaError(f"{path / expected}: missing, and {rank.name} is there: fetch every shard")
    return [read(rank) for rank in ranks]


def _open_described(file: Path, ranks: list[dict[str, FileTensor]], format: str) -> Checkpoint:
    """A checkpoint whose description is a JSON file of Hugging Face's (config.json), or Meta's or Mistral's."""
    description, hugging_face = read_json(file), file.name == "config.json"
    naming = names.HUGGING_FACE if hugging_face else names.META
    renamed = [naming.rename(rank) for rank in ranks]
    for known, _ in renamed:
        _check_stored(known)
    tensors = merge([known for known, _ in renamed], description.get("dim"))
    embedding = tensors.get("tok_embeddings.weight")
    with describing(file):
        if hugging_face:
            config = config_from_hf(description)
        elif embedding is None or len(embedding.shape) != 2:
            raise MinisaError("the weights lack a matrix tok_embeddings.weight: are they a Llama's?")
        else:
            config = config_from_params(description, vocab_size=embedding.shape[0])
    head = tensors.pop("output.weight", None) if config.tie_embeddings else None  # some files repeat the embedding
    if head is not None and not _are_equal(head, embedding):
        raise MinisaError(
            f"{file}: the embeddings are tied, and {head.name} is not the embedding: "
            "set tie_word_embeddings to false, or leave that tensor out"
        )
    files = dict.fromkeys(tensor.file for known, _ in renamed for tensor in known.values())
    unknown = dict.fromkeys(name for _, strange in renamed for name in strange)
    return Checkpoint(file.parent, config, tensors, tuple(unknown), not hugging_face, format, tuple(files))


def _check_stored(tensors: Mapping[str, FileTensor]) -> None:
    """Raises MinisaError for a tensor that is not stored as a float type, and for two that share bytes.

    Sharing lets a file of a few kilobytes describe any number of gigabytes; only a tied output head has a use for it.
    """
    for tensor in tensors.values():
        tensor.require_weight_dtype()
    apart = [tensor for name, tensor in tensors.items() if name != "output.weight"]
    apart.sort(key=lambda tensor: (str(tensor.file.path), tensor.offset))
    for before, after in pairwise(apart):
        if before.file is after.file and after.offset < before.end:
            raise MinisaError(f"{after.file.path}: {after.name!r} has bytes of another tensor: the file is damaged")


def _are_equal(one: StoredTensor, other: StoredTensor | None) -> bool:
    if other is None or one.shape != other.shape or not one.shape:
        return False
    spans = ((start, min(start + _ROWS, one.shape[0])) for start in range(0, one.shape[0], _ROWS))
    return all(torch.equal(one.read_rows(*span), other.read_rows(*span)) for span in spans)


def _open_gguf(path: Path) -> Checkpoint:
    headers = read_gguf_parts(path)
    files = [DataFile(header.path) for header in headers]
    places = {info.name: (info, file) for header, file in zip(headers, files, strict=True) for info in header.tensors}
    with describing(headers[0].path):
        factors = _rope_factors(*places["rope_freqs.weight"]) if "rope_freqs.weight" in places else None
        config = config_from_gguf(headers[0].metadata, tied="output.weight" not in places, rope_factors=factors)
        known, unknown = names.GGUF.rename(places)
        tensors = {
            name: ggml.stored(info.name, info.shape, info.type, file, info.offset)
            for name, (info, file) in known.items()
        }
    return Checkpoint(path, config, tensors, unknown, True, "GGUF", tuple(files))


def _rope_factors(info: TensorInfo, file: DataFile) -> tuple[float, ...]:
    if info.type.name != "F32" or len(info.shape) != 1 or info.shape[0] > 1 << 16:
        raise MinisaError(f"rope_freqs.weight is {info.type.name} {list(info.shape)}: expected a vector of F32")
    return tuple(file.read(info.offset, info.nbytes).view(torch.float32).tolist())


@contextmanager
def describing(path: Path) -> Iterator[None]:
    """Put the path of a model's description before whatever is found wrong with it."""
    try:
        yield
    except MinisaError as error:
        raise MinisaError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise MinisaError(f"{path}: not the description of a model ({error})") from None

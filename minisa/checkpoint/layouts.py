"""open_checkpoint: which format lies at a path, the model's config and where each tensor is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisa.checkpoint import ggml, names
from minisa.checkpoint.description import config_from_gguf, config_from_hf, config_from_params
from minisa.checkpoint.files import DataFile, FileTensor, StoredTensor
from minisa.checkpoint.gguf import TensorInfo, find_gguf, read_gguf_parts
from minisa.checkpoint.pth import merge, read_pth
from minisa.checkpoint.safetensors import read_safetensors
from minisa.checkpoint.shards import read_shards
from minisa.config import ModelConfig
from minisa.errors import MinisaError
from minisa.files import read_json

LOOKED_FOR = (
    "config.json with model.safetensors or pytorch_model.bin (or an index of either), params.json with "
    "consolidated.*.pth or consolidated.safetensors, or one .gguf file"
)
BESIDE_THE_WEIGHTS = (
    "config.json", "params.json", "generation_config.json", "added_tokens.json", "tekken.json", "tokenizer.json",
    "tokenizer.model*", "tokenizer_config.json", "chat_template.jinja", "original/tokenizer.model",
)  # fmt: skip

_PIECE = 1 << 20  # bytes compared at once


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, of which only the headers have been read.

    tensors: by the model's parameter names, in the order they lie in the files.
    unknown: the names of tensors that no Llama has; load_weights refuses them.
    interleaved: the RoPE pairs of a q or k head are rows (0, 1), (2, 3), …, not (0, d/2), (1, d/2+1), …
    format: for messages. files: where the weights lie.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    unknown: tuple[str, ...]
    interleaved: bool
    format: str
    files: tuple[DataFile, ...]

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
        if path.is_dir():
            return _open_directory(path)
        if path.exists() and not path.is_file():
            raise MinisaError(f"{path}: neither a file nor a directory: expected a checkpoint")
        return _open_gguf(path)
    except OSError as error:
        raise MinisaError(
            f"{error.filename or path}: {error.strerror}: expected a readable .gguf file or checkpoint directory"
        ) from None


def _open_directory(path: Path) -> Checkpoint:
    if (path / "config.json").is_file():
        if (stored := _weights(path, "model", ".safetensors", read_safetensors)) is not None:
            return _open_hugging_face(path, stored, "Hugging Face safetensors")
        if (stored := _weights(path, "pytorch_model", ".bin", read_pth)) is not None:
            return _open_hugging_face(path, stored, "Hugging Face pytorch_model.bin")
    if (path / "params.json").is_file():
        if (stored := _weights(path, "consolidated", ".safetensors", read_safetensors)) is not None:
            return _open_consolidated(path, [stored], "Mistral's consolidated.safetensors")
        if shards := _consolidated_shards(path):
            return _open_consolidated(path, [read_pth(shard) for shard in shards], "consolidated.pth")
    models = find_gguf(path)
    if len(models) == 1:
        return _open_gguf(models[0])
    if models:
        raise MinisaError(f"{path}: holds {len(models)} GGUF models: name one, such as {models[0]}")
    raise MinisaError(f"{path}: no model in this directory: looked for {LOOKED_FOR}")


def _weights(
    path: Path, stem: str, suffix: str, read: Callable[[Path], dict[str, FileTensor]]
) -> dict[str, FileTensor] | None:
    """What the one file holds, or all that an index lists; None where there is neither."""
    if (single := path / f"{stem}{suffix}").is_file():
        return read(single)
    if (index := path / f"{stem}{suffix}.index.json").is_file():
        return read_shards(index, suffix, read)
    return None


def _consolidated_shards(path: Path) -> list[Path]:
    shards = sorted(path.glob("consolidated.[0-9][0-9].pth"))
    for i, shard in enumerate(shards):
        if shard.name != (expected := f"consolidated.{i:02}.pth"):
            raise MinisaError(f"{path / expected}: missing, and {shard.name} is there: fetch every shard")
    return shards


def _open_hugging_face(path: Path, stored: dict[str, FileTensor], format: str) -> Checkpoint:
    description = read_json(path / "config.json")
    with describing(path / "config.json"):
        config = config_from_hf(description)
    tensors, unknown = names.HUGGING_FACE.rename(stored)
    _refuse_overlaps(tensors)
    for tensor in tensors.values():
        tensor.require_weight_dtype()
    head = tensors.pop("output.weight", None) if config.tie_embeddings else None  # some files repeat the embedding
    if head is not None and not _are_alike(head, tensors.get("tok_embeddings.weight")):
        raise MinisaError(
            f"{path / 'config.json'}: tie_word_embeddings is true, and {head.name} is not the embedding: "
            "set it to false, or leave that tensor out"
        )
    return Checkpoint(path, config, tensors, unknown, False, format, _files(tensors.values()))


def _are_alike(one: FileTensor, other: FileTensor | None) -> bool:
    if other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    nbytes = math.prod(one.shape) * one.dtype.itemsize
    pieces = ((start, min(_PIECE, nbytes - start)) for start in range(0, nbytes, _PIECE))
    return all(
        torch.equal(one.file.read(one.offset + start, length), other.file.read(other.offset + start, length))
        for start, length in pieces
    )


def _open_consolidated(path: Path, shards: list[dict[str, FileTensor]], format: str) -> Checkpoint:
    named = [names.META.rename(shard) for shard in shards]
    plain = [tensor for tensors, _ in named for tensor in tensors.values()]
    for known, _ in named:
        _refuse_overlaps(known)
    for tensor in plain:
        tensor.require_weight_dtype()
    params = read_json(path / "params.json")
    tensors = merge([tensors for tensors, _ in named], params.get("dim"))
    embedding = tensors.get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise MinisaError(f"{path}: the weights lack a matrix tok_embeddings.weight: are they a Llama's?")
    with describing(path / "params.json"):
        config = config_from_params(params, vocab_size=embedding.shape[0])
    unknown = tuple(dict.fromkeys(name for _, strange in named for name in strange))
    return Checkpoint(path, config, tensors, unknown, True, format, _files(plain))


def _refuse_overlaps(tensors: Mapping[str, FileTensor]) -> None:
    """What torch.save writes can describe any number of tensors with the same bytes; a tied output head is the one use
    of it."""
    ends: dict[DataFile, int] = {}
    apart = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
    for tensor in sorted(apart.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < ends.get(tensor.file, 0):
            raise MinisaError(f"{tensor.file.path}: {tensor.name!r} has bytes of another tensor: the file is corrupt")
        ends[tensor.file] = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize


def _open_gguf(path: Path) -> Checkpoint:
    headers = read_gguf_parts(path)
    infos = {info.name: info for header in headers for info in header.tensors}
    files = {info.name: file for header in headers for file in [DataFile(header.path)] for info in header.tensors}
    with describing(headers[0].path):
        factors = _rope_factors(infos.get("rope_freqs.weight"), files)
        config = config_from_gguf(headers[0].metadata, tied="output.weight" not in infos, rope_factors=factors)
        if factors and len(factors) != config.head_dim // 2:
            raise MinisaError(
                f"rope_freqs.weight has {len(factors)} values: expected {config.head_dim // 2}, half of head_dim"
            )
        known, unknown = names.GGUF.rename(infos)
        tensors = {name: _stored(info, files[info.name]) for name, info in known.items()}
    return Checkpoint(path, config, tensors, unknown, True, "GGUF", _files(tensors.values()))


def _stored(info: TensorInfo, file: DataFile) -> FileTensor | ggml.QuantizedTensor:
    if dtype := ggml.PLAIN.get(info.type.name):
        return FileTensor(info.name, info.shape, dtype, file, info.offset)
    if len(info.shape) != 2:
        raise MinisaError(f"{info.name} is {info.type.name} {list(info.shape)}: expected only matrices to be quantized")
    try:
        decode = ggml.decoder(info.type)
    except MinisaError as error:
        raise MinisaError(f"{info.name}: {error}") from None
    return ggml.QuantizedTensor(info.name, info.shape, info.type, decode, file, info.offset)


def _rope_factors(info: TensorInfo | None, files: Mapping[str, DataFile]) -> tuple[float, ...] | None:
    if info is None:
        return None
    if info.type.name != "F32" or len(info.shape) != 1 or info.shape[0] > 1 << 16:
        raise MinisaError(f"rope_freqs.weight is {info.type.name} {list(info.shape)}: expected a vector of F32")
    factors = files[info.name].read(info.offset, info.nbytes).view(torch.float32)
    if not (factors.isfinite() & (factors > 0)).all():
        raise MinisaError("rope_freqs.weight has values that are not positive numbers")
    return tuple(factors.tolist())


@contextmanager
def describing(path: Path) -> Iterator[None]:
    """Put the path of a model's description before whatever is found wrong with it."""
    try:
        yield
    except MinisaError as error:
        message = str(error).removeprefix(f"{path}: ").removeprefix(f"{path.name}: ")
        raise MinisaError(f"{path}: {message}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise MinisaError(f"{path}: not the description of a model ({error})") from None


def _files(tensors: Iterable[FileTensor | ggml.QuantizedTensor]) -> tuple[DataFile, ...]:
    return tuple(dict.fromkeys(tensor.file for tensor in tensors))

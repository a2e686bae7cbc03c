"""Byte-level BPE: Llama 3, tekken, and the GPT-2 kind of vocabulary in tokenizer.json and GGUF files.

Text is split by a regular expression and each piece is merged by tiktoken. The splitting is `regex`'s and not
tiktoken's own, which panics on a run of a million spaces; both take the patterns to mean the same.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

import regex
import tiktoken

from minisa.errors import MinisaError
from minisa.text.merges import merge_order, token_to_bytes

MAX_TOKENS = 1 << 20  # a bound for files that lie; the largest vocabularies have 260,000

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out first, one by one, so for the rest of GPT-2's rule a digit is the end of the text.
SMOLLM_SPLIT = r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# tokenizer.ggml.pre → how text is split, and whether a piece that is a token is left whole and BOS comes first
_GGUF_SPLITS = {
    "llama-bpe": (LLAMA3_SPLIT, True),
    "llama3": (LLAMA3_SPLIT, True),
    "llama-v3": (LLAMA3_SPLIT, True),
    "tekken": (TEKKEN_SPLIT, True),
    "smollm": (SMOLLM_SPLIT, False),
    "gpt-2": (GPT2_SPLIT, False),
}

_LLAMA3_TOKENS = 128_000
_LLAMA3_NAMES = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"),
    *(f"reserved_special_token_{n}" for n in range(2, 246)),
)  # 256, as of Llama 3.1; each stands between <| and |>

# What files that list no special tokens mean. v3 has no use yet for the three that v7 adds.
_TEKKEN_V3 = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    "[SUFFIX]",
)
_TEKKEN_V7 = (*_TEKKEN_V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")


class ByteLevelBPE:
    """A byte-level vocabulary.

    pieces: the bytes of each id, empty for special tokens. special: name → id.
    add_bos: whether the maker's own tokenizer puts BOS before plain text.
    bos_id: the token that it puts there, where the vocabulary's file says which.
    supposed: names of special tokens that the file does not give.
    """

    dummy_prefix = False
    bos_id: int | None = None
    supposed: Set[str] = frozenset()

    def __init__(
        self,
        split: str,
        vocab: Mapping[bytes, int],
        special: Mapping[str, int],
        *,
        ranked: Iterable[bytes] | None = None,
        whole_pieces: bool = True,
        visible: Iterable[str] = (),
        add_bos: bool,
    ) -> None:
        """split: matches the pieces of text that are encoded each by itself.
        vocab: token → id. It may lack single bytes (SmolLM2's has 235): text loses them, as it does at the makers'.
        ranked: the tokens that merging makes, the first to be made first; by default all, by their ids.
        whole_pieces: whether a piece of text that is a token stays whole even where merging does not make that token.
        visible: names of special tokens whose text decoding shows.
        """
        check_gapless([*vocab.values(), *special.values()])
        self.special = dict(special)
        self.add_bos = add_bos
        self.pieces = [b""] * (len(vocab) + len(special))
        for token, token_id in vocab.items():
            self.pieces[token_id] = token
        for name in visible:
            require_marker(name)
            self.pieces[special[name]] = name.encode()
        ranked = sorted(vocab, key=vocab.__getitem__) if ranked is None else ranked
        tokens = [*(bytes([byte]) for byte in range(256)), *(token for token in ranked if len(token) > 1)]
        self.lacking = bytes(token[0] for token in tokens[:256] if token not in vocab)
        self._ids = [vocab.get(token, -1) for token in tokens]
        self._whole = {token: vocab[token] for token in vocab.keys() - set(tokens)} if whole_pieces else {}
        self._split = regex.compile(split)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._bpe = tiktoken.Encoding("minisa", pat_str=split, mergeable_ranks=ranks, special_tokens={})

    def spelled(self, name: str) -> bytes:
        return name.encode()

    def encode(self, text: str, *, mid_text: bool) -> list[int]:
        merge = self._bpe._encode_single_piece  # of tiktoken's methods the one that takes bytes
        found: list[int] = []
        for piece in self._split.findall(text):
            data = piece.encode().translate(None, self.lacking)
            if data in self._whole:
                found.append(self._whole[data])
            elif data:
                found += [self._ids[rank] for rank in merge(data)]
        return found


def is_marker(name: str) -> bool:
    """Whether an added token is one that no text is meant to spell, such as <think> or [PAD]; else it is a word."""
    return not set(name).isdisjoint("<>[]{}|")


def require_marker(name: str) -> None:
    """Raises MinisaError for an added token that the makers' tokenizer finds in plain text, and minisa does not."""
    if not is_marker(name):
        raise MinisaError(f"the added token {name!r} is plain text: minisa finds only the vocabulary's own in a text")


def check_ids(ids: Iterable[object]) -> None:
    """Raises MinisaError for what is no token id, or an absurd one."""
    for token_id in ids:
        if not isinstance(token_id, int) or not 0 <= token_id < MAX_TOKENS:
            raise MinisaError(f"a token's id is {token_id!r}: expected 0 to {MAX_TOKENS - 1}")


def check_gapless(ids: Collection[int]) -> None:
    """Raises MinisaError unless the ids of a vocabulary are 0, 1, 2, …, each once, in any order."""
    if sorted(ids) != list(range(len(ids))):
        raise MinisaError(f"the tokens' ids are not 0 to {len(ids) - 1}, each once: is the file whole?")


def from_tiktoken(text: bytes) -> ByteLevelBPE:
    """Llama 3's tokenizer.model: lines of a token in base64 and its rank; the special tokens follow the last."""
    lines = (line.split() for line in text.splitlines())
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if len(ranks) != _LLAMA3_TOKENS:
        raise MinisaError(f"{len(ranks)} lines of tokens: expected Llama 3's {_LLAMA3_TOKENS}: is the file whole?")
    special = {f"<|{name}|>": _LLAMA3_TOKENS + n for n, name in enumerate(_LLAMA3_NAMES)}
    return ByteLevelBPE(LLAMA3_SPLIT, ranks, special, add_bos=True)


def from_tekken(raw: Mapping[str, Any]) -> ByteLevelBPE:
    """Mistral's tekken.json: the special tokens come first, fillers among them; the vocabulary is cut to size."""
    config = raw["config"]
    count = config["default_num_special_tokens"]
    if not 0 <= count <= len(raw["vocab"]):
        raise MinisaError(f"default_num_special_tokens is {count}: expected at most as many as tokens")
    if config["pattern"] != TEKKEN_SPLIT:  # another could take forever to match
        raise MinisaError(f"its pattern {config['pattern']!r} is not Mistral's: minisa knows no other in tekken.json")
    entries = raw["vocab"][: config["default_vocab_size"] - count]
    vocab = {base64.b64decode(entry["token_bytes"], validate=True): count + entry["rank"] for entry in entries}
    named = raw.get("special_tokens")
    unlisted = _TEKKEN_V3 if config.get("version") == "v3" else _TEKKEN_V7
    names = {n: f"<SPECIAL_{n}>" for n in range(count)}
    names |= dict(enumerate(unlisted)) if named is None else {entry["rank"]: entry["token_str"] for entry in named}
    special = {name: token_id for token_id, name in names.items()}
    vocabulary = ByteLevelBPE(TEKKEN_SPLIT, vocab, special, add_bos=True)
    if named is None:
        vocabulary.supposed = special.keys()
    return vocabulary


def from_tokenizer_json(raw: Mapping[str, Any]) -> ByteLevelBPE:
    """Hugging Face's tokenizer.json, if its model is byte-level BPE and splits text in a way known here."""
    model = raw["model"]
    check_bpe(model)
    added = raw.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added}
    bos_id = bos_of(raw)
    vocabulary = _from_merges(
        _split_of(raw),
        {token: token_id for token, token_id in model["vocab"].items() if token not in special},
        pairs_of(model),
        special,
        visible=[token["content"] for token in added if not token["special"]],
        whole_pieces=model.get("ignore_merges", False),
        add_bos=bos_id is not None,
    )
    vocabulary.bos_id = bos_id
    if vocabulary.lacking:  # bytes without a token are left out, as the makers' tokenizer does without an unk_token
        check_bpe(model, "unk_token")
    return vocabulary


def check_bpe(model: Mapping[str, Any], *unknown: str) -> None:
    """Raises MinisaError for a tokenizer.json's model that minisa does not know. unknown: other settings to refuse."""
    if model.get("type", "BPE") != "BPE":
        raise MinisaError(f"its model is {model['type']!r}: expected BPE; put the model's tokenizer.model beside it")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", *unknown):
        if model.get(key):
            raise MinisaError(f"its {key} is {model[key]!r}: minisa's BPE has none")


def pairs_of(model: Mapping[str, Any]) -> list[list[str]]:
    """The merges of a tokenizer.json's model, in either spelling."""
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]


def from_gguf(metadata: Mapping[str, Any]) -> ByteLevelBPE:
    """A GGUF file's tokenizer.ggml.* keys where tokenizer.ggml.model is "gpt2".

    Tokens of any type but normal are special; those a user defined show when decoded.
    """
    pre = metadata.get("tokenizer.ggml.pre", "missing")
    if pre not in _GGUF_SPLITS:
        raise MinisaError(f"tokenizer.ggml.pre is {pre!r}: expected one of {', '.join(_GGUF_SPLITS)}")
    split, whole_pieces = _GGUF_SPLITS[pre]
    entries = list(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    return _from_merges(
        split,
        {token: token_id for token_id, (token, kind) in enumerate(entries) if kind == 1},
        (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]),
        {token: token_id for token_id, (token, kind) in enumerate(entries) if kind != 1},
        visible=[token for token, kind in entries if kind == 4],
        whole_pieces=whole_pieces,
        add_bos=whole_pieces,
    )


def _from_merges(
    split: str, vocab: Mapping[str, int], merges: Iterable[list[str]], special: Mapping[str, int], **options: Any
) -> ByteLevelBPE:
    """From a vocabulary and merges in GPT-2's spelling. options: ByteLevelBPE's."""
    tokens = {token: token_to_bytes(token) for token in vocab}
    ids = {tokens[token]: token_id for token, token_id in vocab.items()}
    ranked = merge_order(((tokens[left], tokens[right]) for left, right in merges), ids)
    return ByteLevelBPE(split, ids, special, ranked=ranked, **options)


def _split_of(raw: Mapping[str, Any]) -> str:
    """The pattern that splits text as a tokenizer.json does. Raises MinisaError for steps that minisa does not know."""
    normalizer, pre_tokenizer, decoder = (raw.get(key) or {} for key in ("normalizer", "pre_tokenizer", "decoder"))
    steps = [{"use_regex": True} | step for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    if not normalizer and decoder.get("type") == "ByteLevel":
        match steps:
            case [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ] if pattern in (LLAMA3_SPLIT, TEKKEN_SPLIT):
                return pattern
            case [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ]:
                return SMOLLM_SPLIT
            case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
                return GPT2_SPLIT
    found = " + ".join(str(step.get("type")) for step in (normalizer, *steps, decoder))
    raise MinisaError(
        f"its normalizer, pre_tokenizer and decoder are {found}: expected no normalizer, the pre_tokenizer of Llama 3, "
        "tekken, SmolLM2 or GPT-2, and ByteLevel"
    )


def bos_of(raw: Mapping[str, Any]) -> int | None:
    """The token that a tokenizer.json's post_processor puts before a text; None where it puts none."""
    post_processor = raw.get("post_processor") or {}
    before: list[int] = []
    for step in post_processor.get("processors", [post_processor]):
        match step:
            case {"type": "TemplateProcessing", "single": [*marks, {"Sequence": _}]}:
                for mark in marks:
                    before += step["special_tokens"][mark["SpecialToken"]["id"]]["ids"]
            case {"type": kind} if kind != "ByteLevel":
                before += [-1, -1]  # not known here
    if len(before) > 1:
        raise MinisaError("its post_processor adds more to a text than one token before it: expected that, or none")
    return before[0] if before else None

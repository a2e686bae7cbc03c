"""Byte-level BPE: Llama 3, tekken, and the GPT-2 kind of vocabulary in tokenizer.json and GGUF files.

Text is split by a regular expression and each piece is merged by tiktoken. The splitting is `regex`'s and not
tiktoken's own, which panics on a run of a million spaces; both take the patterns to mean the same.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any

import regex
import tiktoken

from minisa.errors import MinisaError
from minisa.text.merges import BYTES, rank_merges, token_to_bytes

MAX_TOKENS = 1 << 20  # sanity bounds for files that lie; the largest vocabularies have 260,000
MAX_TOKEN = 1024  # bytes; the longest of the makers' has 128

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
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 246)),
)  # 256 names, as of Llama 3.1

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
        ranks: Mapping[bytes, int],
        vocab: Mapping[bytes, int],
        special: Mapping[str, int],
        *,
        visible: Collection[str] = (),
        add_bos: bool,
    ) -> None:
        """split: matches the pieces of text that are encoded each by itself.
        ranks: token → 0, 1, 2, …, the order in which tiktoken merges; all 256 bytes are among them.
        vocab: token → id. It may lack single bytes (SmolLM2's has 235): text loses them, as it does at the makers'.
        visible: names of special tokens whose text decoding shows.
        """
        if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise MinisaError(f"the vocabulary lacks the byte {lacking[0]:#04x}: is the file whole?")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise MinisaError("the vocabulary's ranks have gaps or repeat: is the file whole?")
        ids = check_ids([*vocab.values(), *special.values()])
        self.special = dict(special)
        self.add_bos = add_bos
        self.pieces = [b""] * (1 + max(ids))
        for token, token_id in vocab.items():
            self.pieces[token_id] = token
        for name in visible:
            require_marker(name)
            self.pieces[special[name]] = name.encode()
        self._ids = [0] * len(ranks)
        for token, rank in ranks.items():
            self._ids[rank] = vocab.get(token, 0) if len(token) == 1 else vocab[token]
        self.lacking = bytes(token[0] for token in ranks if len(token) == 1 and token not in vocab)
        self._split = regex.compile(split)
        self._bpe = tiktoken.Encoding("minisa", pat_str=split, mergeable_ranks=dict(ranks), special_tokens={})

    def spelled(self, name: str) -> bytes:
        return name.encode()

    def encode(self, text: str, *, mid_text: bool) -> list[int]:
        ids, lacking = self._ids, self.lacking
        merge = self._bpe._encode_single_piece  # of tiktoken's methods the one that takes bytes
        pieces = (piece.encode().translate(None, lacking) for piece in self._split.findall(text))
        return [ids[rank] for piece in pieces if piece for rank in merge(piece)]


def is_marker(name: str) -> bool:
    """Whether an added token is one that no text is meant to spell, such as <think> or [PAD]; else it is a word."""
    return not set(name).isdisjoint("<>[]{}|")


def require_marker(name: str) -> None:
    """Raises MinisaError for an added token that the makers' tokenizer finds in plain text, and minisa does not."""
    if not is_marker(name):
        raise MinisaError(f"the added token {name!r} is plain text: minisa finds only the vocabulary's own in a text")


def check_ids(ids: Collection[object]) -> list[int]:
    """The same ids, known to be token ids. Raises MinisaError where one is none, or stands twice."""
    known = []
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < MAX_TOKENS:
            raise MinisaError(f"a token's id is {token_id!r}: expected 0 to {MAX_TOKENS - 1}")
        known.append(token_id)
    if len(set(known)) < len(known):
        raise MinisaError("two tokens have the same id: is the file whole?")
    return known


def from_tiktoken(text: bytes) -> ByteLevelBPE:
    """Llama 3's tokenizer.model: lines of a token in base64 and its rank; the special tokens follow the last."""
    ranks = {}
    for line in text.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    if len(ranks) != _LLAMA3_TOKENS:
        raise MinisaError(f"{len(ranks)} lines of tokens: expected Llama 3's {_LLAMA3_TOKENS}: is the file whole?")
    special = {name: _LLAMA3_TOKENS + n for n, name in enumerate(_LLAMA3_SPECIAL)}
    return ByteLevelBPE(LLAMA3_SPLIT, ranks, ranks, special, add_bos=True)


def from_tekken(raw: Mapping[str, Any]) -> ByteLevelBPE:
    """Mistral's tekken.json: the special tokens come first, fillers among them; the vocabulary is cut to size."""
    config = raw["config"]
    count = config["default_num_special_tokens"]
    if not 0 <= count <= len(raw["vocab"]):
        raise MinisaError(
            f"default_num_special_tokens is {count}: expected 0 to {len(raw['vocab'])}, as many as tokens"
        )
    if config["pattern"] != TEKKEN_SPLIT:  # another could take forever to match
        raise MinisaError(
            f"its pattern {config['pattern']!r} is not one minisa knows: expected that of Mistral's tekken"
        )
    entries = raw["vocab"][: config["default_vocab_size"] - count]
    ranks = {base64.b64decode(entry["token_bytes"], validate=True): entry["rank"] for entry in entries}
    named = raw.get("special_tokens")
    unlisted = _TEKKEN_V3 if config.get("version") == "v3" else _TEKKEN_V7
    special = dict(zip(unlisted, itertools.count(), strict=False)) if named is None else {}
    special |= {entry["token_str"]: entry["rank"] for entry in named or ()}
    unnamed = set(range(count)) - set(special.values())
    special |= {f"<SPECIAL_{n}>": n for n in sorted(unnamed)}
    vocab = {token: rank + count for token, rank in ranks.items()}
    vocabulary = ByteLevelBPE(TEKKEN_SPLIT, ranks, vocab, special, add_bos=True)
    if named is None:
        vocabulary.supposed = special.keys()
    return vocabulary


def from_tokenizer_json(raw: Mapping[str, Any]) -> ByteLevelBPE:
    """Hugging Face's tokenizer.json, if its model is byte-level BPE and its pre_tokenizer one of those known here."""
    model = raw["model"]
    check_bpe(model)
    if raw.get("normalizer") is not None:
        raise MinisaError(f"its normalizer is {raw['normalizer'].get('type')!r}: minisa's BPE takes text as it is")
    if (decoder := raw.get("decoder") or {}).get("type") != "ByteLevel":
        raise MinisaError(f"its decoder is {decoder.get('type')!r}: expected 'ByteLevel'")
    split = _split_of(raw.get("pre_tokenizer"))
    added = raw.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added}
    if len(special) < len(added) or any(model["vocab"].get(name, special[name]) != special[name] for name in special):
        raise MinisaError("an added token stands twice, or has another id in the vocabulary: is the file whole?")
    visible = [token["content"] for token in added if not token["special"]]
    bos_id = bos_of(raw)
    vocabulary = _from_merges(
        split,
        {token: token_id for token, token_id in model["vocab"].items() if token not in special},
        pairs_of(model),
        special,
        visible=visible,
        whole_pieces=model.get("ignore_merges", False),
        add_bos=bos_id is not None,
    )
    vocabulary.bos_id = bos_id
    if vocabulary.lacking and model.get("unk_token") is not None:
        raise MinisaError(f"its unk_token is {model['unk_token']!r}: minisa's BPE leaves out bytes without a token")
    # Hugging Face's gives them these, whatever the file says.
    for token_id, name in enumerate((name for name in special if name not in model["vocab"]), len(model["vocab"])):
        if special[name] != token_id or not name:
            raise MinisaError(
                f"the added token {name!r} has the id {special[name]}: expected {token_id}, the next free"
            )
    return vocabulary


def check_bpe(model: Mapping[str, Any]) -> None:
    """Raises MinisaError for a tokenizer.json's model that is no BPE as minisa knows it."""
    if model.get("type", "BPE") != "BPE":
        raise MinisaError(f"its model is {model['type']!r}: expected BPE; put the model's tokenizer.model beside it")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise MinisaError(f"its {key} is {model[key]!r}: minisa's BPE has none")


def pairs_of(model: Mapping[str, Any]) -> Iterator[list[str]]:
    """The merges of a tokenizer.json's model, in either spelling."""
    return (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])


def from_gguf(metadata: Mapping[str, Any]) -> ByteLevelBPE:
    """A GGUF file's tokenizer.ggml.* keys where tokenizer.ggml.model is "gpt2".

    Tokens of any type but normal are special; those a user defined show when decoded.
    """
    pre = metadata.get("tokenizer.ggml.pre", "missing")
    if pre not in _GGUF_SPLITS:
        raise MinisaError(f"tokenizer.ggml.pre is {pre!r}: expected one of {', '.join(_GGUF_SPLITS)}")
    split, whole_pieces = _GGUF_SPLITS[pre]
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    entries = list(zip(tokens, range(len(tokens)), types, strict=True))
    vocab = {token: token_id for token, token_id, kind in entries if kind == 1}
    if len(vocab) < types.count(1):
        raise MinisaError("tokenizer.ggml.tokens has a token twice: is the file whole?")
    return _from_merges(
        split,
        vocab,
        (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]),
        {token: token_id for token, token_id, kind in entries if kind != 1},
        visible=[token for token, _, kind in entries if kind == 4],
        whole_pieces=whole_pieces,
        add_bos=whole_pieces,
    )


def _from_merges(
    split: str,
    vocab: Mapping[str, int],
    merges: Iterable[list[str]],
    special: Mapping[str, int],
    *,
    visible: Collection[str],
    whole_pieces: bool,
    add_bos: bool,
) -> ByteLevelBPE:
    """From a vocabulary and merges in GPT-2's spelling."""
    if any(len(token) > MAX_TOKEN for token in vocab):  # to follow its merges could take forever
        raise MinisaError(f"a token of more than {MAX_TOKEN} bytes: expected the makers' vocabulary")
    if letter := next((name for name in special if len(name) == 1), None):  # text would lose it
        raise MinisaError(f"the special token {letter!r} is a single character: expected it to be a normal token")
    tokens = {token: token_to_bytes(token) for token in vocab}
    ranks = rank_merges(((tokens[left], tokens[right]) for left, right in merges), BYTES, strays=whole_pieces)
    ids = {tokens[token]: token_id for token, token_id in vocab.items()}
    if whole_pieces and (loose := ids.keys() - ranks.keys()):
        raise MinisaError(f"no merge makes the token {min(loose)!r}: is the file whole?")
    return ByteLevelBPE(split, ranks, ids, special, visible=visible, add_bos=add_bos)


def _split_of(pre_tokenizer: Any) -> str:
    """The pattern that splits text as a tokenizer.json's pre_tokenizer does."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    match [{"use_regex": True} | step if step.get("type") == "ByteLevel" else step for step in steps]:
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
    found = " + ".join(str(step.get("type")) for step in steps) or repr(pre_tokenizer)
    raise MinisaError(f"its pre_tokenizer ({found}) is not one minisa knows: expected Llama 3's, tekken's or SmolLM2's")


def bos_of(raw: Mapping[str, Any]) -> int | None:
    """The token that a tokenizer.json's post_processor puts before a text; None where it puts none."""
    post_processor = raw.get("post_processor") or {}
    before: list[int] = []
    for step in post_processor.get("processors", [post_processor]):
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name}}, {"Sequence": _}]}:
                before += step["special_tokens"][name]["ids"]
            case {"type": "TemplateProcessing", "single": [{"Sequence": _}]} | {"type": "ByteLevel"}:
                pass
            case {"type": _}:
                before += [-1, -1]
    if len(before) > 1:
        raise MinisaError("its post_processor adds more to a text than one token before it: expected that, or none")
    return before[0] if before else None

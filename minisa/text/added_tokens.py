"""Tokens that a fine-tuner added: they stand in files beside the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from minisa.errors import MinisaError
from minisa.text.bytelevel import check_ids, require_marker

if TYPE_CHECKING:
    from minisa.text.tokenizer import Vocabulary


def add_tokens(vocabulary: Vocabulary, decoder: Mapping[str, Any], listed: Mapping[str, int]) -> None:
    """Give a vocabulary the tokens that a fine-tuner added, which a tokenizer.model does not know.

    decoder: added_tokens_decoder of tokenizer_config.json, id → token. listed: added_tokens.json, name → id.
    Raises MinisaError for ids that are taken, repeat or leave gaps.
    """
    added = {name: (token_id, True) for name, token_id in listed.items()}
    added |= {token["content"]: (int(key), bool(token.get("special", True))) for key, token in decoder.items()}
    size = len(vocabulary.pieces)
    special, names = vocabulary.special, {token_id: name for name, token_id in vocabulary.special.items()}
    for name, (token_id, is_special) in added.items():
        known = special.get(name)
        if known == token_id:
            continue
        if known is not None:  # its id was only supposed: the two names change places
            other = names.get(token_id, "")
            if not {name, other} <= vocabulary.supposed:
                raise MinisaError(f"the added token {name!r} has the id {token_id}, and {known} in the vocabulary")
            special[name], special[other] = token_id, known
            names[token_id], names[known] = name, other
            continue
        check_ids([token_id])
        vocabulary.pieces += [b""] * (token_id + 1 - len(vocabulary.pieces))
        piece, text = vocabulary.pieces[token_id], vocabulary.spelled(name)
        if piece == text and not is_special:  # listed, and nothing new
            continue
        if piece not in (b"", text):
            raise MinisaError(f"the added token {name!r} has the id {token_id}, which is that of {piece!r}")
        if not is_special:
            require_marker(name)
        vocabulary.pieces[token_id] = b"" if is_special else text
        special[name] = token_id
    for name, (token_id, _) in added.items():
        if special.get(name, token_id) != token_id:
            raise MinisaError(f"two added tokens, {name!r} and {names[token_id]!r}, have the id {token_id}")
    beyond = sorted(token_id for token_id, _ in added.values() if token_id >= size)
    if beyond != list(range(size, size + len(beyond))):  # Hugging Face's gives them these, whatever the file says
        raise MinisaError(f"the added tokens' ids leave gaps or repeat: expected {size} and those that follow")

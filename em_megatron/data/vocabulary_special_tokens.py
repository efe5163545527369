"""Which ids of an existing tokenizer begin and end a document and fill up a sample, and how one file records them.

A Hugging Face folder names them in tokenizer_config.json or special_tokens_map.json. The tokenizer.json that a corpus
and a run keep stands alone: its post-processor puts bos before a text, as documents are stored, and lists bos, eos and
pad by these names. Every program that reads a tokenizer.json reads this one too.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from em_megatron.data.manifest import DataError

CONFIG_NAME, MAP_NAME = "tokenizer_config.json", "special_tokens_map.json"
EOS_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[EOS]",
)
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "[BOS]")
PAD_NAMES = ("<pad>", "<|pad|>", "<\uff5c\u2581pad\u2581\uff5c>", "[PAD]")
ROLES = {"bos": BOS_NAMES, "eos": EOS_NAMES, "pad": PAD_NAMES}


class SpecialIds(NamedTuple):
    """unk: -1 where every text has ids of its own. bos and pad are eos where the tokenizer has none."""

    pad: int
    unk: int
    bos: int
    eos: int


def recorded_ids(content: dict[str, Any]) -> dict[str, int] | None:
    """The ids of bos, eos and pad that a tokenizer.json of a corpus or run records; None for any other."""
    post = content.get("post_processor")
    listed = post.get("special_tokens") if isinstance(post, dict) and post.get("type") == "TemplateProcessing" else None
    if not isinstance(listed, dict) or set(listed) != set(ROLES):
        return None
    return {role: listed[role]["ids"][0] for role in ROLES}


def named_ids(folder: Path, ids: dict[str, int], path: Path) -> dict[str, int]:
    """The ids of bos, eos and pad that the files beside a tokenizer.json name, or else well-known names of them.

    ids: of each token. Raises DataError where there is no eos, or a name is no token.
    """
    named: dict[str, Any] = {**_read(folder / MAP_NAME), **_read(folder / CONFIG_NAME)}
    found: dict[str, int] = {}
    for role, known in ROLES.items():
        key = f"{role}_token"
        name = named[key] if key in named else next((name for name in known if name in ids), None)
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and name not in ids:
            raise DataError(f"{path} has no token {name!a}, which {folder} names as its {key}: correct {CONFIG_NAME}")
        if name is not None:
            found[role] = ids[name]
    if "eos" not in found:
        raise DataError(
            f"{path} does not say which token ends a document: name it in {folder / CONFIG_NAME}, as in "
            '{"eos_token": "<|endoftext|>"}'
        )
    return {role: found.get(role, found["eos"]) for role in ROLES}


def check_no_code(folder: Path) -> None:
    """Raises DataError for a tokenizer whose ids are computed by Python code that comes with it."""
    if "AutoTokenizer" in (_read(folder / CONFIG_NAME).get("auto_map") or {}):
        raise DataError(
            f"the tokenizer of {folder} needs Python code of its own (auto_map in {CONFIG_NAME}), which is not run: save "
            "one that is a tokenizer.json alone"
        )


def _read(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): fetch it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON mapping: fetch it again")
    return found


def standing_alone(content: dict[str, Any], special: dict[str, int], names: dict[int, str]) -> dict[str, Any]:
    """A tokenizer.json that records bos, eos and pad, adds bos to a text, and neither cuts nor fills up."""
    listed = {role: {"id": role, "ids": [token], "tokens": [names[token]]} for role, token in special.items()}

    def template(*sequences: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for type_id, sequence in enumerate(sequences):
            parts.append({"SpecialToken": {"id": "bos", "type_id": type_id}})
            parts.append({"Sequence": {"id": sequence, "type_id": type_id}})
        return parts

    post = {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": listed}
    added = [
        token | {"special": True} if token["id"] in special.values() else token for token in content["added_tokens"]
    ]
    return content | {"truncation": None, "padding": None, "added_tokens": added, "post_processor": post}

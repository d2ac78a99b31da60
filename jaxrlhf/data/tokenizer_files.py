"""Reads a Hugging Face tokenizer from a folder or the hub, and says which file is wrong where one is."""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.config.files import default_cache, parse_json, read_text
from jaxrlhf.config.model_folder import SMALL_FILES, adapter_base, is_adapter
from jaxrlhf.config.remote import fetch, is_url
from jaxrlhf.data.files import first_line
from jaxrlhf.data.sources import looks_like_path
from jaxrlhf.data.vocabulary import check_ids
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBJECTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
"""Files that hold a JSON object."""
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""Kinds of GGUF tokenizers that split numbers into digits before words, which transformers leaves out."""
COPY = "copy the tokenizer's files again"
MAX_TEMPLATE = 2**20
"""Bytes of the largest chat template."""
MAX_TOKEN = 1000
"""Characters of the longest special token."""
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads a Hugging Face tokenizer as it is.

    Args:
        path: a local folder, a URL, a GGUF file, a name on the hub, or "demo".

    Raises:
        InputError: the folder does not exist, or holds no readable tokenizer files, or the hub gives none.
    """
    import transformers

    name = str(path)
    if name.endswith(".gguf"):
        return read_gguf_tokenizer(Path(name).expanduser())
    if is_url(name):
        name = str(fetch(name, lambda names: [file for file in names if re.fullmatch(SMALL_FILES, file)]))
    folder, declared = Path(name).expanduser(), []
    if name == "demo" and not folder.is_dir():
        from jaxrlhf.data.demo import materialize_demo

        folder = materialize_demo(default_cache()).tokenizer
    if not folder.is_dir() and (looks_like_path(name) or folder.exists()):
        raise InputError(f"tokenizer folder '{name}': no such folder; check the path")
    if folder.is_dir() and is_adapter(folder) and not tokenizer_files(folder):
        return read_tokenizer(adapter_base(folder))
    if folder.is_dir():
        name = str(folder)
        declared = check_tokenizer_files(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions
        if folder.is_dir():
            raise InputError(f"{suspects(folder)}: cannot be read ({first_line(error)}); {COPY}") from error
        raise InputError(
            f"tokenizer '{name}': neither a folder here nor a tokenizer that the hub gives ({first_line(error)}); give "
            "a folder with the tokenizer's files"
        ) from error
    check_ids(tokenizer, f"tokenizer '{name}'")
    ids = tokenizer.get_vocab()
    for where, token, i in declared:
        if ids.get(token, i) != i:
            raise InputError(f"{where}: gives {token!r} the id {i}, but its place is {ids[token]}; {COPY}")
    return tokenizer


def read_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file. Raises InputError when the file is missing or holds none that can be read."""
    import transformers
    from tokenizers import pre_tokenizers

    if not path.is_file():
        raise InputError(f"tokenizer file '{path}': no such file; check the path")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
    except ImportError as error:
        raise InputError(
            f"{path}: transformers reads the tokenizer of a GGUF file with the packages gguf and torch; install them "
            "(pip install 'jaxrlhf[gguf]' torch), or name a tokenizer folder with tokenizer_name_or_path"
        ) from error
    except Exception as error:  # transformers raises bare exceptions for metadata that it does not know
        raise InputError(
            f"{path}: holds no tokenizer that can be read ({first_line(error)}); name one with tokenizer_name_or_path"
        ) from error
    if kind_of_words(path) in DIGIT_BY_DIGIT:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    check_ids(tokenizer, f"tokenizer '{path}'")
    return tokenizer


def kind_of_words(path: Path) -> str:
    """The value of `tokenizer.ggml.pre` in a GGUF file; "" without one."""
    key = b"tokenizer.ggml.pre"
    # The gguf package would read every token first, which takes seconds.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(struct.pack("<Q", len(key)) + key)
        if at < 0:
            return ""
        at += 8 + len(key) + 4  # the key with its length, and the value's type
        length = int.from_bytes(content[at : at + 8], "little")
        return content[at + 8 : at + 8 + min(length, 100)].decode(errors="replace")


def own_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a model's folder; None when it holds none."""
    return read_tokenizer(folder) if tokenizer_files(folder) else None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer can be made of, and those beside them."""
    found = sorted(p for p in folder.iterdir() if "token" in p.name or p.name in ("vocab.json", "vocab.txt"))
    return found + sorted(p for p in folder.glob("*.model") if p not in found)


def suspects(folder: Path) -> str:
    """The files that may be the cause when transformers cannot make a tokenizer of a folder's files."""
    from tokenizers import Tokenizer

    main = folder / "tokenizer.json"
    try:
        if main.is_file():
            Tokenizer.from_file(str(main))
    except Exception:  # the tokenizers library raises bare exceptions
        return str(main)
    return f"tokenizer '{folder}': {', '.join(path.name for path in tokenizer_files(folder))}"


def check_tokenizer_files(folder: Path) -> list[tuple[Path, str, object]]:
    """Checks the files of a tokenizer; returns the ids that they give to added tokens.

    Raises:
        InputError: the folder holds no tokenizer file, or one that is damaged or of another form.
    """
    present = tokenizer_files(folder)
    if not present:
        raise InputError(
            f"tokenizer folder '{folder}': holds no tokenizer files; copy tokenizer.json and its config there"
        )
    declared = []
    for path in [*present, *folder.glob("chat_template.jinja"), *folder.glob("additional_chat_templates/*.jinja")]:
        if path.suffix == ".json":
            value = read_object(path)
            if path.name == "tokenizer_config.json":
                check_config(path, value)
            if path.name in ("tokenizer_config.json", "special_tokens_map.json"):
                check_special(path, value)
            try:
                declared += declared_ids(path, value)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise InputError(
                    f"{path}: the added tokens are of a wrong form ({first_line(error)}); {COPY}"
                ) from error
        elif path.suffix == ".jinja":
            read_template(path)
        elif path.suffix == ".model" and not (folder / "tokenizer.json").exists():
            check_sentencepiece(path)
    return declared


def read_template(path: Path) -> str:
    """The text of a chat template's file."""
    try:
        return read_text(path, MAX_TEMPLATE)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); {COPY}") from error


def read_object(path: Path) -> Any:
    """The JSON value in a file, which is an object where the file's name asks for one."""
    try:
        value = parse_json(read_text(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {COPY}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({first_line(error)}); {COPY}") from error
    if path.name in OBJECTS and not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, found {type(value).__name__}; {COPY}")
    return value


def check_config(path: Path, values: dict[str, object]) -> None:
    """Raises InputError for values of tokenizer_config.json whose wrong type is not noticed where it is read."""
    templates = values.get("chat_template")
    if isinstance(templates, list) and all(isinstance(item, dict) for item in templates):
        templates = {str(k): v for k, v in enumerate(v for t in templates for v in (t.get("name"), t.get("template")))}
    texts = templates.values() if isinstance(templates, dict) else [templates or ""]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"{path}: chat_template={str(values['chat_template'])[:80]} must be a text, or a list of objects with a "
            "name and a template; correct it, or remove it and set chat_template"
        )
    for name in ("tokenizer_class", "processor_class", "config_class"):
        if not isinstance(values.get(name), str | None):
            raise InputError(f"{path}: {name}={str(values[name])[:80]} must be a text; correct it")
    length = values.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float)):
        raise InputError(f"{path}: model_max_length={length!r} must be a number; correct it")


def check_special(path: Path, values: dict[str, object]) -> None:
    """Raises InputError for a special token that is neither a text nor an object with one."""
    for name in SPECIAL:
        token = values.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and (not isinstance(text, str) or len(text) > MAX_TOKEN):
            raise InputError(
                f"{path}: {name}={str(token)[:80]} must be a text of at most {MAX_TOKEN} characters; correct it"
            )


def check_sentencepiece(path: Path) -> None:
    """Raises InputError when a SentencePiece model cannot be read. A file of another kind is left to transformers."""
    try:
        with path.open("rb") as file:
            if file.read(1) != b"\n":
                return
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {COPY}") from error
    try:
        import google.protobuf  # noqa: F401
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise InputError(
            f"{path}: a SentencePiece model needs the packages sentencepiece and protobuf ({first_line(error)}): "
            "`pip install sentencepiece protobuf`"
        ) from error
    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: a damaged SentencePiece model ({first_line(error)}); {COPY}") from error


def declared_ids(path: Path, values: dict[str, Any]) -> list[tuple[Path, str, object]]:
    """The added tokens and ids that a file names, each with the file; transformers gives them ids of its own where
    these leave a gap."""
    if path.name == "added_tokens.json":
        found = list(values.items())
    elif path.name == "tokenizer.json":
        found = [(token["content"], token["id"]) for token in values.get("added_tokens") or []]
    elif path.name == "tokenizer_config.json":
        added = values.get("added_tokens_decoder") or {}
        found = [(token["content"], int(i)) for i, token in added.items()]
    else:
        found = []
    return [(path, token, i) for token, i in found]

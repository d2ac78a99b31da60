"""Renders prompts and responses as token ids, with the tokenizer's chat template or a prompt template.

A prompt is a string or a list of `{"role", "content"}` messages. Its ids end where the response begins. A response
ends with exactly one EOS id. Training, generation and chat render both in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxrlhf.data.cache import default_cache
from jaxrlhf.data.sources import first_line, looks_like_path
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # transformers is imported where it is used
    Tokenizer = object

DEFAULT_TEMPLATE = "Human: {prompt} Assistant: {response}"
RAW = "raw"

Message = dict[str, str]
Prompt = str | list[Message]


def check_template(template: str) -> None:
    """Raises InputError unless `template` is `raw` or holds `{prompt}` and then `{response}`, once each."""
    if template != RAW and re.findall(r"\{prompt\}|\{response\}", template) != ["{prompt}", "{response}"]:
        raise InputError(
            f"prompt_template {template!r}: must hold {{prompt}} and after it {{response}}, once each, or be 'raw'"
        )


def uses_chat_template(tokenizer, template: str) -> bool:
    """True when the tokenizer's chat template renders the rows: it has one, and `template` is the default."""
    return template == DEFAULT_TEMPLATE and bool(getattr(tokenizer, "chat_template", None))


def encode_prompt(tokenizer, prompt: Prompt, template: str = DEFAULT_TEMPLATE) -> list[int]:
    """Token ids of a prompt, up to where the response begins. Raises InputError when it cannot be rendered."""
    return encode_prompts(tokenizer, [prompt], template)[0]


def encode_conversation(tokenizer, messages: list[Message], template: str = DEFAULT_TEMPLATE) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next message begins."""
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("a conversation must end with a message for the assistant, such as one of the role user")
    return encode_prompt(tokenizer, messages, template)


def encode_pair(
    tokenizer, prompt: Prompt, response: str, template: str = DEFAULT_TEMPLATE
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the response to it, which ends with exactly one EOS id."""
    prompt_ids = encode_prompts(tokenizer, [prompt], template)
    return prompt_ids[0], encode_responses(tokenizer, [prompt], prompt_ids, [response], template)[0]


def encode_prompts(tokenizer, prompts: Sequence[Prompt], template: str) -> list[list[int]]:
    """Encodes many prompts in one call of the tokenizer; see `encode_prompt`."""
    start = start_ids(tokenizer, template)
    return [start + ids for ids in encode_texts(tokenizer, [render(tokenizer, prompt, template) for prompt in prompts])]


def encode_responses(
    tokenizer, prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]], responses: Sequence[str], template: str
) -> list[list[int]]:
    """Encodes the responses to many prompts; each ends with exactly one EOS id.

    A response's ids are those that follow the prompt's in the tokens of the whole text. When the prompt's ids are not
    a prefix of these (a merge across the border, a chat template that rewrites the prompt), the response's text is
    encoded alone.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: the prompts.
        prompt_ids: ids of the prompts, from `encode_prompts`.
        responses: a response to each prompt.
        template: the prompt template.
    """
    start = start_ids(tokenizer, template)
    texts = [render(tokenizer, prompt, template, response) for prompt, response in zip(prompts, responses, strict=True)]
    whole = [start + ids for ids in encode_texts(tokenizer, texts)]
    continues = [ids[: len(head)] == head for head, ids in zip(prompt_ids, whole, strict=True)]
    alone = [response_text(tokenizer, text, template) for text, ok in zip(responses, continues, strict=True) if not ok]
    rests = iter(encode_texts(tokenizer, alone))
    return [
        close(ids[len(head) :] if ok else next(rests), tokenizer.eos_token_id)
        for head, ids, ok in zip(prompt_ids, whole, continues, strict=True)
    ]


def close(ids: list[int], eos_id: int) -> list[int]:
    """The ids before the first EOS, and one EOS: training stops where generation does."""
    return [*(ids[: ids.index(eos_id)] if eos_id in ids else ids), eos_id]


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts in one batched call: nothing added, nothing cut."""
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, **options)["input_ids"]


def encode_stops(tokenizer, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each stop string, nothing added. Raises InputError for one without any.

    Generation does not find a stop string that the model writes with other tokens, such as one merged with the
    letters before it.
    """
    stops = encode_texts(tokenizer, list(texts))
    for text, ids in zip(texts, stops, strict=True):
        if not ids:
            raise InputError(f"stop_strings: {text!r} encodes to no tokens; use another text")
    return tuple(tuple(ids) for ids in stops)


def start_ids(tokenizer, template: str) -> list[int]:
    """The ids (BOS, for some tokenizers) that the tokenizer puts before a text; empty with a chat template."""
    if uses_chat_template(tokenizer, template):
        return []
    bare = encode_texts(tokenizer, ["a"])[0]
    whole = tokenizer("a", verbose=False)["input_ids"]
    for i in range(len(whole) - len(bare) + 1):
        if whole[i : i + len(bare)] == bare:
            return whole[:i]
    return []


def render(tokenizer, prompt: Prompt, template: str, response: str | None = None) -> str:
    """The text of a prompt up to where the response begins, or of the prompt and the given response."""
    if not uses_chat_template(tokenizer, template):
        rest = "" if response is None else response_text(tokenizer, response, template)
        return prompt_text(prompt, template) + rest
    from jinja2.exceptions import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}; correct the row, or "
            "set prompt_template, which then replaces the chat template"
        ) from error


def split_template(template: str) -> tuple[str, str, str, str]:
    """Splits a template into its texts before the prompt, after the prompt, before the response and after it.

    Spaces right before `{response}` belong to the response: byte-level tokenizers join a space to the next word.
    """
    if template == RAW:
        return "", "", "", ""
    before, _, rest = template.partition("{prompt}")
    middle, _, after = rest.partition("{response}")
    stripped = middle.rstrip(" ")
    return before, stripped, middle[len(stripped) :], after


def response_text(tokenizer, response: str, template: str) -> str:
    """The text of a response, with the template's text around it."""
    if uses_chat_template(tokenizer, template):
        return response
    _, _, lead, after = split_template(template)
    return lead + response + after


def plain_response(tokenizer, text: str, template: str) -> str:
    """Removes the template's text from the decoded text of a generated response; the inverse of `response_text`."""
    if uses_chat_template(tokenizer, template):
        return text.strip()
    _, _, lead, after = split_template(template)
    return text.removeprefix(lead).removesuffix(after)


def answer_text(tokenizer, ids: Sequence[int] | np.ndarray, template: str, stop_strings: Sequence[str] = ()) -> str:
    """Decodes a generated response, without special tokens, the stop string that ended it, and the template's text."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop = next((s for s in stop_strings if text.endswith(s)), "")
    return plain_response(tokenizer, text.removesuffix(stop), template)


def prompt_text(prompt: Prompt, template: str) -> str:
    """Renders a prompt by the prompt template. System messages of a conversation are written without it."""
    before, middle, lead, after = split_template(template)
    if isinstance(prompt, str):
        return before + prompt + middle
    gap = "" if template == RAW or before[:1].isspace() else "\n" if "\n" in template else " "
    text = ""
    for i, message in enumerate(prompt):
        content = message["content"]
        if message["role"] == "assistant":
            text += lead + content + after
        else:
            text += gap if i else ""
            text += content if message["role"] == "system" else before + content + middle
    return text


def check_tokenizer(tokenizer) -> None:
    """Raises InputError for a tokenizer without an EOS token, which ends every response."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer '{tokenizer.name_or_path}': has no EOS token to end a response; "
            "set eos_token in its tokenizer_config.json"
        )


def pad_token_id(tokenizer) -> int:
    """The id that fills padding: the pad token's where there is one, else EOS's.

    Masks are explicit, so the id needs no meaning, and the vocabulary needs no new token.
    """
    check_tokenizer(tokenizer)
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_tokenizer(path: str | Path):
    """Loads a Hugging Face tokenizer.

    Args:
        path: a local folder, a name on the hub, or "demo".

    Raises:
        InputError: the folder does not exist, or holds no readable tokenizer files, or the hub gives none.
    """
    import transformers

    name = str(path)
    folder = Path(name).expanduser()
    if name == "demo" and not folder.is_dir():
        from jaxrlhf.data.demo import materialize_demo

        folder = materialize_demo(default_cache()).tokenizer
    if not folder.is_dir() and (looks_like_path(name) or folder.exists()):
        raise InputError(f"tokenizer folder '{name}': no such folder; check the path")
    if folder.is_dir():
        name = str(folder)
        check_tokenizer_files(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        where = (
            "the folder's tokenizer files cannot be read"
            if folder.is_dir()
            else "neither a folder here nor a tokenizer that the hub gives"
        )
        raise InputError(
            f"tokenizer '{name}': {where} ({first_line(error)}); give a folder with the tokenizer's files"
        ) from error


def check_tokenizer_files(folder: Path) -> None:
    """Raises InputError when the folder holds no tokenizer file, or one with invalid JSON."""
    present = [p for p in sorted(folder.iterdir()) if "token" in p.name or p.name in ("vocab.json", "vocab.txt")]
    if not present:
        raise InputError(
            f"tokenizer folder '{folder}': holds no tokenizer files; copy tokenizer.json and its config there"
        )
    for path in present:
        if path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path}: not valid JSON ({error}); copy the tokenizer's files again") from error

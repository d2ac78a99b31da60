"""Renders prompts and responses as token ids, by the tokenizer's chat template or by a prompt template.

A prompt is a string or a list of `{"role", "content"}` messages. Its rendering ends where the response begins; a
response ends with exactly one EOS id. Both are rendered the same way for training, generation and chat.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    """Raise InputError unless `template` is `raw` or names `{prompt}` and then `{response}`, once each."""
    if template == RAW:
        return
    if (
        template.count("{prompt}") != 1
        or template.count("{response}") != 1
        or template.index("{prompt}") > template.index("{response}")
    ):
        raise InputError(
            f"prompt_template {template!r}: must hold {{prompt}} and after it {{response}}, once each, or be 'raw'"
        )


def uses_chat_template(tokenizer, template: str) -> bool:
    """Whether the tokenizer's chat template renders the rows.

    It does where there is one, unless the user chose another `template` than the default: an explicit choice counts.
    """
    return template == DEFAULT_TEMPLATE and bool(getattr(tokenizer, "chat_template", None))


def encode_prompt(tokenizer, prompt: Prompt, template: str = DEFAULT_TEMPLATE) -> list[int]:
    """Token ids of a prompt, ready for the response to follow. Raises InputError when it cannot be rendered."""
    return encode_prompts(tokenizer, [prompt], template)[0]


def encode_conversation(tokenizer, messages: list[Message], template: str = DEFAULT_TEMPLATE) -> list[int]:
    """Token ids of a conversation of one or more rounds whose last message the assistant is to answer."""
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("a conversation must end with a message for the assistant to answer")
    return encode_prompt(tokenizer, messages, template)


def encode_pair(
    tokenizer, prompt: Prompt, response: str, template: str = DEFAULT_TEMPLATE
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the response to it, which ends with exactly one EOS id."""
    prompt_ids = encode_prompts(tokenizer, [prompt], template)
    return prompt_ids[0], encode_responses(tokenizer, [prompt], prompt_ids, [response], template)[0]


def encode_response(tokenizer, prompt: Prompt, response: str, template: str = DEFAULT_TEMPLATE) -> list[int]:
    """Token ids of the response to `prompt`, ending with exactly one EOS id."""
    return encode_pair(tokenizer, prompt, response, template)[1]


def encode_prompts(tokenizer, prompts: Sequence[Prompt], template: str) -> list[list[int]]:
    """`encode_prompt` for many prompts in one call of the tokenizer."""
    start = start_ids(tokenizer, template)
    return [start + ids for ids in encode_texts(tokenizer, [render_prompt(tokenizer, p, template) for p in prompts])]


def encode_responses(
    tokenizer, prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]], responses: Sequence[str], template: str
) -> list[list[int]]:
    """`encode_response` for many rows; `prompt_ids` are what `encode_prompts` gave for `prompts`.

    A response's ids are what follows the prompt's in the tokens of the whole text; where the prompt's ids are not a
    prefix of those (a merge across the border, a chat template that rewrites the prompt), the response's text is
    tokenised on its own.
    """
    start = start_ids(tokenizer, template)
    full_ids = encode_texts(
        tokenizer, [render_full(tokenizer, p, r, template) for p, r in zip(prompts, responses, strict=True)]
    )
    rests: list[list[int] | None] = []
    for head, ids in zip(prompt_ids, full_ids, strict=True):
        whole = start + ids
        rests.append(whole[len(head) :] if whole[: len(head)] == head else None)
    alone = [i for i, rest in enumerate(rests) if rest is None]
    if alone:
        texts = [response_text(tokenizer, responses[i], template) for i in alone]
        for i, ids in zip(alone, encode_texts(tokenizer, texts), strict=True):
            rests[i] = ids
    return [close(ids, tokenizer.eos_token_id) for ids in rests]


def close(ids: list[int], eos_id: int) -> list[int]:
    """The ids up to the first EOS, if there is one, and one EOS: generation stops at the first, so does training."""
    return [*(ids[: ids.index(eos_id)] if eos_id in ids else ids), eos_id]


def encode_texts(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts in one batched call: nothing added, nothing cut."""
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, **options)["input_ids"]


def encode_stops(tokenizer, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each stop string's own token ids, nothing added. Raises InputError for one without any.

    A string that comes out of the model in other pieces, such as merged with the letters before it, is not found by
    these ids.
    """
    stops = encode_texts(tokenizer, list(texts))
    for text, ids in zip(texts, stops, strict=True):
        if not ids:
            raise InputError(f"stop_strings: {text!r} has no tokens; give a text that the tokenizer can write")
    return tuple(tuple(ids) for ids in stops)


def start_ids(tokenizer, template: str) -> list[int]:
    """The ids (BOS, for some tokenizers) that the tokenizer puts before a text; a chat template writes its own."""
    if uses_chat_template(tokenizer, template):
        return []
    bare = encode_texts(tokenizer, ["a"])[0]
    whole = tokenizer("a", verbose=False)["input_ids"]
    for i in range(len(whole) - len(bare) + 1):
        if whole[i : i + len(bare)] == bare:
            return whole[:i]
    return []


def render_prompt(tokenizer, prompt: Prompt, template: str) -> str:
    """The text of a prompt up to where the response begins."""
    if uses_chat_template(tokenizer, template):
        return apply_chat_template(tokenizer, as_messages(prompt), add_generation_prompt=True)
    return prompt_text(prompt, template)


def render_full(tokenizer, prompt: Prompt, response: str, template: str) -> str:
    """The text of a prompt and the response to it."""
    if uses_chat_template(tokenizer, template):
        messages = [*as_messages(prompt), {"role": "assistant", "content": response}]
        return apply_chat_template(tokenizer, messages, add_generation_prompt=False)
    return prompt_text(prompt, template) + response_text(tokenizer, response, template)


def as_messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def apply_chat_template(tokenizer, messages: list[Message], *, add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the tokenizer's chat template refuses a conversation of the roles {roles}: {error}; mend the row, "
            "or choose a prompt_template (an explicit one is used instead of the chat template)"
        ) from error


def split_template(template: str) -> tuple[str, str, str, str]:
    """The template's texts before the prompt, from it to the response, before the response, and after it.

    Spaces right before `{response}` belong to the response, since byte-level tokenizers join a space to the word after.
    """
    if template == RAW:
        return "", "", "", ""
    before, _, rest = template.partition("{prompt}")
    middle, _, after = rest.partition("{response}")
    stripped = middle.rstrip(" ")
    return before, stripped, middle[len(stripped) :], after


def response_text(tokenizer, response: str, template: str) -> str:
    if uses_chat_template(tokenizer, template):
        return response
    _, _, lead, after = split_template(template)
    return lead + response + after


def plain_response(tokenizer, text: str, template: str) -> str:
    """The inverse of `response_text`: a response as rows hold it, from the decoded text of a generated one."""
    if uses_chat_template(tokenizer, template):
        return text.strip()
    _, _, lead, after = split_template(template)
    return text.removeprefix(lead).removesuffix(after)


def answer_text(tokenizer, ids: Sequence[int], template: str, stop_strings: Sequence[str] = ()) -> str:
    """A generated response as rows hold it: without special tokens, the stop string that ended it, and the template."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop = next((s for s in stop_strings if text.endswith(s)), "")
    return plain_response(tokenizer, text.removesuffix(stop), template)


def prompt_text(prompt: Prompt, template: str) -> str:
    """A prompt by the prompt template; rounds of a message list follow each other, system messages stand before."""
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
    """Raise InputError for a tokenizer without an EOS token: nothing could end a response."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer '{tokenizer.name_or_path}': has no EOS token, so a response could not end; "
            "set eos_token in its tokenizer_config.json"
        )


def pad_token_id(tokenizer) -> int:
    """The id that fills unused places: the pad token's where there is one, else EOS's.

    The id carries no meaning (masks are explicit), so nothing is added to the vocabulary and EOS stays EOS.
    """
    check_tokenizer(tokenizer)
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def default_cache() -> Path:
    """The folder for tokenised data and the demo, where no other is given: $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    return Path(os.environ.get("JAXRLHF_CACHE") or "~/.cache/jaxrlhf").expanduser()


def load_tokenizer(path: str | Path):
    """The Hugging Face tokenizer of a local folder or hub name, or the demo's. Raises InputError when unreadable."""
    import transformers

    name = str(path)
    folder = Path(name).expanduser()
    if name == "demo" and not folder.is_dir():
        from jaxrlhf.data.demo import materialize_demo

        folder = materialize_demo(default_cache()).tokenizer
    if not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1 or folder.exists()):
        raise InputError(f"tokenizer folder '{name}': no such folder; check the path")
    if folder.is_dir():
        name = str(folder)
        check_tokenizer_files(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        text = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        where = (
            "the folder's tokenizer files cannot be read"
            if folder.is_dir()
            else "neither a folder here nor a tokenizer that can be loaded from the hub"
        )
        raise InputError(f"tokenizer '{name}': {where} ({text}); give a folder with the tokenizer's files") from error


def check_tokenizer_files(folder: Path) -> None:
    """Raise InputError when the folder holds no tokenizer file, or one that is not JSON."""
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

"""Loads a tokenizer and gives it the chat template by which a run renders everything.

A loaded tokenizer always has one chat template. `TemplateConfig` chooses it: a file, a built-in template, the
tokenizer's own, or a prompt template, which becomes an equal chat template. Its variables, a system prompt and the
merging of system messages become part of it. So the exported tokenizer renders as the run did, in transformers and
vLLM too.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxrlhf.config import Settings, alias
from jaxrlhf.config.files import read_text
from jaxrlhf.data.cache import hash_json
from jaxrlhf.data.ends import end_ids
from jaxrlhf.data.files import first_line
from jaxrlhf.data.message_forms import GIVEN
from jaxrlhf.data.renderer import renderer_of_transformers
from jaxrlhf.data.tokenizer_files import MAX_TEMPLATE, read_tokenizer
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:  # transformers is imported where it is used
    Tokenizer = object

DEFAULT_TEMPLATE = "Human: {prompt} Assistant: {response}"
RAW = "raw"
BUILT_IN: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "vicuna": (),
    "deepspeed_chat": (),
    "hermes": ("<|im_start|>", "<|im_end|>"),
}
"""Built-in chat templates, and the special tokens that each needs. The last of these ends a turn and becomes EOS."""


@dataclass(frozen=True)
class TemplateConfig(Settings, may_change=True):
    """Settings of the text of conversations, and of the parts that sft trains on."""

    prompt_template: str = DEFAULT_TEMPLATE
    """Text around prompt and response, or 'raw' to join them. A value other than the default replaces the tokenizer's
    own chat template. A backslash and an n (or t) mean a line break (or tab)."""
    chat_template: str | None = None
    """Chat template to use instead: a .jinja file, chatml, hermes (chatml with tools), llama3, vicuna, deepspeed_chat
    (for base models: their special tokens are added), or the name of one of the tokenizer's templates."""
    chat_template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking=false for Qwen3. The exported template keeps them."""
    system_prompt: Annotated[str | None, alias("system")] = None
    """System message of conversations that have none, in every step and in chat."""
    system_role: Literal["keep", "merge"] = "keep"
    """merge: put the system message in front of the first user message, for templates that refuse a system message."""
    train_on: Literal["all", "last", "everything"] = "all"
    """Tokens that sft trains on: every assistant message, the last one only, or every token."""
    special_tokens_in_data: bool = False
    """Special tokens that stand in the text of a message keep their meaning. Default: they are encoded as plain text,
    so no message can open or close a turn."""

    def check(self) -> None:
        template = self.prompt_template.replace("\\n", "\n").replace("\\t", "\t")  # as a shell passes them on
        object.__setattr__(self, "prompt_template", template)
        check_template(template)

    @property
    def adds_tokens(self) -> bool:
        """True for a built-in template that may add special tokens to the tokenizer."""
        return bool(BUILT_IN.get(self.chat_template or ""))


def check_template(template: str) -> None:
    """Raises InputError unless `template` is `raw` or holds `{prompt}` and then `{response}`, once each."""
    if template != RAW and re.findall(r"\{prompt\}|\{response\}", template) != ["{prompt}", "{response}"]:
        raise InputError(
            f"prompt_template {template!r}: must hold {{prompt}} and after it {{response}}, once each, or be 'raw'"
        )


def load_tokenizer(path: str | Path, template: TemplateConfig | None = None) -> Tokenizer:
    """Loads a Hugging Face tokenizer, with the chat template that `template` chooses.

    Args:
        path: a local folder, a name on the hub, or "demo".
        template: default: the tokenizer's own chat template, else that of the default prompt template.

    Raises:
        InputError: as in `read_tokenizer`, or the template cannot be used.
    """
    return with_template(read_tokenizer(path), template or TemplateConfig())


def with_template(tokenizer: Tokenizer, template: TemplateConfig) -> Tokenizer:
    """Returns a copy of the tokenizer with the chat template that the settings choose.

    The order is: `chat_template`, a `prompt_template` other than the default, the tokenizer's own, the default prompt
    template. A second call with the same settings changes nothing. Tokens that a built-in template needs are added to
    the given tokenizer as well, because both share the vocabulary.

    Raises:
        InputError: there is no such template, it is not valid, it does not show the system prompt, or it reads no
            variable of a name in `chat_template_kwargs`.
    """
    tokenizer = copy.copy(tokenizer)
    own = tokenizer.chat_template
    if isinstance(own, dict):
        tokenizer.named_templates = dict(own)  # an export keeps those that the run did not use
    if template.chat_template is not None:
        tokenizer.chat_template = chosen_template(tokenizer, template.chat_template)
    elif template.prompt_template != DEFAULT_TEMPLATE or not own:
        tokenizer.chat_template = start_of_text(tokenizer) + chat_template_of(template.prompt_template)
    elif isinstance(own, dict):
        tokenizer.chat_template = named_template(own, "default")
    chosen: Any = tokenizer.chat_template
    tokenizer.chat_template = with_settings(chosen, template)
    check_chat_template(tokenizer, template)
    return tokenizer


def chosen_template(tokenizer: Tokenizer, name: str) -> str:
    """The chat template in a file, the built-in one, or the tokenizer's own of that name."""
    own: Any = tokenizer.chat_template
    path = Path(name).expanduser()
    if path.suffix in (".jinja", ".jinja2", ".j2") or path.is_file():
        try:
            return read_text(path, MAX_TEMPLATE)
        except (OSError, ValueError) as error:
            raise InputError(f"chat_template '{name}': cannot be read ({first_line(error)}); check the path") from error
    if name in BUILT_IN:
        add_special_tokens(tokenizer, BUILT_IN[name])
        text = (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        return start_of_text(tokenizer) + text.rstrip("\n")
    named = getattr(tokenizer, "named_templates", {})
    return named_template(named or ({"default": own} if own else {}), name)


def named_template(templates: dict[str, str], name: str) -> str:
    """One of a tokenizer's named templates. Raises InputError listing the names when there is no such one."""
    if name in templates:
        return templates[name]
    named = ", ".join(sorted(templates)) or "none"
    raise InputError(
        f"chat_template '{name}': the tokenizer has no template of that name (its names: {named}); set chat_template "
        f"to one of these, to a .jinja file, or to one of {', '.join(BUILT_IN)}"
    )


def add_special_tokens(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> None:
    """Adds the tokens that the vocabulary lacks; the last one becomes EOS."""
    if not tokens:
        return
    from transformers import AddedToken

    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    new = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in special]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    tokenizer.eos_token = tokens[-1]


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids (BOS, for some tokenizers) that the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    for i in range(len(whole) - len(bare) + 1):
        if whole[i : i + len(bare)] == bare:
            return whole[:i]
    return []


def start_of_text(tokenizer: Tokenizer) -> str:
    """Jinja text for the tokens that the tokenizer puts before a text."""
    ids = start_ids(tokenizer)
    if ids and ids == [tokenizer.bos_token_id]:
        return "{{ bos_token }}"
    return "{{ %s }}" % literal("".join(tokenizer.convert_ids_to_tokens(ids))) if ids else ""  # noqa: UP031


def literal(value: bool | float | str) -> str:
    """A value as Jinja writes it."""
    return json.dumps(value, ensure_ascii=False)


def split_template(template: str) -> tuple[str, str, str, str]:
    """Splits a prompt template into its texts before the prompt, after it, before the response and after it.

    Spaces right before `{response}` belong to the response: byte-level tokenizers join a space to the next word.
    """
    if template == RAW:
        return "", "", "", ""
    before, _, rest = template.partition("{prompt}")
    middle, _, after = rest.partition("{response}")
    stripped = middle.rstrip(" ")
    return before, stripped, middle[len(stripped) :], after


def chat_template_of(prompt_template: str) -> str:
    """The chat template that renders as a prompt template does.

    A system message is written as it is. EOS closes the last assistant message. Rounds have a line break or a space
    between them, unless the prompt template begins with one.
    """
    before, middle, lead, after = split_template(prompt_template)
    gap = "\n" if "\n" in prompt_template else " "
    if prompt_template == RAW or before[:1].isspace():
        gap = ""
    return (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{{{{ {literal(lead)} + message['content'] + {literal(after)} }}}}"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
        "{% else %}"
        f"{{% if not loop.first %}}{{{{ {literal(gap)} }}}}{{% endif %}}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}{% else %}"
        f"{{{{ {literal(before)} + message['content'] + {literal(middle)} }}}}"
        "{% endif %}{% endif %}{% endfor %}"
    )


def with_settings(chat_template: str, config: TemplateConfig) -> str:
    """The chat template with its variables, the system prompt and the merging of system messages in front, as the
    settings say.

    Each stands between marks, so that new settings replace those of an earlier run.
    """
    variables = _section(chat_template, "chat_template_kwargs")
    prompt, merge = _section(chat_template, "system_prompt"), _section(chat_template, "system_role")
    rest = chat_template.removeprefix(variables).removeprefix(prompt).removeprefix(merge)
    if config.chat_template_kwargs:
        variables = _marked("chat_template_kwargs", _defaults(config.chat_template_kwargs, rest))
    if config.system_prompt is not None:
        prompt = _marked(
            "system_prompt",
            "{% if not messages or messages[0]['role'] != 'system' %}{% set messages = "
            f"[{{'role': 'system', 'content': {literal(config.system_prompt)}}}] + messages %}}{{% endif %}}",
        )
    if config.system_role == "merge":
        merge = _marked(
            "system_role",
            "{% if messages | length > 1 and messages[0]['role'] == 'system' and messages[1]['role'] == 'user' %}"
            "{% set messages = [dict(messages[1], content=messages[0]['content'] + '\\n\\n' + "
            "messages[1]['content'])] + messages[2:] %}{% endif %}",
        )
    return variables + prompt + merge + rest


def with_variables(tokenizer: Tokenizer, variables: Mapping[str, bool | float | str]) -> Tokenizer:
    """A copy of a loaded tokenizer with other values of its chat template's variables, such as for one request.

    Raises:
        InputError: the chat template reads no variable of a name.
    """
    template = str(tokenizer.chat_template)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = _defaults(variables, template) + template
    return tokenizer


def _defaults(variables: Mapping[str, bool | float | str], chat_template: str) -> str:
    """Jinja text that gives variables their values where the caller of the template gives none. Raises InputError."""
    for name in variables:
        if name in GIVEN:
            raise InputError(f"chat_template_kwargs: {name} comes from the conversation; leave it out")
        if not name.isidentifier() or not re.search(rf"\b{name}\b", chat_template):
            raise InputError(
                f"chat_template_kwargs: the chat template reads no {name!r}; correct the name, or leave it out"
            )
    return "".join(
        f"{{% set {name} = {name} if {name} is defined else {literal(value)} %}}" for name, value in variables.items()
    )


def _marked(name: str, text: str) -> str:
    return f"{{# {name} #}}{text}{{# end of {name} +#}}"  # +: a line break after it stays


def _section(chat_template: str, name: str) -> str:
    """The marked text of that name, with its marks; empty where there is none."""
    start, end = f"{{# {name} #}}", f"{{# end of {name} +#}}"
    if start not in chat_template:
        return ""
    return chat_template[chat_template.index(start) : chat_template.index(end) + len(end)]


def check_chat_template(tokenizer: Tokenizer, config: TemplateConfig) -> None:
    """Raises InputError for a chat template that is not valid, or that does not show the system prompt."""
    from jinja2.exceptions import TemplateSyntaxError

    from jaxrlhf.data.template_limits import TemplateLimit

    source = f"chat_template '{config.chat_template}'" if config.chat_template else "the tokenizer's chat template"
    messages = [{"role": "user", "content": "a"}]
    options = {"chat_template": tokenizer.chat_template, "add_generation_prompt": True}
    problem = "does not show it"
    try:
        (text,), _ = renderer_of_transformers()([messages], **options, **tokenizer.special_tokens_map)
    except TemplateSyntaxError as error:
        raise InputError(f"{source}: line {error.lineno} is not valid: {first_line(error)}; correct it") from error
    except TemplateLimit as error:
        raise InputError(f"{source}: {error}; choose another chat_template") from error
    except Exception as error:  # whatever a template raises; without a system prompt, rows of data may still fit it
        text, problem = "", first_line(error)
    if config.system_prompt is not None and config.system_prompt.strip() not in text:
        merge = "; set system_role to merge, which puts it in front of the first user message"
        remedy = merge if config.system_role == "keep" else "; choose another chat_template"
        raise InputError(f"system_prompt: {source} refuses it: {problem}{remedy}")


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises InputError for a tokenizer without an EOS token, which ends every response."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer '{tokenizer.name_or_path}': has no EOS token to end a response; "
            "set eos_token in its tokenizer_config.json"
        )


def pad_token_id(tokenizer: Tokenizer) -> int:
    """The id that fills padding: the pad token's where there is one, else EOS's.

    Masks are explicit, so the id needs no meaning, and the vocabulary needs no new token.
    """
    check_tokenizer(tokenizer)
    found: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return found


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hashes everything that decides how a tokenizer encodes text."""
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # calls set and unset both; our calls ask for neither
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
        state["init"] = {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items()) if k != "name_or_path"}
    special = {"ends": end_ids(tokenizer), "bos": tokenizer.bos_token_id, "chat": tokenizer.chat_template}
    return hash_json([state, special, tokenizer.all_special_tokens])

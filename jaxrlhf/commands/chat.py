"""Chat with a trained model: a conversation that streams its responses, and the terminal loop around it."""

import contextlib
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TextIO

import jax
import numpy as np

from jaxrlhf import keys
from jaxrlhf.config import PathName, Seed, Settings, alias, deepspeed_chat
from jaxrlhf.config.compilation import CompilationConfig
from jaxrlhf.data import (
    TemplateConfig,
    Tokenizer,
    encode_conversation,
    end_ids,
    knows_model,
    length_bucket,
    pad_token_id,
    vocabulary_size,
    with_template,
)
from jaxrlhf.engine import GenerationConfig, HybridEngine, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import Model, check_tokenizer_fits, load_pretrained, stored_head, with_kernels
from jaxrlhf.models.hf.checkpoint_files import CONFIG, find_model_folder
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.settings import MeshConfig
from jaxrlhf.trainers.tokenizers import TokenizerConfig, with_model_ends

BROKEN = "\N{REPLACEMENT CHARACTER}"
HELP = """/reset  forget the conversation so far
/quit   leave (also Ctrl-D, or Ctrl-C twice)
/help   this list
Ctrl-C stops a response; the part on the screen stays in the conversation."""


@dataclass(frozen=True)
class ChatConfig(Settings):
    """A conversation with a model."""

    HIDDEN = frozenset({"samples_per_prompt", "generation_slots", "train_on", "special_tokens_in_data"})
    OTHER_FLAGS = deepspeed_chat.CHAT

    model: PathName[Annotated[str, alias("model_name_or_path")]]
    """Folder or hub name of a language model, such as the output of sft or ppo."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    template: TemplateConfig = TemplateConfig()
    sampling: SamplingConfig = SamplingConfig(temperature=0.7, top_p=0.9)
    generation: GenerationConfig = GenerationConfig()
    seed: Seed = 42
    """Seed of the sampling: the same conversation gets the same responses."""
    mesh: MeshConfig = MeshConfig()
    compilation: CompilationConfig = CompilationConfig()


class StreamedText:
    """Decodes a growing list of token ids and returns the new text, in whole characters.

    Each token is decoded with those before it, back to the one before the last whole character, so spaces and merged
    characters are those of the whole text. The text ends before the first of the `stops` in it; a possible beginning of
    a stop is held back.

    Args:
        tokenizer: A Hugging Face tokenizer.
        stops: Texts that end the text.
        strip: Drop white space before the first word.
        special: Keep special tokens, among which may be those of tool calls.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: tuple[str, ...] = (), strip: bool = True, special: bool = False
    ) -> None:
        self.tokenizer, self.stops, self.strip, self.special = tokenizer, stops, strip, special
        self.ids: list[int] = []
        self.text = ""
        """Text returned so far."""
        self.decoded = ""
        """All text of whole characters so far, held back or not."""
        self.stopped = False
        """True once the text has reached a stop; further tokens change nothing."""
        self._whole = ""
        self._begin = self._end = 0
        # `_whole` is the text of ids[:_end]; tokens are decoded from _begin on.

    def add(self, token: int) -> str:
        """Returns the text that this token completes; empty while a character is incomplete."""
        self.ids.append(int(token))
        self._decode(final=False)
        return self._new(hold=True)

    def finish(self) -> str:
        """Returns the text held back: pieces of a character or of a stop that was never completed."""
        self._decode(final=True)
        return self._new(hold=False)

    def _decode(self, final: bool) -> None:
        options = {"skip_special_tokens": not self.special, "clean_up_tokenization_spaces": False}
        decode: Any = self.tokenizer.decode  # one text, though its type says perhaps several
        before, now = (decode(ids, **options) for ids in (self.ids[self._begin : self._end], self.ids[self._begin :]))
        # Some tokenizers decode a run of byte tokens as a whole and spoil it while its last character is incomplete.
        if not now.startswith(before):
            return
        new = now[len(before) :]
        complete = new if final else new.rstrip(BROKEN)
        text = self._whole + complete
        self.decoded = text.lstrip() if self.strip else text
        if new and new == complete:
            self._whole, self._begin, self._end = text, self._end, len(self.ids)

    def _new(self, hold: bool) -> str:
        text = self.decoded
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif hold:
            begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(begun, default=0)]
        new, self.text = text[len(self.text) :], max(text, self.text, key=len)
        return new


class ChatSession:
    """A conversation with a model: `reply` responds to a message and remembers both.

    `messages` is the history, a list of `{"role", "content"}`, and may be edited between replies. `console` shows
    notices (compiling, history cut); None hides them.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, config: ChatConfig, console: Console | None = None) -> None:
        if model.module.head != "lm":
            raise InputError("chat needs a language model; this one has a scalar head (a reward model or critic)")
        self.tokenizer, self.config = with_template(tokenizer, config.template), config
        if not knows_model(self.tokenizer):
            self.tokenizer = with_model_ends(self.tokenizer, model.config, config.tokenizer.eos_token_ids)
        check_tokenizer_fits(vocabulary_size(self.tokenizer), model.config, "the tokenizer")
        self.console = Console(quiet=True) if console is None else console
        self.engine = HybridEngine(model, config.mesh.make_mesh())
        self.context = model.config.max_positions
        longest = config.sampling.max_new_tokens
        if longest == SamplingConfig.max_new_tokens:  # the default gives way to a short context
            longest = min(longest, self.context // 2)
        if longest >= self.context:
            raise InputError(
                f"max_new_tokens={longest} leaves no room for a message in the model's context of {self.context} "
                f"tokens; choose less, such as {self.context // 2}"
            )
        self.sampling = replace(
            config.sampling,
            max_new_tokens=longest,
            eos_token_id=end_ids(self.tokenizer),
            pad_token_id=pad_token_id(self.tokenizer),
        )
        self._compiled: set[int] = set()
        self.reset()

    @property
    def prompt_limit(self) -> int:
        """Most tokens that the conversation before the response may have."""
        return self.context - self.sampling.max_new_tokens

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages: list[dict[str, str]] = []
        self.round = 0
        self._cut_was_told = False

    def reply(self, text: str) -> Generator[str]:
        """Yields the response to `text` in pieces as they are sampled.

        Message and response enter the history when the iterator ends or is closed; an empty response is forgotten.
        Raises InputError at once for a message that the context cannot hold.
        """
        message = {"role": "user", "content": text}
        prompt, dropped = self._fit(message)
        if dropped:
            del self.messages[:dropped]
            if not self._cut_was_told:
                self._cut_was_told = True
                self.console.print("(the conversation has outgrown the model's context: its beginning is forgotten)")
        return self._answer(message, prompt)

    def _fit(self, message: dict[str, str]) -> tuple[list[int], int]:
        """Token ids of the conversation with `message`, and the number of oldest messages that do not fit."""
        system = self.config.template.system_prompt is not None
        starts = [i for i, old in enumerate(self.messages) if old["role"] != "assistant"]
        for start in [*starts, len(self.messages)]:
            prompt = encode_conversation(self.tokenizer, [*self.messages[start:], message])
            if len(prompt) <= self.prompt_limit:
                return prompt, start
        raise InputError(
            f"the message is too long: {len(prompt)} tokens{' with the system message' if system else ''}, and only "
            f"{self.prompt_limit} fit beside a response of {self.sampling.max_new_tokens} in the model's context of "
            f"{self.context}. It was not sent; shorten it, or lower max_new_tokens"
        )

    def _answer(self, message: dict[str, str], prompt: list[int]) -> Generator[str]:
        answer = StreamedText(self.tokenizer, self.config.sampling.stop_strings)
        key = keys.stream(self.config.seed, keys.Stream.CHAT, self.round)
        self.round += 1
        try:
            for token in self._tokens(prompt, key):
                if token not in self.sampling.eos_ids and (piece := answer.add(token)):
                    yield piece
                if answer.stopped:
                    break
            if answer.ids and (piece := answer.finish()):
                yield piece
        finally:
            if answer.text.strip():
                self.messages += [message, {"role": "assistant", "content": answer.text.rstrip()}]

    def _tokens(self, prompt: list[int], key: jax.Array) -> Iterator[int]:
        width = length_bucket(len(prompt), self.prompt_limit)
        ids = np.full((1, width), self.sampling.pad_token_id, np.int32)
        mask = np.zeros((1, width), bool)
        ids[0, width - len(prompt) :] = prompt
        mask[0, width - len(prompt) :] = True
        drawn = (int(token[0]) for token in self.engine.stream(ids, mask, key, self.sampling))
        if width not in self._compiled:
            with self.console.status("compiling…"):
                first = [token for _, token in zip(range(2), drawn, strict=False)]  # each from a program of its own
            self._compiled.add(width)
            yield from first
        yield from drawn


def open_session(config: ChatConfig, console: Console | None = None) -> ChatSession:
    """Opens a session with the model `config.model`. Raises InputError when it is not a language model."""
    for last in (Path(config.model) / name for name in ("ppo", "dpo")):
        if (last / CONFIG).is_file() and not (last.parent / CONFIG).is_file():
            raise InputError(f"{config.model} is the folder of a run of all steps; its chat model is {last}")
    folder = find_model_folder(config.model)
    if stored_head(folder) == "scalar":
        raise InputError(
            f"{config.model} is a reward model or critic, which cannot write; "
            "give the folder that sft, dpo or ppo wrote"
        )
    tokenizer = config.tokenizer.load(str(folder), config.template)
    dtype = config.mesh.compute_dtype
    options = {"dtype": dtype, "param_dtype": dtype, "progress": sys.stderr.isatty()}
    model = load_pretrained(folder, mesh=config.mesh.make_mesh(), **options)
    model = with_kernels(model, kv_cache_dtype=config.generation.kv_cache_dtype)
    return ChatSession(model, tokenizer, config, console)


def chat(config: ChatConfig, input_stream: TextIO | None = None, output: TextIO | None = None) -> None:
    """Talks to the model line by line, until `/quit` or the end of the input.

    Responses go to `output` (default: stdout), prompts and notices to stderr, so that a pipe gets the responses alone.
    """
    console = Console()
    session = open_session(config, console)
    interactive = input_stream in (None, sys.stdin) and sys.stdin.isatty()
    if interactive:
        console.print("Type a message; /help lists the commands.")
    talk(session, read_lines(input_stream or sys.stdin, interactive), output or sys.stdout, console)


def talk(session: ChatSession, lines: Iterable[str | None], output: TextIO, console: Console) -> None:
    """Responds to `lines` until they end, `/quit`, or two Ctrl-C; a line of None is a Ctrl-C at the prompt."""
    interrupts = 0
    for line in lines:
        command = "" if line is None else line.strip()
        interrupts = interrupts + 1 if line is None else 0
        if command in ("/quit", "/exit") or interrupts > 1:
            return
        if line is None:
            console.print("(Ctrl-C again, or /quit, to leave)")
        elif command == "/reset":
            session.reset()
            console.print("(conversation forgotten)")
        elif command == "/help":
            console.print(HELP)
        elif command.startswith("/"):
            console.print(f"(there is no command {command.split()[0]}; /help lists them)")
        elif command and not answer(session, command, output, console):
            interrupts = 1


def answer(session: ChatSession, text: str, output: TextIO, console: Console) -> bool:
    """Writes the response to `text` as it is sampled; returns False when Ctrl-C stopped it."""
    finished = True
    try:
        with contextlib.closing(session.reply(text)) as pieces:
            for piece in pieces:
                output.write(printable(piece))
                output.flush()
    except InputError as error:
        console.print(f"({error})")
        return True
    except KeyboardInterrupt:
        finished = False
    output.write("\n")
    output.flush()
    if not finished:
        console.print("(stopped; Ctrl-C again, or /quit, to leave)")
    return finished


def printable(text: str) -> str:
    """`text` without control characters, which could change the terminal's state."""
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))


def checked_lines(stream: TextIO) -> Iterator[str]:
    """Lines of `stream`. Raises InputError for bytes that are not UTF-8, which some locales pass on as surrogates."""
    try:
        for line in stream:
            line.encode()
            yield line
    except UnicodeError as error:
        byte = error.object[error.start] if isinstance(error, UnicodeDecodeError) else 0
        if isinstance(error, UnicodeEncodeError):
            byte = ord(error.object[error.start]) & 0xFF
        raise InputError(
            f"standard input: byte 0x{byte:02x} is not valid UTF-8; convert the text first, as with "
            "iconv -f latin1 -t utf-8"
        ) from error


def read_lines(stream: TextIO, interactive: bool) -> Iterator[str | None]:
    """Lines of `stream`, asked for with a prompt and line editing on a terminal; None for a Ctrl-C there.

    Raises InputError for input that is not UTF-8.
    """
    if not interactive:
        yield from checked_lines(stream)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() line editing and history
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            line = None
        yield line

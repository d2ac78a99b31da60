"""The models of a server: a language model with its slots, and a reward model with its scoring program."""

import threading
from collections.abc import Callable
from functools import cached_property

from jaxrlhf.commands.chat import ChatConfig, open_session
from jaxrlhf.commands.evaluation.scoring import score_batch
from jaxrlhf.commands.serve import ServeConfig
from jaxrlhf.commands.serve.conversations import Message
from jaxrlhf.commands.serve.metrics import ModelMetrics
from jaxrlhf.commands.serve.scheduler import Event, Scheduler
from jaxrlhf.data import Tokenizer, encode_rows, encode_texts_as_documents, pad_token_id, vocabulary_size
from jaxrlhf.data.continuations import check_tools
from jaxrlhf.data.renderer import Renderer, Tools
from jaxrlhf.engine import SlotBatch
from jaxrlhf.engine.slots import doubling_widths
from jaxrlhf.errors import InputError
from jaxrlhf.models import DecoderConfig, check_tokenizer_fits, load_pretrained, merged, stored_head
from jaxrlhf.models.hf.checkpoint_files import find_model_folder
from jaxrlhf.trainers.settings import batch_devices, check_context

LONGEST = 4096  # of max_model_len's default
SCORED = 8  # texts that are scored at a time


class Served:
    """The base of the models of a server."""

    name: str
    tokenizer: Tokenizer
    length: int
    """Most tokens of a prompt and its response, or of a text to score."""
    notices: tuple[str, ...] = ()
    """Messages for the user."""

    @property
    def programs(self) -> int:
        """Number of the programs that requests run."""
        raise NotImplementedError

    def warm_up(self, ready: Callable[[], object]) -> None:
        """Compiles every program that requests run, and calls `ready` after each."""
        raise NotImplementedError

    def start(self, on_failure: Callable[[], object]) -> None:
        """Starts to take requests."""

    def close(self) -> None:
        """Ends every request. Raises the error that has ended the model's thread."""


class LanguageModel(Served):
    """A language model, its slots and their scheduler."""

    def __init__(self, name: str, config: ServeConfig) -> None:
        parts = (config.tokenizer, config.template)
        chat = ChatConfig(name, *parts, generation=config.generation, mesh=config.mesh)
        session = open_session(chat)
        self.name, self.tokenizer, self.max_queue = name, session.tokenizer, config.max_queue
        self.tool_calls = config.tool_calls
        self.length = min(session.context, LONGEST) if config.max_model_len is None else config.max_model_len
        self.vocabulary = session.engine.config.vocab_size
        check_length(self.length, session.engine.config)
        if config.tokenizer.lacks_template(name, config.template):
            self.notices = ("has no chat template, so the default prompt_template renders conversations",)
        self.metrics = ModelMetrics()
        self.scheduler = Scheduler(
            SlotBatch(session.engine, config.max_slots, self.length),
            session.sampling.eos_ids,
            config.max_queue,
            self._observe,
        )

    def tool_format(self, tools: Tools) -> str:
        """The form of tool calls. Raises InputError when the chat template shows no tools, or calls of another form."""
        check_tools(Renderer(self.tokenizer, None), tools)
        return self.tool_calls.form(str(self.tokenizer.chat_template))

    def _observe(self, event: Event, seconds: float) -> None:
        if event.token is not None:
            self.metrics.token(event.job.received == 1, seconds, len(event.job.prompt))

    @property
    def programs(self) -> int:
        return self.scheduler.batch.programs

    def warm_up(self, ready: Callable[[], object]) -> None:
        self.scheduler.batch.warm_up(ready)

    def start(self, on_failure: Callable[[], object]) -> None:
        self.scheduler.start(on_failure)

    def close(self) -> None:
        self.scheduler.close()
        if self.scheduler.error is not None:
            raise self.scheduler.error


class RewardModel(Served):
    """A reward model."""

    def __init__(self, name: str, config: ServeConfig) -> None:
        self.name, self.mesh, dtype = name, config.mesh.make_mesh(), config.mesh.compute_dtype
        folder = find_model_folder(name)
        self.tokenizer = config.tokenizer.load(str(folder), config.template)
        options = {"dtype": dtype, "param_dtype": dtype, "new_head": False}
        self.model = merged(load_pretrained(folder, head="scalar", mesh=self.mesh, **options))
        check_tokenizer_fits(vocabulary_size(self.tokenizer), self.model.config, "the tokenizer")
        context = self.model.config.max_positions
        self.length = min(context, LONGEST) if config.max_model_len is None else config.max_model_len
        check_length(self.length, self.model.config)
        self.scored = 0
        self._lock = threading.Lock()

    @cached_property
    def rows(self) -> int:
        """Texts of one program: SCORED, rounded up to what the devices divide."""
        devices = batch_devices(self.mesh)
        return -(-SCORED // devices) * devices

    def widths(self) -> list[int]:
        """The lengths of texts, each with a program of its own."""
        return doubling_widths(self.length)

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        return encode_texts_as_documents(self.tokenizer, texts)

    def encode_conversations(self, conversations: list[list[Message]]) -> list[list[int]]:
        """Token ids of conversations that end with the assistant's message, as the model was trained on."""
        prompts, last = [c[:-1] for c in conversations], [[c[-1:]] for c in conversations]
        rows = encode_rows(self.tokenizer, prompts, last)
        for i, row in enumerate(rows):
            if isinstance(row, str):
                raise InputError(f"conversation {i}: {row}")
        return [[*row.prompt, *row.responses[0][0]] for row in rows if not isinstance(row, str)]

    def scores(self, rows: list[list[int]]) -> list[float]:
        """Scores texts; any thread may call it."""
        result = []
        with self._lock:
            for start in range(0, len(rows), self.rows):
                result += self._scores(rows[start : start + self.rows])
            self.scored += len(rows)
        return result

    def _scores(self, rows: list[list[int]]) -> list[float]:
        width = next(width for width in self.widths() if width >= max(map(len, rows)))
        return score_batch(self.model, self.mesh, rows, self.rows, width, pad_token_id(self.tokenizer)).tolist()

    @property
    def programs(self) -> int:
        return len(self.widths())

    def warm_up(self, ready: Callable[[], object]) -> None:
        for width in self.widths():
            self._scores([[pad_token_id(self.tokenizer)] * width])
            ready()


def check_length(length: int, config: DecoderConfig) -> None:
    """Refuses a max_model_len without room for a prompt and a response, or beyond the model's context."""
    if length < 2:
        raise InputError(f"max_model_len={length} must be at least 2: a prompt and a response have a token each")
    check_context(config, length, "max_model_len")


def open_model(name: str, config: ServeConfig) -> Served:
    """Loads a model of either kind. Raises InputError for a folder that holds none."""
    kind = RewardModel if stored_head(name) == "scalar" else LanguageModel
    return kind(name, config)

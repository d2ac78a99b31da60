"""`jaxrlhf serve`: an OpenAI-compatible server for language models and reward models, with a chat page."""

import errno
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jaxrlhf.config import Le, NonNegativeInt, PathName, Positive, PositiveInt, Settings, alias
from jaxrlhf.config.compilation import CompilationConfig
from jaxrlhf.data import TemplateConfig
from jaxrlhf.engine import GenerationConfig
from jaxrlhf.environments import ToolCallConfig
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.settings import MeshConfig
from jaxrlhf.trainers.tokenizers import TokenizerConfig

if TYPE_CHECKING:
    from jaxrlhf.commands.serve.models import Served

API_KEY = "JAXRLHF_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeConfig(Settings):
    """A server for one or several models."""

    HIDDEN = frozenset({"generation_slots", "train_on", "special_tokens_in_data"})

    model: PathName[Annotated[tuple[str, ...], alias("model_name_or_path")]]
    """Folders or hub names of language models and reward models, each served under this name."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: every network of this machine, for which you should set api_key."""
    port: Annotated[NonNegativeInt, Le(65535)] = 8000
    """Port to listen at; 0: any free one."""
    api_key: str | None = field(default=None, repr=False)
    """Key that clients must send as `Authorization: Bearer KEY`; default: the environment variable JAXRLHF_API_KEY."""
    max_slots: PositiveInt = 8
    """Samples that are generated at a time, for each model."""
    max_queue: PositiveInt = 256
    """Samples that wait for a slot, for each model; further requests get status 429."""
    max_model_len: PositiveInt | None = None
    """Most tokens of prompt and response together, for which each slot holds memory; default: the model's context, at
    most 4096."""
    request_timeout: Positive = 600.0
    """Seconds until a request that has not ended is given up."""
    preferences: PathName[str | None] = None
    """JSON-lines file that the votes of the chat page are appended to, as rows for `jaxrlhf reward --data_path`."""
    template: TemplateConfig = TemplateConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tool_calls: ToolCallConfig = ToolCallConfig()
    generation: GenerationConfig = GenerationConfig()
    mesh: MeshConfig = MeshConfig()
    compilation: CompilationConfig = CompilationConfig()

    def check(self) -> None:
        if not self.model:
            raise InputError("model: name at least one model to serve")
        twice = [name for name in self.model if self.model.count(name) > 1]
        if twice:
            raise InputError(f"model: {twice[0]} is named twice; name each model once")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise InputError("api_key must be printable ASCII text, at least one character")

    @property
    def key(self) -> str | None:
        """The API key, from the setting or from the environment."""
        return self.api_key or os.environ.get(API_KEY) or None


def listen(host: str, port: int) -> socket.socket:
    """Opens the server's socket. Raises InputError for a port that is taken and a host that is none of this machine."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except PermissionError as error:
        raise InputError(f"port={port}: ports below 1024 need more rights; choose another, such as 8000") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port={port} of {host} is taken by another program; choose another --port") from error
        raise InputError(f"host={host}: cannot listen there ({error.strerror}); choose another --host") from error


def check_preferences(path: str | None) -> None:
    """Refuses a file of votes that `jaxrlhf reward` could not read, or that cannot be written."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if not path.endswith(".jsonl"):
        raise InputError(f"preferences={path}: must end in .jsonl, as the data that reward reads")
    if not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise InputError(f"preferences={path}: {folder} is no folder that can be written to; name another file")


class Server:
    """A server that listens, with its models loaded and compiled.

    Attributes:
        models: The models by name.
        url: Where it is reached.
    """

    def __init__(self, config: ServeConfig, console: Console) -> None:
        try:
            import starlette  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise InputError(f"serve needs {error.name}: pip install 'jaxrlhf[serve]'") from error
        from jaxrlhf.commands.serve.app import create_app

        check_preferences(config.preferences)
        self._listener = listen(config.host, config.port)
        host, port = self._listener.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        try:
            self.models = open_models(config, console)
        except BaseException:
            self._listener.close()
            raise
        options = {"key": config.key, "preferences": config.preferences, "timeout": config.request_timeout}
        app = create_app(self.models, **options)
        settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(settings)

    def run(self) -> None:
        """Serves until `stop`, Ctrl-C or SIGTERM, or until a model fails. Raises the model's error."""
        for model in self.models.values():
            model.start(self.stop)
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._listener.close()
            for model in self.models.values():
                model.close()

    def stop(self) -> None:
        """Ends `run`; any thread may call it."""
        self._server.should_exit = True


def open_models(config: ServeConfig, console: Console) -> "dict[str, Served]":
    """Loads the models, and compiles their programs."""
    from jaxrlhf.commands.serve.models import open_model

    models = {}
    for name in config.model:
        with console.status(f"loading {name}…"):
            model = open_model(name, config)
        for notice in model.notices:
            console.print(f"{name}: {notice}")
        with (
            console.status(f"compiling {name}…") as notes,
            console.progress(model.programs, description="programs", unit="program", transient=True) as bar,
        ):
            model.warm_up(bar.update)
            notes.append(f"{model.programs} programs")
        models[name] = model
    return models


def serve(config: ServeConfig) -> None:
    """Loads and compiles the models, and serves them until Ctrl-C or SIGTERM."""
    console = Console()
    server = Server(config, console)
    console.print(f"serving {', '.join(server.models)} at {server.url}")
    if config.key is None and config.host not in LOOPBACK:
        console.print(f"warning: anyone who reaches {config.host} can use it; set --api_key, or {API_KEY}")
    server.run()

"""Settings of a server: what is refused before it starts, and where its key may come from."""

import contextlib

import pytest

from jaxrlhf.commands.serve import ServeConfig, Server, check_preferences, listen
from jaxrlhf.config import parse
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console

pytest.importorskip("uvicorn")


def test_settings_that_cannot_work_are_refused_by_name(demo, tmp_path):
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with contextlib.closing(taken), pytest.raises(InputError, match=rf"port={port} of 127.0.0.1 is taken"):
        listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"host=203\.0\.113\.1: cannot listen"):
        listen("203.0.113.1", 0)
    for path, problem in ((tmp_path / "votes.json", "must end in .jsonl"), (tmp_path / "no" / "v.jsonl", "no folder")):
        with pytest.raises(InputError, match=problem):
            check_preferences(str(path))
    with pytest.raises(InputError, match="named twice"):
        ServeConfig.create(model=("a", "a"))
    with pytest.raises(InputError, match="api_key must be printable") as error:
        ServeConfig.create(model=("a",), api_key="key\nkey")
    assert "key\n" not in str(error.value)
    for length, problem in ((97, r"max_model_len of 97 .* context of 96"), (1, "max_model_len=1 must be at least 2")):
        with pytest.raises(InputError, match=problem):
            Server(ServeConfig.create(model=(demo.lm,), port=0, max_model_len=length), Console(quiet=True))
    config = parse(ServeConfig, ["--model", "a", "b", "--max-slots", "3"], "serve", "")
    assert config.model == ("a", "b") and config.max_slots == 3


def test_the_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("JAXRLHF_API_KEY", "of the environment")
    assert ServeConfig.create(model=("a",)).key == "of the environment"
    assert ServeConfig.create(model=("a",), api_key="given").key == "given"

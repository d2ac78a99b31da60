"""Secrets are replaced in messages, settings and logs, wherever they come from."""

import logging

import pytest

from jaxrlhf.cli import hide_secrets, main
from jaxrlhf.commands.serve import ServeConfig
from jaxrlhf.config import save_yaml
from jaxrlhf.config.secrets import redacted

VARIABLES = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD"]
VARIABLES += ["AZURE_STORAGE_CONNECTION_STRING", "JAXRLHF_API_KEY"]
SECRET = "correct-horse-battery"


@pytest.mark.parametrize("name", VARIABLES)
def test_the_value_of_a_variable_that_is_named_like_a_secret_is_replaced(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    record = logging.LogRecord("jaxrlhf", logging.INFO, "", 0, "opening %s", (f"s3://bucket?x={SECRET}",), None)
    assert hide_secrets(record) and record.getMessage() == "opening s3://bucket?x=***"
    assert redacted({"note": [f"with {SECRET}"]}) == {"note": ["with ***"]}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://user:password@host/x", "https://***@host/x"),
        ("s3://AKIAIOSFODNN7EXAMPLE:abc@bucket/x", "s3://***@bucket/x"),
        ("key AKIAIOSFODNN7EXAMPLE", "key AKIA***"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "hf_***"),
        ("https://x?sig=abc&split=train", "https://x?sig=***&split=train"),
        ("AccountName=a;AccountKey=abc==;EndpointSuffix=b", "AccountName=a;AccountKey=***;EndpointSuffix=b"),
        ("Authorization: Bearer abcdef", "Authorization: Bearer ***"),
    ],
)
def test_secrets_of_a_known_form_are_replaced(text, hidden):
    assert redacted(text) == hidden


@pytest.mark.parametrize("words", [["se\0cret-key"], ["secret-key", "second"], ["sécret-key"]])
def test_no_message_shows_an_api_key_that_is_refused(capsys, words):
    assert main(["serve", "--model", "m", "--api_key", *words]) == 2
    said = capsys.readouterr().err
    assert "api_key" in said and "cret-key" not in said


def test_saved_settings_and_their_repr_hold_no_api_key(tmp_path):
    config = ServeConfig(model=("m",), api_key=SECRET)
    save_yaml(config, tmp_path / "config.yaml")
    assert SECRET not in (tmp_path / "config.yaml").read_text() + repr(config)

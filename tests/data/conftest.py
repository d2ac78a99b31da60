"""A tokenizer and settings for tests of data; what `load_data` makes lies in the test's own folder."""

import pytest
from rows import write_lines

from jaxrlhf.data import DataConfig, demo


@pytest.fixture(scope="session")
def tokenizer():
    return demo.train_tokenizer(["Human: question 12 Assistant: yes no 3"] * 20, vocab_size=300)


@pytest.fixture
def config(tmp_path):
    """`config(rows, **options)`: settings that read these rows (None: those of the options), unpacked."""

    def make(rows=None, name="rows.jsonl", **options):
        if rows is not None:
            options["data_path"] = write_lines(tmp_path / name, rows)
        return DataConfig.create(**{"data_cache_dir": str(tmp_path / "cache"), "packing": False} | options)

    return make

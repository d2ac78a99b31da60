"""Sources of rows: files, folders, globs, saved data sets and data sets of the hub, and their splits."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxrlhf.config.files import is_plain_name, read_json
from jaxrlhf.config.remote import fetch_data, is_url
from jaxrlhf.data.files import COMPRESSED, KINDS, Table, check_arrow, hash_file, loading, read_file, suffix_of
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from jaxrlhf.data.registry import NamedDataset

T = TypeVar("T")

EVAL_NAMES = ("eval", "validation", "valid", "val", "dev", "test")  # in order of preference
TRAIN_NAMES = ("train", "training")
MAX_FILES = 100_000  # of a folder
SAVE_AGAIN = "save the data set again"
DEMO_NAME = "demo"


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        name: the source as the user gave it.
        splits: the files, or the `datasets.Dataset`, of "train" and "eval", where the source has them.
        cache: folder for what `datasets` reads.
        streaming: rows are read as they are needed.
    """

    name: str
    splits: Mapping[str, Any]
    cache: Path
    streaming: bool = False
    _tables: dict[str, list[Table]] = field(default_factory=dict, repr=False)

    def data(self, split: str) -> Any:
        """The files or the data set of a split. Raises InputError when the source has none."""
        if split not in self.splits:
            raise InputError(
                f"data_path '{self.name}': has only evaluation data; add training data, or give it as eval_data_path"
            )
        return self.splits[split]

    def identities(self, split: str) -> set[Path | str]:
        """The files of a split, or the data set's fingerprint."""
        data = self.data(split)
        return {path.resolve() for path in data} if isinstance(data, list) else {data._fingerprint}

    def fingerprint(self, split: str) -> str:
        """Hashes the contents of a split without parsing its rows."""
        data = self.data(split)
        if not isinstance(data, list):
            return data._fingerprint
        return hashlib.blake2b("".join(map(hash_file, data)).encode(), digest_size=16).hexdigest()

    def tables(self, split: str) -> list[Table]:
        """The tables of a split, opened on the first call. Raises InputError when one holds no rows."""
        if split not in self._tables:
            data = self.data(split)
            if isinstance(data, list):
                self._tables[split] = [read_file(path, self.cache, self.streaming) for path in data]
            else:
                if not self.streaming and not len(data):
                    raise InputError(f"data_path '{self.name}': its {split} split holds no rows")
                self._tables[split] = [Table(data, f"{self.name} ({split})")]
        return self._tables[split]


@contextlib.contextmanager
def named_as(prefix: str) -> Iterator[None]:
    """Errors about a data_path name the setting that the path comes from: `eval_` or `ptx_` before data_path."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise (InputError(prefix + text) if text.startswith("data_path ") else error) from error.__cause__


def resolve_source(
    name: str, cache: Path, *, split: str = "", named: NamedDataset | None = None, streaming: bool = False
) -> Source:
    """Finds the source that `name` stands for.

    Args:
        name: `demo`, a file or folder (also at a URL), a glob, a `save_to_disk` folder, or a data set of the hub; each
            with `@split` where it has several, the hub's also with `:config`.
        cache: the cache folder.
        split: the split to train on, where the name does not say it.
        named: the declaration of a named data set.
        streaming: read rows as they are needed.

    Raises:
        InputError: there is no such source; the message names what was looked for.
    """
    store = cache / "datasets"
    if name == DEMO_NAME:
        from jaxrlhf.data.demo import materialize_demo

        demo = materialize_demo(cache)
        return Source(name, {"train": [demo.train], "eval": [demo.eval]}, store, streaming)
    plain, _, wanted = (name, "", "") if Path(name).expanduser().exists() else name.rpartition("@")
    plain, wanted = (plain, wanted or split) if plain else (name, split)
    path = fetch_data(plain) if is_url(plain) else Path(plain).expanduser()
    if named and (Path(named.path).expanduser().exists() or suffix_of(named.path) or looks_like_path(named.path)):
        plain, path = named.path, Path(named.path).expanduser()  # a declaration may name a local file
    if path.is_file():
        if not suffix_of(path):
            endings = f"{', '.join(KINDS)}, each also {', '.join(COMPRESSED[1:])}"
            raise InputError(f"data_path '{name}': unknown kind of file; use one of {endings}")
        return Source(name, {"train": [path]}, store, streaming)
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if path.is_dir() and not saved:
        groups = _by_split(name, _files_below(name, path), path)
        return Source(name, choose_splits(name, groups, *_named_splits(named, groups, wanted)), store, streaming)
    if any(sign in plain for sign in "*?["):
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file() and suffix_of(p)]
        return Source(name, choose_splits(name, _by_split(name, found, path.parent), wanted), store, streaming)
    if not saved and (suffix_of(path) or looks_like_path(plain)):
        raise InputError(f"data_path '{name}': no such file or folder; check the path")
    groups = _load_saved(name, path, streaming) if saved else _load_hub(name, plain, named, streaming)
    return Source(name, choose_splits(name, groups, *_named_splits(named, groups, wanted)), store, streaming)


def _named_splits(named: NamedDataset | None, groups: Collection[str], wanted: str) -> tuple[str, str]:
    """The split to train on, and the one to evaluate on, as a declaration has them; empty: where it does not say."""
    if named is None:
        return wanted, ""
    return wanted or (named.split if named.split in groups else ""), named.eval_split


def _load_saved(name: str, folder: Path, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    """The splits of a `save_to_disk` folder."""
    import datasets

    try:
        _check_saved(folder)
    except InputError as error:
        raise InputError(f"data_path '{name}': the saved data set cannot be read: {error}") from error
    with loading(f"data_path '{name}': the saved data set cannot be read", "save it again"):
        loaded: Any = datasets.load_from_disk(str(folder))
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {key: part.to_iterable_dataset() for key, part in parts.items()} if streaming else parts


def _check_saved(folder: Path) -> None:
    """Raises InputError when a `save_to_disk` folder names folders or files outside itself."""
    parts, path = [folder], folder / "dataset_dict.json"
    if os.path.lexists(path):
        parts = [folder / split for split in _plain_names(path, "splits", read_json(path, SAVE_AGAIN).get("splits"))]
    for part in parts:
        path = part / "state.json"
        files = read_json(path, SAVE_AGAIN).get("_data_files")
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise InputError(f"{path}: _data_files must list files; {SAVE_AGAIN}")
        names = _plain_names(path, "_data_files", [file.get("filename") for file in files])
        read_json(part / "dataset_info.json", SAVE_AGAIN)
        for name in names:
            check_arrow(part / name)


def _plain_names(path: Path, field: str, names: object) -> list[str]:
    """The names in a field of a file, each of something beside it."""
    if not isinstance(names, list) or not names:
        raise InputError(f"{path}: {field} must be a list of names, at least one; {SAVE_AGAIN}")
    for name in names:
        if not is_plain_name(name):
            raise InputError(f"{path}: {field} names {str(name)[:80]!r}, which is not in this folder; {SAVE_AGAIN}")
    return names


def _load_hub(
    name: str, plain: str, named: NamedDataset | None, streaming: bool
) -> dict[str, Dataset | IterableDataset]:
    """The splits of a data set of the hub: `owner/name` or `owner/name:config`."""
    import datasets

    repository, _, config = plain.partition(":")
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    if named:
        repository, config = named.path, config or named.config
        options |= {key: value for key in ("revision", "data_dir") if (value := getattr(named, key))}
    with loading(
        f"data_path '{name}': neither a file or folder here nor a data set that the hub gives",
        "check the name and the network, or give a local file",
    ):
        loaded: Any = datasets.load_dataset(repository, config or None, **options)
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def looks_like_path(name: str) -> bool:
    """True when `name` cannot be a name on the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _files_below(name: str, folder: Path) -> list[Path]:
    """The data files of a folder and of those in it, without hidden ones."""
    found, seen = [], 0
    for at, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(at, each) for each in files if not each.startswith(".") and suffix_of(each)]
        seen += len(files) + len(folders)
        if seen > MAX_FILES:
            raise InputError(f"data_path '{name}': the folder holds more than {MAX_FILES:,} files; name a smaller one")
    return found


def _by_split(name: str, files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their names or folders say; those that say none are under the empty name."""
    if not files:
        raise InputError(f"data_path '{name}': holds no {', '.join(KINDS)} file; put the data there")
    groups: dict[str, list[Path]] = {}
    for path in sorted(files):
        try:
            relative = path.relative_to(root)
        except ValueError:
            relative = Path(path.name)
        groups.setdefault(_split_name(relative), []).append(path)
    return groups


def _split_name(path: Path) -> str:
    """The split that a file's name or one of its folders says: `train_sft` of `train_sft-00000-of-00003.parquet`."""
    stem = path.name.lower()[: path.name.lower().rindex(suffix_of(path))]
    for part in (stem, *(p.lower() for p in reversed(path.parts[:-1]))):
        plain = re.sub(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16})?$", "", part)
        words = re.findall(r"[a-z]+", plain)
        if any(word in (*TRAIN_NAMES, *EVAL_NAMES, "evaluation") for word in words):
            return plain.replace("training", "train").replace("evaluation", "eval")
    return ""


def _role(split: str) -> str:
    """ "train", "eval", or the empty string, by the words in a split's name."""
    words = re.findall(r"[a-z]+", split.lower())
    named = [w for w in words if w in (*TRAIN_NAMES, *EVAL_NAMES)]
    if not named:
        return ""
    return "train" if named[-1] in TRAIN_NAMES else "eval"


def choose_splits(name: str, groups: Mapping[str, T], wanted: str = "", evaluation: str = "") -> dict[str, T]:
    """The split to train on as "train", and the one to evaluate on as "eval", where there are such.

    Args:
        name: the source, for messages.
        groups: the data of each split by its name; the empty name for data without one.
        wanted: the split to train on; empty: the only one that there is for training.
        evaluation: the split to evaluate on; empty: the one that belongs to the split to train on.

    Raises:
        InputError: `wanted` does not exist, or several splits could be meant.
    """
    listed = ", ".join(key or "(without a name)" for key in groups)
    if wanted and wanted not in groups:
        raise InputError(f"data_path '{name}': has no split '{wanted}'; it has {listed}")
    training = [wanted] if wanted else [key for key in groups if _role(key) == "train"]
    training = training or [key for key in groups if not _role(key)]
    if len(training) > 1:
        raise InputError(
            f"data_path '{name}': has several splits to train on: {', '.join(training)}; choose one with "
            f"{name}@{training[0]}"
        )
    start = training[0] if training else ""
    chosen = {"train": groups[start]} if training else {}
    partners = [start.replace("train", kind) for kind in EVAL_NAMES if "train" in start]
    partners += [*EVAL_NAMES, *(key for key in groups if not training and _role(key) == "eval")]
    found = [key for key in ([evaluation] if evaluation else partners) if key in groups and key != start]
    return chosen | ({"eval": groups[found[0]]} if found else {})

"""Models of the hub and at URLs: the files of one weight format, downloaded or cached."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from jaxrlhf.config.model_folder import SMALL_FILES, is_adapter
from jaxrlhf.config.remote import fetch
from jaxrlhf.config.secrets import redacted
from jaxrlhf.errors import InputError

# Weight formats, the preferred one first: safetensors, whole or sharded, and old PyTorch files.
_FORMATS = (r"model(-b?[-\w]*)?\.safetensors(\.index\.json)?", r"pytorch_model[-\w]*\.bin(\.index\.json)?")
_ADAPTER = r"adapter_model\.(safetensors|bin)"


def files_to_fetch(files: Iterable[str]) -> list[str]:
    """Chooses the files of a repository that a model needs: one weight format, configs and the tokenizer.

    Files in subfolders (other runtimes' weights, training checkpoints) are left out.
    """
    files = sorted(files)
    formats = [[f for f in files if re.fullmatch(pattern, f)] for pattern in _FORMATS]
    chosen = next((found for found in formats if found), [])
    weights = {f for found in formats for f in found}
    others = [f for f in files if f not in weights and re.fullmatch(f"{SMALL_FILES}|{_ADAPTER}", f)]
    return sorted([*chosen, *others])


def download(name: str) -> Path:
    """Returns the local snapshot of the hub repository `owner/name`; without a connection the cached one.

    Raises:
        InputError: The hub does not have it, does not give it without a login, or cannot be reached.
    """
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        files = files_to_fetch(entry.rfilename for entry in model_info(name).siblings or ())
        print(f"fetching {name} from the model hub…", file=sys.stderr, flush=True)
        return Path(snapshot_download(name, allow_patterns=[re.sub(r"([*?\[])", r"[\1]", f) for f in files]))
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(_explained(name, error)) from None  # hub errors may carry the headers of the request
    except Exception as error:  # no connection; its kind depends on the hub library's HTTP client
        return _cached(name, error)


def download_url(url: str) -> Path:
    """Returns the local copy of a model folder at a URL such as s3://bucket/model.

    Raises:
        InputError: There is no model.
        StorageError: The store does not give it.
    """
    folder = fetch(url, files_to_fetch)
    if not (folder / "config.json").is_file() and not is_adapter(folder):
        raise InputError(f"{redacted(url)}: there is no model, no config.json; check the URL")
    return folder


def _cached(name: str, error: Exception) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise InputError(_explained(name, error)) from None


def _explained(name: str, error: Exception) -> str:
    """Message for a download that failed; it never holds a token."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return (
            f"model {name!r} is gated: accept its conditions at https://huggingface.co/{name}, then {login} "
            "(with a token of the account that accepted them)"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return (
            f"model {name!r} is neither a local folder nor could it be fetched from the hub: there is no such "
            f"repository, or it is private; check the name, and for a private one {login}"
        )
    reason = re.sub(r"hf_\w+", "hf_…", (str(error).strip() or type(error).__name__).splitlines()[0])
    return (
        f"model {name!r} is neither a local folder nor could it be fetched from the hub: {reason}; check the name and "
        "the network, or give a folder"
    )

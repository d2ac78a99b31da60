"""Old PyTorch checkpoints (`pytorch_model.bin`), read through torch's safe unpickler. They are never written."""

import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.hf.tensor_source import TensorSource, refuse

if TYPE_CHECKING:
    import torch


def open_bin(path: Path) -> TensorSource:
    """Opens one file; it needs torch.

    Raises:
        InputError: torch is not installed, or the file holds something else than named tensors that numpy can hold.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path} is an old PyTorch checkpoint; reading it needs torch (pip install torch), or convert it first"
        ) from error
    try:
        # Files from before torch 1.6 are no archives, and only archives can be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged or unsafe pickles
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {refused[1].rstrip('.')}" if refused else type(error).__name__
        raise InputError(
            f"{path} cannot be read safely as a state dict ({reason}): it is damaged, or holds more than tensors; use "
            "another file, or save the weights as safetensors where you trust this one"
        ) from error
    tensors = _tensors(path, state)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def peek(name: str) -> np.ndarray:
        array = read(name)
        return array[:1] if array.ndim else array

    return TensorSource(str(path), {name: tuple(value.shape) for name, value in tensors.items()}, read, peek=peek)


def _tensors(path: Path, state: object) -> dict[str, "torch.Tensor"]:
    """The tensors of an unpickled state dict; InputError for what is none."""
    import torch

    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not tensors by name; save the model's state_dict()")
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if state and not tensors:
        found = ", ".join(repr(name) for name in list(state)[:5])
        raise InputError(f"{path} holds no tensors by name, but {found}; save the model's state_dict() itself")
    problems = [f"{name!r} is not the name of a tensor" for name in tensors if not isinstance(name, str)]
    problems += [f"{name} is {kind}" for name, value in tensors.items() if (kind := _unreadable(value))]
    refuse(f"{path} holds tensors that are not supported; save the original weights", problems)
    return tensors


def _unreadable(tensor: "torch.Tensor") -> str:
    """The reason why a tensor cannot be read, such as "sparse"; empty for a plain one."""
    import torch

    if tensor.is_meta:
        return "on the meta device, without values"
    if tensor.is_quantized or str(tensor.dtype).startswith(("torch.float8", "torch.float4", "torch.quint", "torch.q")):
        return f"quantised ({tensor.dtype})"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})"
    return ""

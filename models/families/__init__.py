"""The supported Hugging Face families, by `model_type`."""

from jaxrlhf.errors import InputError
from jaxrlhf.models.families.gpt2 import GPT2
from jaxrlhf.models.families.llama import LLAMA
from jaxrlhf.models.families.opt import OPT
from jaxrlhf.models.mapping import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA, OPT)}


def get_family(model_type: str, where: str) -> Family:
    """The family of a `model_type`; InputError names `where` it stood and what is supported."""
    if model_type not in FAMILIES:
        raise InputError(f"{where}: model type {model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    return FAMILIES[model_type]

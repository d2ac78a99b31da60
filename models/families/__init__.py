"""The supported Hugging Face families, by `model_type`."""

from jaxrlhf.errors import InputError
from jaxrlhf.models.families.bloom import BLOOM
from jaxrlhf.models.families.gpt2 import GPT2
from jaxrlhf.models.families.gpt_neo import GPT_NEO
from jaxrlhf.models.families.gpt_neox import GPT_NEOX
from jaxrlhf.models.families.gptj import CODEGEN, GPTJ
from jaxrlhf.models.families.llama import LLAMA
from jaxrlhf.models.families.mistral import MISTRAL
from jaxrlhf.models.families.mixtral import MIXTRAL
from jaxrlhf.models.families.opt import OPT
from jaxrlhf.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from jaxrlhf.models.hf.mapping import Family

_ALL = (BLOOM, CODEGEN, GPT2, GPT_NEO, GPT_NEOX, GPTJ, LLAMA, MISTRAL, MIXTRAL, OPT, QWEN2, QWEN3, QWEN3_MOE)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def get_family(model_type: str, where: str) -> Family:
    """Returns the family of a `model_type`; InputError if it is not supported, with `where` it was found."""
    if model_type not in FAMILIES:
        raise InputError(f"{where}: model type {model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    return FAMILIES[model_type]

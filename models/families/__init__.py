"""The supported Hugging Face families, by `model_type`."""

from jaxrlhf.errors import InputError
from jaxrlhf.models.families.bloom import BLOOM
from jaxrlhf.models.families.cohere2 import COHERE2
from jaxrlhf.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxrlhf.models.families.gpt2 import GPT2
from jaxrlhf.models.families.gpt_neo import GPT_NEO
from jaxrlhf.models.families.gpt_neox import GPT_NEOX
from jaxrlhf.models.families.gptj import CODEGEN, GPTJ
from jaxrlhf.models.families.granite import GRANITE
from jaxrlhf.models.families.llama import LLAMA
from jaxrlhf.models.families.mistral import MISTRAL
from jaxrlhf.models.families.mixtral import MIXTRAL
from jaxrlhf.models.families.olmo import OLMO2, OLMO3
from jaxrlhf.models.families.opt import OPT
from jaxrlhf.models.families.phi3 import PHI3
from jaxrlhf.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from jaxrlhf.models.families.smollm3 import SMOLLM3
from jaxrlhf.models.hf.mapping import Family

_FIRST = (BLOOM, CODEGEN, GPT2, GPT_NEO, GPT_NEOX, GPTJ, OPT)
_LLAMA_LIKE = (
    COHERE2,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GRANITE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OLMO3,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_FIRST, *_LLAMA_LIKE)}


def get_family(model_type: str, where: str) -> Family:
    """Returns the family of a `model_type`; InputError if it is not supported, with `where` it was found."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"{where}: model type {model_type!r} is not supported; supported are {sorted(FAMILIES)}")
    return FAMILIES[model_type]

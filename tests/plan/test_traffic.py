"""The cost of compiled programs: by hand on a small HLO module, and bounds that real compilers' programs keep."""

import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.plan import hlo
from jaxrlhf.plan.compile import check_compiler, compile_program, compile_programs
from jaxrlhf.plan.devices import DEVICES
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.traffic import Loops, Rates, kernels, launches, traffic
from jaxrlhf.runs.console import Console

MODULE = """HloModule jit_generate, is_scheduled=true

%fused_slice (param_0: f32[8,16], param_1: s32[]) -> bf16[1,16] {
  %param_0 = f32[8,16]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cast = bf16[8,16]{1,0} convert(%param_0)
  ROOT %row = bf16[1,16]{1,0} dynamic-slice(%cast, %param_1, %zero), dynamic_slice_sizes={1,16}
}

%fused_update (p.0: f32[8,16], p.1: f32[1,16], p.2: s32[]) -> f32[8,16] {
  %p.0 = f32[8,16]{1,0} parameter(0)
  %p.1 = f32[1,16]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %written = f32[8,16]{1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %none)
}

%body (state: (s32[], f32[8,16], bf16[4,2,128,8])) -> (s32[], f32[8,16], bf16[4,2,128,8]) {
  %state = (s32[], f32[8,16]{1,0}, /*index=2*/bf16[4,2,128,8]{3,2,1,0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %table = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %cache = bf16[4,2,128,8]{3,2,1,0} get-tuple-element(%state), index=2
  %query = bf16[1,16]{1,0} fusion(%table, %step), kind=kLoop, calls=%fused_slice
  %share = (bf16[4,2,8]{2,1,0}, bf16[4,2,128,8]{3,2,1,0}) custom-call(%query, %cache), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{1}: (1, {})}, metadata={op_name="decode_attention_share"}
  ROOT %next = (s32[], f32[8,16]{1,0}, bf16[4,2,128,8]{3,2,1,0}) tuple(%step, %table, %cache)
}

%condition (state.1: (s32[], f32[8,16], bf16[4,2,128,8])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}, bf16[4,2,128,8]{3,2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

%counted (carry: f32[8,16]) -> f32[8,16] {
  %carry = f32[8,16]{1,0} parameter(0)
  ROOT %moved = f32[8,16]{1,0} copy(%carry)
}

ENTRY %main (a: f32[8,16], b: f32[16,4], c: f32[1,16], i: s32[]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %c = f32[1,16]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %product = (f32[8,4]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %updated = f32[8,16]{1,0} fusion(%a, %c, %i), kind=kLoop, calls=%fused_update
  %sorted = f32[64,50272]{1,0} sort(%logits), dimensions={1}, to_apply=%condition
  %copied = f32[8,16]{1,0} while(%updated), condition=%condition, body=%counted, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %decoded = (s32[], f32[8,16]{1,0}, bf16[4,2,128,8]{3,2,1,0}) while(%copied), condition=%condition, body=%body
}
"""  # noqa: E501
THUNKS = """000: kCommandBuffer [source | next=003 (1)]
    001: kCustomKernel [source | sink] updated grid: [1, 1, 1]
    002: kCublasLtMatmul [source | sink] kCublasLtMatmul
003: kWhile [prev=000 (1) | next=008 (1)]
condition:
    004: kCustomKernel [source | sink] more
  body:
    005: kDynamicSliceFusion [source | sink] params=1, results=1
        006: kCopy [source | sink] kCopy
    007: kCopy [source | sink] kCopy
008: kCommandBuffer [prev=003 (1) | sink]
    009: kWhile [source | sink]
condition:
        010: kCustomKernel [source | sink] more
      body:
        011: kCustomKernel [source | sink] query
"""


def test_slices_updates_in_place_loops_and_kernels_count_what_they_move():
    found = {kernel.name: kernel for kernel in kernels(hlo.parse(MODULE), Loops(steps=5, live=0.25))}
    product, updated, query, share = (found[name] for name in ("product", "updated", "query", "share"))
    assert (product.kind, product.flops, product.written) == ("product", 2 * 8 * 4 * 16, 4 * 8 * 4)
    assert product.read == 4 * (8 * 16 + 16 * 4)
    assert (updated.read, updated.written) == (4 * 16 + 4, 4 * 16), "the rest of the array stays where it is"
    assert (query.read, query.written, query.times, query.decodes) == (4 * 16 + 4, 2 * 16, 5, True)
    cache = 2 * 4 * 2 * 128 * 8
    assert share.kind == "decode_attention_share"
    assert (share.read, share.written) == (2 * 16 + cache / 4, 2 * 4 * 2 * 8), "the cache is written in place"
    assert (found["moved"].kind, found["moved"].times, found["moved"].decodes) == ("copy", 3, False)
    assert found["sorted"].launches == 15 and found["sorted"].written == 15 * 4 * 64 * 50272


def test_sums_weigh_bytes_products_and_launches():
    found = [kernel for kernel in kernels(hlo.parse(MODULE), Loops(steps=5)) if kernel.name != "sorted"]
    rates = Rates(bandwidth=1e3, flops=1.0, launch=10.0)
    alone, together = traffic(found, rates), traffic(found, rates, launches(THUNKS))
    assert alone.kernels == alone.launched == 2 + 3 + 5 * 2
    assert launches(THUNKS) == [2, 3, 0] and together.launched == 2 + 3 * 3
    assert alone.copies == 3 and alone.flops == 1024
    busy = 1024 + sum(k.times * k.bytes for k in found if k.name != "product") / 1e3
    assert together.seconds == pytest.approx(busy + 10 * 11)
    assert together.decoded == sum(5 * k.bytes for k in found if k.decodes)


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing\n")


@pytest.mark.long
@pytest.mark.parametrize("device", ["a100-80g", "h200"])
def test_the_compiled_programs_keep_the_bounds_of_bytes_time_and_memory(device):
    """The published pair of models at full depth, 64 rows of 256 + 256 tokens, micro-batches of 8."""
    try:
        check_compiler(DEVICES[device])
    except InputError as missing:
        pytest.skip(str(missing))
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
    config = PlanConfig.create(actor="opt-1.3b", device=device, **batch)
    found = compile_programs(config, Console(quiet=True))
    seconds = sum(x.traffic.seconds for x in found.values())
    assert seconds < {"h200": 1.75, "a100-80g": 4.4}[device]
    assert max(x.peak for x in found.values()) < 34 * 2**30
    assert found["generate"].traffic.decoded / 255 < 8.0e9
    assert found["train"].traffic.bytes < 1_700e9
    llama = PlanConfig.create(trainer="grpo", actor="llama-3.2-1b", reward=None, device=device, **batch)
    step = compile_program(llama, "generate").traffic.decoded
    assert step / 255 < 3.6e9

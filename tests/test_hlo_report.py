"""benchmarks/hlo_report.py: counting kernels, converts and copies in the text of a compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.benchmark_scripts import load_script

hlo = load_script("hlo_report")

# In the form of XLA's GPU backend: an int8 matmul in a command buffer, one whose convert stands alone, a cache.
GPU = """
HloModule jit_step, is_scheduled=true, input_output_alias={ {1}: (2, {}, may-alias) }

%gemm_fusion_dot (p0: bf16[1,64], p1: s8[64,128]) -> bf16[1,128] {
  %p0 = bf16[1,64]{1,0} parameter(0)
  %p1 = s8[64,128]{1,0} parameter(1)
  %convert.1 = bf16[64,128]{1,0} convert(%p1)
  ROOT %dot.1 = bf16[1,128]{1,0} dot(%p0, %convert.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_convert (p: s8[64,128]) -> bf16[64,128] {
  %p = s8[64,128]{1,0} parameter(0)
  ROOT %convert.2 = bf16[64,128]{1,0} convert(s8[64,128]{1,0} %p)
}

%fused_write (cache: bf16[1,2,16,8], new: bf16[1,2,1,8], at: s32[]) -> bf16[1,2,16,8] {
  %cache = bf16[1,2,16,8]{3,2,1,0} parameter(0)
  %new = bf16[1,2,1,8]{3,2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus.1 = bf16[1,2,16,8]{3,2,1,0} dynamic-update-slice(%cache, %new, %zero, %zero, %at, %zero)
}

%fused_copy (p: bf16[1,2,16,8]) -> bf16[1,16,2,8] {
  %p = bf16[1,2,16,8]{3,2,1,0} parameter(0)
  ROOT %transpose.9 = bf16[1,16,2,8]{3,2,1,0} transpose(%p), dimensions={0,2,1,3}
}

%command_buffer (a: bf16[1,64], w: s8[64,128]) -> bf16[1,128] {
  %a = bf16[1,64]{1,0} parameter(0)
  %w = s8[64,128]{1,0} parameter(1)
  ROOT %fusion.1 = bf16[1,128]{1,0} fusion(%a, %w), kind=kCustom, calls=%gemm_fusion_dot
}

ENTRY %main (x: bf16[1,64], w: s8[64,128], c: bf16[1,2,16,8]) -> (bf16[1,128], bf16[1,2,16,8]) {
  %x = bf16[1,64]{1,0} parameter(0)
  %w = s8[64,128]{1,0} parameter(1)
  %c = bf16[1,2,16,8]{3,2,1,0} parameter(2)
  %n = bf16[1,2,1,8]{3,2,1,0} parameter(3)
  %i = s32[] parameter(4)
  %dot.7 = bf16[1,1]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %call = bf16[1,128]{1,0} call(%x, %w), to_apply=%command_buffer
  %fusion.2 = bf16[64,128]{1,0} fusion(%w), kind=kLoop, calls=%fused_convert
  %custom-call.1 = (bf16[1,128]{1,0}, s8[4096]{0}) custom-call(%x, %fusion.2), custom_call_target="__cublas$gemm"
  %gte = bf16[1,128]{1,0} get-tuple-element(%custom-call.1), index=0
  %fusion.3 = bf16[1,2,16,8]{3,2,1,0} fusion(%c, %n, %i), kind=kLoop, calls=%fused_write
  %fusion.4 = bf16[1,16,2,8]{3,2,1,0} fusion(%fusion.3), kind=kLoop, calls=%fused_copy
  %copy.5 = bf16[1,2,16,8]{2,3,1,0} copy(%fusion.3)
  ROOT %tuple = (bf16[1,128]{1,0}, bf16[1,2,16,8]{3,2,1,0}) tuple(%gte, %fusion.3)
}
"""

LOOP = """
%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %g = f32[4]{0} get-tuple-element(%t), index=1
  %i = s32[] get-tuple-element(%t), index=0
  %add = f32[4]{0} add(%g, %g)
  ROOT %r = (s32[], f32[4]{0}) tuple(%i, %add)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %t = (s32[], f32[4]{0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = (s32[], f32[4]{0}) parameter(0)
  ROOT %while = (s32[], f32[4]{0}) while(%x), condition=%condition, body=%body, backend_config=KNOWN
}
""".replace("KNOWN", '{"known_trip_count":{"n":"30"}}')


def test_what_is_launched_is_counted_inside_command_buffers_and_not_inside_fusions() -> None:
    found = hlo.report(GPU, num_layers=2, cache_shape=(1, 2, 16, 8), weight_elements=64 * 128)
    assert found["opcodes"] == {"fusion": 4, "dot": 1, "custom-call": 1, "copy": 1}
    assert found["kernels"] == 7
    assert found["kernels_per_layer"] == 3.5


def test_a_convert_inside_a_matmul_is_told_from_one_that_writes_the_weights_out() -> None:
    found = hlo.report(GPU, num_layers=2, cache_shape=(1, 2, 16, 8), weight_elements=64 * 128)
    assert (found["converts_fused"], found["converts_alone"]) == (1, 1)
    larger = hlo.report(GPU, num_layers=2, cache_shape=(1, 2, 16, 8), weight_elements=64 * 129)
    assert (larger["converts_fused"], larger["converts_alone"]) == (0, 0)


def test_a_copied_or_transposed_cache_is_found_and_one_written_in_place_is_none() -> None:
    found = hlo.report(GPU, num_layers=2, cache_shape=(1, 2, 16, 8), weight_elements=1)
    assert found["cache_copies"] == ["fusion.4", "copy.5"]


def test_a_loop_counts_as_often_as_it_runs() -> None:
    found = hlo.report(LOOP, num_layers=30, cache_shape=(9,), weight_elements=1)
    assert (found["kernels"], found["unknown_loops"]) == (30, 0)
    unknown = LOOP.replace("known_trip_count", "something")
    found = hlo.report(unknown, num_layers=30, cache_shape=(9,), weight_elements=1)
    assert (found["kernels"], found["unknown_loops"]) == (1, 1)


def test_the_text_of_this_jax_is_understood() -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return x

    shapes = (
        jax.ShapeDtypeStruct((8, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 64), jnp.float32),
    )
    text = jax.jit(step).lower(*shapes).compile().as_text()
    found = hlo.report(text, num_layers=3, cache_shape=(9,), weight_elements=1)
    assert found["kernels"] >= 3
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing")

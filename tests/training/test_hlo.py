"""What is counted on compiled programs, against programs written by hand and counted by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdlm_jax.training import hlo, hlo_groups, hlo_products

# A loop of five trips, as GPUs and CPUs say it, and one of three, as TPUs say it, whose body has a
# fused reduce-scatter and a collective that begins in one operation and ends in another.
PROGRAM = """HloModule written_by_hand, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body.1 (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %rows = f32[8,16]{1,0} get-tuple-element(%state), index=1
  %gathered = f32[32,16]{1,0} all-gather(%rows), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %w = f32[16,32]{1,0} constant({...})
  %product = f32[8,32]{1,0} dot(%rows, %gathered), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %reduced = f32[8,32]{1,0} all-reduce(%product), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i, %rows)
}

%more.1 (state.1: (s32[], f32[8,16])) -> pred[] {
  %state.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%all-reduce-scatter.3 (whole: bf16[64,128]) -> bf16[16,128] {
  %whole = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %summed = bf16[64,128]{1,0} all-reduce(%whole), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = bf16[16,128]{1,0} dynamic-slice(%summed, %zero, %zero), dynamic_slice_sizes={16,128}
}

%start (p: bf16[4,128]) -> (bf16[4,128], bf16[32,128]) {
  %p = bf16[4,128]{1,0} parameter(0)
  %begun = bf16[32,128]{1,0} all-gather(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %handle = (bf16[4,128]{1,0}, bf16[32,128]{1,0}) custom-call(%begun), custom_call_target="AsyncCollectiveStart"
}

%finish (q: bf16[4,128]) -> bf16[32,128] {
  %q = bf16[4,128]{1,0} parameter(0)
  ROOT %ended = bf16[32,128]{1,0} all-gather(%q), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%body.2 (s: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %s = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %g = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %scattered = bf16[16,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %slice = bf16[4,128]{1,0} slice(%scattered), slice={[0:4], [0:128]}
  %begin = (bf16[4,128]{1,0}, bf16[32,128]{1,0}) fusion(%slice), kind=kCustom, calls=%start
  %end = bf16[32,128]{1,0} fusion(%slice), kind=kCustom, calls=%finish
  %moved = (bf16[4,128]{1,0}, bf16[4,128]{1,0}, u32[], u32[]) collective-permute-start(%slice), channel_id=5, source_target_pairs={{0,4},{4,0}}
  %arrived = bf16[4,128]{1,0} collective-permute-done(%moved)
  %split = ((bf16[64,128]{1,0}, f32[8]{0}), (bf16[32,128]{1,0}, f32[4]{0})) reduce-scatter-start(%g, %v), channel_id=6, replica_groups=[4,2]<=[8], to_apply=%add
  %parts = (bf16[32,128]{1,0}, f32[4]{0}) reduce-scatter-done(%split)
  ROOT %t = (s32[], bf16[64,128]{1,0}) tuple(%j, %g)
}

%more.2 (s.2: (s32[], bf16[64,128])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, bf16[64,128]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%s.2), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%at, %three), direction=LT
}

ENTRY %main (a: (s32[], f32[8,16]), b: (s32[], bf16[64,128])) -> (s32[], f32[8,16]) {
  %a = (s32[], f32[8,16]{1,0}) parameter(0)
  %b = (s32[], bf16[64,128]{1,0}) parameter(1)
  %second = (s32[], bf16[64,128]{1,0}) while(%b), condition=%more.2, body=%body.2
  ROOT %first = (s32[], f32[8,16]{1,0}) while(%a), condition=%more.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def found_in(costs):
    return {(c.kind, c.devices): (c.times, c.sent, c.on_host) for c in costs.collectives}


def test_collectives_count_with_the_trips_of_their_loops():
    costs = hlo.costs(PROGRAM, 8, devices_per_host=4)
    half, whole = 2 * 64 * 128 // 2, 2 * 64 * 128  # bytes of bf16 arrays
    assert found_in(costs) == {
        # What a device sends in a ring: three quarters of 32 x 16 floats, five times.
        ("all-gather", 4): (5, 5 * 3 / 4 * 4 * 32 * 16, 4),
        # Devices 0 and 4: of two hosts. Twice half of 8 x 32 floats.
        ("all-reduce", 2): (5, 5 * 2 / 2 * 4 * 8 * 32, 1),
        ("reduce-scatter", 4): (3, 3 * 3 / 4 * whole, 4),
        # Of GPUs, two arrays at once: half of each.
        ("reduce-scatter", 2): (3, 3 * (whole / 2 + 4 * 4), 2),
        # Counted where it begins and not again where it ends.
        ("all-gather", 8): (3, 3 * 7 / 8 * half, 4),
        ("collective-permute", 2): (3, 3 * 2 * 4 * 128, 1),
    }
    assert costs.unknown_loops == 0
    assert costs.flops == 5 * 2 * 8 * 32 * 16


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    costs = hlo.costs(text, 8)
    assert costs.unknown_loops == 1 and costs.flops == 2 * 8 * 32 * 16
    assert not any(c.between_hosts for c in costs.collectives)


def unrolled(step):
    """A loop to 8 whose body adds ``step`` to its count, in the open or in a fusion."""
    return f"""HloModule unrolled

%sum.of (p: s32[], q: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %s = s32[] add(%p, %q)
}}

%body (state: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {{
  %state = (f32[8,8]{{1,0}}, s32[]) parameter(0)
  %x = f32[8,8]{{1,0}} get-tuple-element(%state), index=0
  %i = s32[] get-tuple-element(%state), index=1
  %by = s32[] constant({step.split()[-1]})
  %y = f32[8,8]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  %next = s32[] {"fusion(%i, %by), kind=kLoop, calls=%sum.of" if "fused" in step else "add(%i, %by)"}
  ROOT %t = (f32[8,8]{{1,0}}, s32[]) tuple(%y, %next)
}}

%more (state.1: (f32[8,8], s32[])) -> pred[] {{
  %state.1 = (f32[8,8]{{1,0}}, s32[]) parameter(0)
  %at = s32[] get-tuple-element(%state.1), index=1
  %end = s32[] constant(8)
  ROOT %lt = pred[] compare(%at, %end), direction=LT
}}

ENTRY %main (a: (f32[8,8], s32[])) -> (f32[8,8], s32[]) {{
  %a = (f32[8,8]{{1,0}}, s32[]) parameter(0)
  ROOT %loop = (f32[8,8]{{1,0}}, s32[]) while(%a), condition=%more, body=%body
}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("step", "trips"), [("1", 8), ("2", 4), ("3", 3), ("fused 2", 4), ("fused 1", 8)]
)
def test_a_loop_that_counts_in_steps_runs_less_often(step, trips):
    costs = hlo.costs(unrolled(step), 1)
    assert costs.flops == trips * 2 * 8**3 and costs.unknown_loops == 0


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.costs("a text", 8)


@pytest.mark.parametrize(
    ("said", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=1,'b'=4] {'b':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=1,'b'=4] {'b':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_are_read_however_they_are_said(said, groups):
    assert hlo_groups._groups(f"channel_id=1, {said}, dimensions={{0}}", 4).tolist() == groups


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="cannot be read"):
        hlo_groups.groups_of("replica_groups=something_new", 4, 0)


def test_products_written_as_convolutions_count_no_padding():
    """Batched products as TPUs write them: out[b] = left[b] @ right[b], batches as a window."""
    array = hlo.Array("f32", (4, 2, 256, 128))
    said = "window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=01bf_01oi->01bf"
    operands = [(4, 2, 256, 64), (4, 2, 128, 64)]
    count = hlo_products.flops("convolution", [array], operands, said)
    assert count == 4 * 2 * 2 * 256 * 64 * 128
    plain = hlo.Array("f32", (5, 7))
    assert hlo_products.flops("convolution", [plain], [(5, 3), (3, 7)], "dim_labels=bf_io->bf") == (
        2 * 5 * 3 * 7
    )


def test_ragged_products_of_tpus_count_each_row_once():
    matmul = [(1,), (9,), (40, 16), (8, 16, 24)]
    outer = [(9,), (16, 40), (40, 24)]
    kernel = 'custom_call_target="tpu_custom_call"'
    for out, operands in (((40, 24), matmul), ((8, 16, 24), outer)):
        array = hlo.Array("f32", out)
        count = hlo_products.flops("custom-call", [array], operands, kernel, ragged_share=0.25)
        assert count == 2 * 40 * 16 * 24 / 4


def test_a_compiled_loop_is_counted_as_it_runs():
    """XLA's own program: a scan of products; each trip reads one of the stacked matrices."""
    n, d = 16, 64

    def scanned(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    x, stack = jnp.ones((16, d)), jnp.ones((n, d, d))
    compiled = jax.jit(scanned).lower(x, stack).compile()
    costs = hlo.costs(compiled.as_text(), 1)
    assert costs.flops == n * 2 * 16 * d * d
    least = 4 * (n * d * d + 2 * n * 16 * d)
    # Not the whole stack in every trip, as a count of operands would have it.
    assert least <= costs.bytes <= 4 * least < 4 * n * math.prod(stack.shape)
    assert costs.collectives == () and costs.unknown_loops == 0


def test_bytes_of_dtypes():
    sizes = {"f32": 4, "bf16": 2, "pred": 1, "s32": 4, "f8e4m3fn": 1, "s4": 0.5, "u8": 1}
    for dtype, size in sizes.items():
        assert hlo.Array(dtype, (10,)).bytes == 10 * size
    assert np.isclose(hlo.Array("f64", ()).bytes, 8)

"""Sketches: their bytes, how near they come, what they depend on."""

from __future__ import annotations

import math
import struct

import page_oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_attention.pages import PAGE, empty_sketch, sketch_bytes, write_sketch
from lite_attention.pages.layout import bits_of, decode

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


every_format = pytest.mark.parametrize("bits", [12, 8])


def sketches_of(k, backend=None, bits=12):
    sketch = empty_sketch(k, bits).fill_(0xAB)
    write_sketch(k, sketch, torch.arange(k.shape[0], dtype=torch.int32), backend=backend)
    return sketch


@pytest.mark.parametrize(
    ("head_dim", "size", "small"),
    [
        (1, 48, 32),
        (3, 48, 32),
        (16, 48, 32),
        (33, 96, 64),
        (40, 96, 64),
        (64, 112, 80),
        (80, 144, 96),
        (96, 160, 112),
        (128, 208, 144),
        (256, 400, 272),
    ],
)
def test_bytes_of_a_sketch(head_dim, size, small):
    assert sketch_bytes(head_dim) == sketch_bytes(head_dim, 12) == size and sketch_bytes(head_dim, 8) == small
    assert empty_sketch(torch.empty(7, PAGE, 3, head_dim)).shape == (7, 3, size)
    assert empty_sketch(torch.empty(7, PAGE, 3, head_dim), 8).shape == (7, 3, small)


def test_the_size_tells_the_format():
    for head_dim in range(1, 257):
        sizes = [sketch_bytes(head_dim, bits) for bits in (12, 8)]
        assert [bits_of(head_dim, size) for size in sizes] == [12, 8]
        assert all(size % 16 == 0 for size in sizes)
        assert bits_of(head_dim, sizes[0] + 16) is None


@pytest.mark.parametrize("bits", [4, 16, True, None])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits: got {bits}; needs 12, .* or 8, 4 of each"):
        empty_sketch(torch.empty(7, PAGE, 3, 64), bits)


def nearest_to_farthest(k):
    """Of a page's keys, float64 (16, head_dim), those that float32 could take for the farthest from their mean."""
    distances = (k - k.mean(0)).square().sum(1)
    return (distances >= distances.max() * (1 - 1e-4)).nonzero().flatten().tolist()


def is_of(found, k, apart, levels, rounding):
    """Whether these moments, from the bytes, are of the keys with that one apart, as near as codes can tell."""
    mean, difference, deviation = (torch.tensor(x, dtype=torch.float64) for x in found)
    others = torch.cat([k[:apart], k[apart + 1 :]])
    exact = others.mean(0)
    half_a_step = (exact.max() - exact.min()) / levels / 2
    is_mean = (mean - exact).abs().max() <= half_a_step + rounding + 1e-3 * half_a_step
    to_farthest = k[apart] - mean  # as it is decoded: what the codes of the mean miss, the difference has
    largest = to_farthest.abs().max()
    is_difference = (difference - to_farthest).abs().max() <= largest / 14 * (1 + 1e-3) + rounding
    is_largest = (difference.abs().max() - largest).abs() <= rounding
    is_deviation = (deviation - (others - exact).square().mean().sqrt()).abs() <= rounding
    return bool(is_mean and mean.min() >= exact.min() - rounding and is_difference and is_largest and is_deviation)


@given(
    st.sampled_from(DTYPES),
    st.sampled_from((1, 2, 3, 16, 33, 64)),
    st.sampled_from((1e-3, 1.0, 30.0)),
    st.booleans(),
    st.sampled_from((12, 8)),
    st.integers(0, 2**31),
)
def test_a_sketch_is_within_half_a_step_of_the_moments(dtype, head_dim, size, outlier, bits, seed):
    make = torch.Generator().manual_seed(seed)
    k = torch.randn(3, PAGE, 2, head_dim, generator=make) * size + torch.randn(head_dim, generator=make) * size
    if outlier:  # as some models have
        k[..., head_dim // 2] += 10 * size
    k = k.to(dtype)
    for backend in ("cpu", "reference"):
        sketch = sketches_of(k, backend, bits)
        for page in range(3):
            for head in range(2):
                found, keys = page_oracle.moments(sketch[page, head].tolist(), head_dim), k[page, :, head].double()
                levels, rounding = 255 if bits == 12 else 15, 1e-6 * (keys.abs().max() + size)
                assert any(is_of(found, keys, apart, levels, rounding) for apart in nearest_to_farthest(keys))


@given(st.sampled_from((1, 2, 3, 16, 33, 64)), st.sampled_from((12, 8)), st.integers(0, 2**31))
def test_decoding_reads_the_bytes_as_the_oracle_does(head_dim, bits, seed):
    make = torch.Generator().manual_seed(seed)
    sketch = sketches_of(torch.randn(4, PAGE, 2, head_dim, generator=make), bits=bits)
    moments = decode(sketch, head_dim)
    for page in range(4):
        for head in range(2):
            expected = page_oracle.moments(sketch[page, head].tolist(), head_dim)
            for got, one in zip(moments, expected, strict=True):
                assert torch.allclose(got[page, head].double(), torch.tensor(one, dtype=torch.float64), atol=1e-6)


def test_the_bytes_are_these():
    """Of one page by both formats. Its deviation is 1: squares of 2 (100 + 16 + 4), over 15 keys and 16 channels."""
    steps = torch.tensor([0, 15, *range(1, 15)])
    apart = torch.tensor([7, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 0])
    k = (17.0 * steps - 100).repeat(PAGE, 1)
    for channel, more in ((1, 10.0), (6, 4.0), (15, 2.0)):
        k[0, channel] += more
        k[9, channel] -= more
    k[5] += 2.0 * apart
    k = k[None, :, None]
    means = bytes.fromhex("00ff 1122 3344 5566 7788 99aa bbcc ddee")
    # Codes of the differences, channel by channel: f1234567 89abcde8.
    differences = bytes.fromhex("2f64 3175 a8ec b98d")
    expected = struct.pack("<4f", -100, 1, 2, 1) + means + differences + bytes(8)
    assert bytes(sketches_of(k).flatten().tolist()) == expected
    both = bytes.fromhex("f01f 2132 4354 6576 8798 a9ba cbdc ed8e")
    assert bytes(sketches_of(k, bits=8).flatten().tolist()) == struct.pack("<4f", -100, 17, 2, 1) + both


@pytest.mark.parametrize("head_dim", [1, 3, 7, 9, 16, 33, 40])
def test_bytes_and_halves_that_fill_up_a_section_are_0(head_dim):
    k = torch.randn(5, PAGE, 2, head_dim)
    after = 16 + -(-head_dim // 16) * 16
    sketch, eight = sketches_of(k), sketches_of(k, bits=8)
    assert not sketch[..., 16 + head_dim : after].any() and not eight[..., 16 + head_dim :].any()
    halves = torch.stack([sketch[..., after:] & 15, sketch[..., after:] >> 4], -1)
    for byte, is_high in map(page_oracle.place, range(head_dim)):
        assert (halves[..., byte, int(is_high)] >= 1).all()
        halves[..., byte, int(is_high)] = 0
    assert not halves.any()


@every_format
def test_of_keys_as_far_the_first_is_apart(bits):
    """In each page two keys lie as far from the mean, on its two sides; one page for each two places."""
    pairs = [(i, j) for i in range(PAGE) for j in range(i)]
    k = torch.zeros(2 * len(pairs), PAGE, 1, 3)
    for page, (i, j) in enumerate(pairs):
        k[2 * page : 2 * page + 2, [i, j], 0, 1] = torch.tensor([[-8.0, 8.0], [8.0, -8.0]])
    for backend in ("cpu", "reference"):
        mean, difference, _ = decode(sketches_of(k, backend, bits), 3)
        apart = (mean + difference)[:, 0, 1].unflatten(0, (-1, 2))
        assert torch.allclose(apart, torch.tensor([8.0, -8.0]))


@every_format
def test_channels_that_are_alike_are_exact(bits):
    k = torch.full((1, PAGE, 1, 64), 0.3)
    mean, difference, deviation = decode(sketches_of(k, bits=bits), 64)
    assert torch.allclose(mean, torch.tensor(0.3), rtol=1e-6)
    assert (difference.abs() < 1e-6).all() and (deviation < 1e-6).all()


@every_format
def test_keys_that_are_alike_have_a_code_that_says_no_difference(bits):
    """A page of 16 times the same key: the steps of what does not vary are 0, and so is what codes say."""
    k = torch.tensor([0.0, 255.0, 34.0]).repeat(1, PAGE, 1, 1)
    sketch = sketches_of(k, bits=bits).flatten()
    expected = {12: "00ff22" + 26 * "0" + "88000800" + 24 * "0", 8: "808f82" + 26 * "0"}[bits]
    assert bytes(sketch.tolist()) == struct.pack("<4f", 0, 1 if bits == 12 else 17, 0, 0) + bytes.fromhex(expected)


@every_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e19])
def test_a_page_without_moments_says_so_in_defined_bytes(value, bits):
    k = torch.randn(2, PAGE, 2, 64)
    before = sketches_of(k, bits=bits)
    k[1, 3, 0, 5] = value
    after = sketches_of(k, bits=bits)
    assert page_oracle.moments(after[1, 0].tolist(), 64) is None
    assert not after[1, 0, 16:].any()
    assert all(math.isnan(x) for x in struct.unpack("<4f", bytes(after[1, 0, :16].tolist())))
    after[1, 0] = before[1, 0]
    assert torch.equal(before, after)


@every_format
def test_a_page_has_no_moments_where_only_the_sum_of_squares_is_too_large(bits):
    """Each key's is 1e38; the deviation is of 15."""
    k = torch.zeros(1, PAGE, 1, 64)
    k[0, ::2, 0, 5], k[0, 1::2, 0, 5] = 1e19, -1e19
    for backend in ("cpu", "reference"):
        assert page_oracle.moments(sketches_of(k, backend, bits)[0, 0].tolist(), 64) is None


@every_format
def test_a_page_has_moments_as_long_as_squares_can_be_summed(bits):
    k = torch.randn(1, PAGE, 1, 64)
    k[0, 3, 0, 5] = 1e18
    mean, difference, deviation = page_oracle.moments(sketches_of(k, bits=bits)[0, 0].tolist(), 64)
    assert mean[5] + difference[5] == pytest.approx(1e18) and max(map(abs, mean)) < 5 and 0.8 < deviation < 1.2


@every_format
def test_only_the_given_pages_are_read_and_written(bits):
    k = torch.full((6, PAGE, 2, 16), math.nan)
    k[[1, 4]] = torch.randn(2, PAGE, 2, 16)
    sketch = empty_sketch(k, bits).fill_(0xAB)
    write_sketch(k, sketch, ints(4, -1, 1, 4, -(2**31)))
    assert torch.equal(sketch[[1, 4]], sketches_of(k[[1, 4]], bits=bits))
    assert (sketch[[0, 2, 3, 5]] == 0xAB).all()
    write_sketch(k, sketch, ints(-1, -1))
    write_sketch(k, sketch, ints())


def test_a_sketch_depends_on_the_page_alone():
    k = torch.randn(1500, PAGE, 2, 32).bfloat16()  # more pages than go at once
    sketch = sketches_of(k)
    order = torch.randperm(1500)
    assert torch.equal(sketches_of(k[order]), sketch[order])
    assert torch.equal(sketches_of(k[7:8]), sketch[7:8])
    assert torch.equal(sketches_of(k[:, :, 1:]), sketch[:, 1:])


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, bits):
    """vLLM's cache holds K and V of a page side by side, and a page of sketches may have a gap after it."""
    both = torch.randn(9, 2, PAGE, 3, 32).to(dtype)
    size = sketch_bytes(32, bits)
    room = torch.full((9, 3 * size + 16), 0xCD, dtype=torch.uint8)
    sketch = room[:, 16:].unflatten(1, (3, size))
    write_sketch(both[:, 0], sketch, torch.arange(9, dtype=torch.int32))
    assert torch.equal(sketch, sketches_of(both[:, 0].clone(), bits=bits))
    assert (room[:, :16] == 0xCD).all()

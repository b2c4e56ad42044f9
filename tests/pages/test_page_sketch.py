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
    mean, deviation = k.double().mean(1), k.double().var(1, correction=0).sqrt()
    for backend in ("cpu", "reference"):
        sketch = sketches_of(k, backend, bits)
        for page in range(3):
            for head in range(2):
                found = page_oracle.moments(sketch[page, head].tolist(), head_dim)
                moments, of_codes = (mean[page, head], deviation[page, head]), (255 if bits == 12 else 15, 15)
                for got, exact, levels in zip(found, moments, of_codes, strict=True):
                    bound = (exact.max() - exact.min()) / levels / 2
                    rounding = 1e-6 * (exact.abs().max() + size) + 1e-3 * bound
                    assert (torch.tensor(got, dtype=torch.float64) - exact).abs().max() <= bound + rounding
                    assert min(got) >= exact.min() - rounding


@given(st.sampled_from((1, 2, 3, 16, 33, 64)), st.sampled_from((12, 8)), st.integers(0, 2**31))
def test_decoding_reads_the_bytes_as_the_oracle_does(head_dim, bits, seed):
    make = torch.Generator().manual_seed(seed)
    sketch = sketches_of(torch.randn(4, PAGE, 2, head_dim, generator=make), bits=bits)
    mean, deviation = decode(sketch, head_dim)
    for page in range(4):
        for head in range(2):
            expected = page_oracle.moments(sketch[page, head].tolist(), head_dim)
            for got, one in zip((mean, deviation), expected, strict=True):
                assert torch.allclose(got[page, head].double(), torch.tensor(one, dtype=torch.float64), atol=1e-6)


def test_the_bytes_are_these():
    k = torch.zeros(1, PAGE, 1, 3)
    k[0, :, 0, 0] = 255.0  # a mean of 255, of no deviation
    k[0, ::2, 0, 1], k[0, 1::2, 0, 1] = 15.0, -15.0  # of 0, and 15
    k[0, ::2, 0, 2], k[0, 1::2, 0, 2] = 103.0, 97.0  # of 100, and 3
    expected = struct.pack("<4f", 0, 1, 0, 1) + bytes([255, 0, 100]) + bytes(13) + bytes([0xF0, 0x03]) + bytes(14)
    assert bytes(sketches_of(k).flatten().tolist()) == expected
    k[0, :, 0, 0] = 150.0
    expected = struct.pack("<4f", 0, 10, 0, 1) + bytes([0x0F, 0xF0, 0x3A]) + bytes(13)
    assert bytes(sketches_of(k, bits=8).flatten().tolist()) == expected


@every_format
def test_channels_that_are_alike_are_exact(bits):
    k = torch.full((1, PAGE, 1, 64), 0.3)
    mean, deviation = decode(sketches_of(k, bits=bits), 64)
    assert torch.allclose(mean, torch.tensor(0.3), rtol=1e-6) and (deviation.abs() < 1e-6).all()


@every_format
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
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

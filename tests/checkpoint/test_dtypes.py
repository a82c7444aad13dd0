"""Dtypes by name: sizes, values and memory are those of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.checkpoint import MemoryTensor
from regraft.checkpoint.dtypes import (
    DTYPES,
    array_dtype,
    as_array,
    as_doubles,
    as_tensor,
    dtype_name,
    from_torch_name,
    is_float,
    is_storable,
    item_size,
    largest_value,
    main_dtype,
    torch_name,
)
from regraft.checkpoint.tensor import StoredTensor, nbytes, read_array, stored_dtype


@pytest.mark.parametrize("name", DTYPES)
def test_a_name_tells_what_torch_tells(name: str) -> None:
    dtype = DTYPES[name]
    assert (dtype_name(dtype), from_torch_name(torch_name(name))) == (name, name)
    assert f"torch.{torch_name(name)}" == str(dtype)
    assert item_size(name) == array_dtype(name).itemsize == dtype.itemsize
    assert is_float(name) == dtype.is_floating_point
    if is_float(name):
        assert largest_value(name) == torch.finfo(dtype).max


@pytest.mark.parametrize("name", DTYPES)
def test_arrays_and_tensors_share_memory(name: str) -> None:
    raw = np.frombuffer(np.random.default_rng(0).bytes(24 * 8), np.uint8).copy()
    if name == "BOOL":
        raw &= 1
    values = raw[: 24 * item_size(name)].view(array_dtype(name))
    tensor = as_tensor(values, name)
    assert tensor.dtype == DTYPES[name]
    again = as_array(tensor)
    assert again.dtype == array_dtype(name)
    assert np.shares_memory(values, again)
    if is_float(name):
        assert np.array_equal(as_doubles(values, name), tensor.double().numpy(), equal_nan=True)


def test_dtypes_that_safetensors_lacks_are_refused() -> None:
    assert not is_storable(torch.complex128)
    assert is_storable(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.complex128 is a dtype that safetensors cannot hold"):
        dtype_name(torch.complex128)
    with pytest.raises(KeyError):
        DTYPES["F4"]
    assert "F4" not in DTYPES


def test_the_main_dtype_is_that_of_most_weights() -> None:
    assert main_dtype([("I64", 10**6), ("F32", 10), ("BF16", 8), ("BF16", 7)]) == "BF16"
    assert main_dtype([("I64", 10)]) == "F32"


def test_tensors_in_memory_are_read_alike_as_arrays() -> None:
    values = torch.arange(12.0).to(torch.bfloat16).view(3, 4)
    held = MemoryTensor("t", values)
    kept = StoredTensor("t", (3, 4), "BF16", as_array(values))
    for source in (held, kept):
        assert (stored_dtype(source), source.dtype, nbytes(source)) == ("BF16", torch.bfloat16, 24)
        assert torch.equal(source.read(5, 9), values.view(-1)[5:9])
        assert np.array_equal(read_array(source, 5, 9), as_array(values).reshape(-1)[5:9])
        assert np.array_equal(read_array(source), as_array(values).reshape(-1))
        assert len(read_array(source, 10, 99)) == 2

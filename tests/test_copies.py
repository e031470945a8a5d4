"""Copies among samples: which count, of any dtype and layout."""

from __future__ import annotations

import pytest
import torch

from tacext.copies import different_inputs, different_rows


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_of_equal_samples_count(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randint(0, 200, (150, 3, 4, 5), generator=generator).to(dtype)
    order = torch.randint(0, 150, (400,), generator=generator)
    first = [i for i, k in enumerate(order.tolist()) if k not in order[:i].tolist()]
    inputs = distinct[order]
    assert different_inputs(inputs).tolist() == first
    strided = inputs.contiguous(memory_format=torch.channels_last)
    assert different_inputs(strided).tolist() == first
    assert different_inputs(inputs[..., 2]).tolist() == first
    if dtype != torch.bfloat16:
        assert different_rows(inputs.flatten(1)).tolist() == first
    numbers = torch.arange(7).to(dtype)
    assert different_inputs(numbers[[0, 1, 0, 6, 1]]).tolist() == [0, 1, 3]
    assert different_inputs(inputs[:0]).tolist() == []

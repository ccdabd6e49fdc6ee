"""Choosing a backend, and life without Triton."""

import subprocess
import sys

import pytest
import torch

from p2pz.kernels import dispatch
from p2pz.kernels.dispatch import choose_triton, split_width

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, p2pz.kernels as kernels
q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 3, 2, 8)
kernels.attention_with_maps(q, k, k)
kernels.guided_attention(q, k, k, q, k)
kernels.group_norm(torch.randn(1, 4, 3, 3), 2, torch.ones(4), torch.zeros(4), 1e-5)
kernels.regularise_noise(torch.randn(1, 1, 8, 8), torch.ones(1, 1, 1, 1, 1, dtype=torch.int64))
try:
    kernels.attention(q, k, k, backend="triton")
except ValueError as error:
    print(error)
"""


def test_everything_works_without_triton():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == 'backend="triton": Triton is not installed'


def test_choice(device):
    x = torch.ones(1, device=device)
    assert choose_triton("triton", None, x)
    assert choose_triton("auto", None, x) == x.is_cuda
    assert not choose_triton("torch", "whatever", x)
    assert not choose_triton("auto", "too large", x)
    assert not choose_triton("auto", None, x.double())
    with pytest.raises(ValueError, match='backend="triton": too large'):
        choose_triton("triton", "too large", x)
    with pytest.raises(ValueError, match="backend must be"):
        choose_triton("cuda", None, x)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="the tensors are on cpu: CUDA tensors are needed"):
        choose_triton("triton", None, torch.ones(1))


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("width", range(1, 257))
def test_parts_of_a_head(width, element_size):
    """Two powers of two that cover it, none narrower than 128 bytes, never more than one power of two would take."""
    parts = split_width(width, element_size)
    least = 128 // element_size
    assert width <= sum(parts) <= max(least, 1 << (width - 1).bit_length())
    assert all(part & (part - 1) == 0 and part >= least for part in parts if part) and parts[0] > parts[1]

"""Shared by the tests: a seed for every test, the error measure, and pairs of our UNet and diffusers' one."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: kernels run in its interpreter, on the CPU

from diffusers import UNet2DConditionModel

from p2pz import unet

torch.backends.cudnn.allow_tf32 = False  # two ways to compute the same in float32 would differ by TF32's rounding

BENCH = Path(__file__).resolve().parent.parent / "bench"
SD_LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
UNETS = {
    "sd1": SD_LEVELS
    | {"block_out_channels": (32, 64, 96, 128), "norm_num_groups": 16, "attention_head_dim": 8}
    | {"cross_attention_dim": 40, "sample_size": 16},
    "sd2": SD_LEVELS
    | {"block_out_channels": (32, 64, 128, 96), "norm_num_groups": 16, "attention_head_dim": [2, 4, 8, 6]}
    | {"cross_attention_dim": 40, "sample_size": 16, "use_linear_projection": True},
    "mini": {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": (64, 128, 160),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 128,
        "sample_size": 32,
    },
}


@pytest.fixture(scope="module")
def load_script():
    """`load_script(name)`: a script of bench/ as a module, under a name that is no package's."""
    with pytest.MonkeyPatch.context() as patch:

        def load(name: str) -> types.ModuleType:
            spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device():
    """Where kernels are tested: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_memory():
    """Fresh memory is filled with NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def assert_close():
    """`assert_close(actual, expected, tolerance)`: same shape, and an error of at most `tolerance` in relative norm."""

    def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> float:
        assert actual.shape == expected.shape
        error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
        assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"
        return error

    return check


@pytest.fixture(scope="session")
def randomise():
    """`randomise(module)`: make norms, biases and attention maps of a fresh module matter, in place."""

    def perturb(module: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
                elif name.endswith("to_q.weight"):
                    parameter *= 4.0  # maps far from uniform
        return module.eval().requires_grad_(False)

    return perturb


@pytest.fixture(scope="session")
def unet_pair(randomise):
    """`unet_pair(name)`: our UNet and diffusers' one with the same random weights; names are the keys of `UNETS`."""
    pairs = {}

    def build(name: str) -> tuple[unet.UNet, UNet2DConditionModel]:
        if name not in pairs:
            theirs = randomise(UNet2DConditionModel(**UNETS[name]))
            ours = unet.UNet(unet.UNetConfig.from_json(theirs.config)).eval().requires_grad_(False)
            ours.load_state_dict(theirs.state_dict(), strict=True)
            pairs[name] = ours, theirs
        return pairs[name]

    return build

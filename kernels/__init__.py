"""Tensor primitives of p2pz, each in readable PyTorch and as a Triton kernel. Knows nothing of diffusion models.

Functions that have a kernel take `backend`: `"auto"` runs it on CUDA tensors that it supports, PyTorch on others and
where that was measured to be faster; `"torch"` and `"triton"` insist. `kl_loss`, `kl_gradient`,
`attention_probabilities` and `attend_with_probabilities` are PyTorch alone.
"""

from p2pz.kernels.convolution import conv3x3
from p2pz.kernels.cross_attention import attend_with_probabilities, attention_probabilities, attention_with_maps
from p2pz.kernels.dispatch import compile_ahead
from p2pz.kernels.gating import geglu, geglu_linear
from p2pz.kernels.map_editing import edited_attention
from p2pz.kernels.map_guidance import guided_attention
from p2pz.kernels.norms import group_norm, layer_norm
from p2pz.kernels.regulariser import (
    autocorrelation_gradient,
    autocorrelation_loss,
    kl_gradient,
    kl_loss,
    regularise_noise,
)
from p2pz.kernels.residual import add_product, add_residual
from p2pz.kernels.self_attention import attention, split_projection
from p2pz.kernels.upsampling import merge_taps, upsampled_conv3x3

__all__ = [
    "add_product",
    "add_residual",
    "attend_with_probabilities",
    "attention",
    "attention_probabilities",
    "attention_with_maps",
    "autocorrelation_gradient",
    "autocorrelation_loss",
    "compile_ahead",
    "conv3x3",
    "edited_attention",
    "geglu",
    "geglu_linear",
    "group_norm",
    "guided_attention",
    "kl_gradient",
    "kl_loss",
    "layer_norm",
    "merge_taps",
    "regularise_noise",
    "split_projection",
    "upsampled_conv3x3",
]

"""Tensor primitives of p2pz: attention and the noise regulariser. Knows nothing of diffusion models."""

from p2pz.kernels.attention import attention, attention_probabilities
from p2pz.kernels.regulariser import autocorrelation_loss, kl_loss, regularise_noise

__all__ = ["attention", "attention_probabilities", "autocorrelation_loss", "kl_loss", "regularise_noise"]

"""Flax models that return `(logits, features)` and are fast inside compiled loops."""

from jaxadv.models.convolution import conv_general_dilated
from jaxadv.models.unet import UNet, asma_unet

__all__ = ["UNet", "asma_unet", "conv_general_dilated"]

"""Flax models that return `(logits, features)` and are fast inside compiled loops."""

from jaxadv.models.attn_vgg import AttnVGG
from jaxadv.models.convnet import ConvNet
from jaxadv.models.convolution import conv_general_dilated
from jaxadv.models.densenet import DenseNet, densenet121, densenet169
from jaxadv.models.efficientnet import EfficientNetLite0
from jaxadv.models.generator import Generator
from jaxadv.models.inception import InceptionV3
from jaxadv.models.inception_resnet import InceptionResNetV2
from jaxadv.models.resnet import ResNet, resnet18, resnet50
from jaxadv.models.unet import UNet, asma_unet
from jaxadv.models.vgg import VGG, vgg16, vgg19

__all__ = [
  "VGG",
  "AttnVGG",
  "ConvNet",
  "DenseNet",
  "EfficientNetLite0",
  "Generator",
  "InceptionResNetV2",
  "InceptionV3",
  "ResNet",
  "UNet",
  "asma_unet",
  "conv_general_dilated",
  "densenet121",
  "densenet169",
  "resnet18",
  "resnet50",
  "vgg16",
  "vgg19",
]

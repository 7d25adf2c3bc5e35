"""Builders of TFDS data sets from what their users download.

Importing this registers them, so that `tfds.builder("isic2017_segmentation")` finds
them; `jaxadv.data.load("tfds:isic2017_segmentation")` imports it on its own. Each
builder says in its docstring which files it reads; docs/data.md has them all.
"""

from jaxadv.builders import chest, covid, glaucoma, isic, kermany, retinopathy
from jaxadv.builders.base import ManualBuilder, SideConfig

__all__ = ["BUILDERS", "SideConfig"]

BUILDERS: dict[str, type[ManualBuilder]] = {
  builder.name: builder
  for module in (chest, covid, glaucoma, isic, kermany, retinopathy)
  for builder in (getattr(module, name) for name in module.__all__)
}

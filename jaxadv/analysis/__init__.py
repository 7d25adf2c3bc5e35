"""What an attack changes inside a model and among its estimates.

Functions of `predict` and of images, clean and attacked; pictures of what they return
are in `jaxadv.analysis_plots`.
"""

from jaxadv.analysis.correlations import (
  LabelCorrelation,
  label_correlation,
  off_diagonal,
  pearson,
)
from jaxadv.analysis.distances import cosine_distance, layer_distances
from jaxadv.analysis.errors import UndefinedError
from jaxadv.analysis.heatmaps import (
  feature_map,
  grad_cam,
  top_share,
  top_share_iou,
)
from jaxadv.analysis.landscapes import Landscape, landscape, orthogonal
from jaxadv.analysis.separability import embedding, linear_probe, silhouette
from jaxadv.analysis.splitting import after_feature, feature_names

__all__ = [
  "LabelCorrelation",
  "Landscape",
  "UndefinedError",
  "after_feature",
  "cosine_distance",
  "embedding",
  "feature_map",
  "feature_names",
  "grad_cam",
  "label_correlation",
  "landscape",
  "layer_distances",
  "linear_probe",
  "off_diagonal",
  "orthogonal",
  "pearson",
  "silhouette",
  "top_share",
  "top_share_iou",
]

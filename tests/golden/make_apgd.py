"""Makes apgd.npz: trajectories of Auto-PGD by an implementation that is not ours.

Needs torch and torchattacks, whose APGD follows fra31/auto-attack (arXiv 2003.01690);
neither is needed to run the tests:

    python -m venv scratch && scratch/bin/pip install torch tqdm scipy requests
    scratch/bin/pip install --no-deps torchattacks
    scratch/bin/python tests/golden/make_apgd.py tests/golden/apgd.npz

Everything is float64. Six images of 2 x 4 x 3 values, three classes, a fixed two-layer
tanh network, cross-entropy; random starts are those of the package, and are stored. For
every norm, radius and number of steps the file holds the point with the highest loss
and that loss. The package divides by norms plus 1e-12, which shortens a radius of
0.03 by 3e-11 of its length; this guard is set to zero here.
"""

import pathlib
import sys
import types

import numpy as np
import torch

STEPS, RADII, NORMS = (10, 20, 50, 100), (0.03, 0.1, 0.3), ("linf", "l2")
SHAPE = (2, 4, 3)  # height, width, channels


def main(path: str) -> None:
  for name in ("torchvision", "torchvision.transforms"):
    sys.modules.setdefault(name, types.ModuleType(name))
  from torchattacks.attacks import apgd

  unguarded = pathlib.Path(apgd.__file__).read_text().replace("1e-12", "0.0")
  exec(compile(unguarded, apgd.__file__, "exec"), vars(apgd))
  torch.set_default_dtype(torch.float64)
  rng = np.random.default_rng(5)
  size = int(np.prod(SHAPE))
  first, second = rng.normal(size=(size, 8)), rng.normal(size=(8, 3))
  x = rng.uniform(0.05, 0.95, (6, *SHAPE))

  class Network(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.first = torch.nn.Parameter(torch.tensor(first))
      self.second = torch.nn.Parameter(torch.tensor(second))

    def forward(self, image):
      flat = image.permute(0, 2, 3, 1).reshape(len(image), -1)  # NCHW to ours
      return torch.tanh((flat - 0.5) @ self.first) @ self.second

  network = Network().eval()
  images = torch.tensor(x).permute(0, 3, 1, 2).contiguous()
  labels = network(images).argmax(1)
  out = {"x": x, "y": labels.numpy(), "first": first, "second": second}
  for norm in NORMS:
    torch.manual_seed(1)
    draw = {"linf": torch.rand, "l2": torch.randn}[norm](images.shape)
    for eps in RADII:
      out[f"{norm}_{eps}_start"] = to_ours(start(images, draw, eps, norm) - images)
      for steps in STEPS:
        attack = apgd.APGD(
          network, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=steps
        )
        torch.rand = torch.randn = lambda *_, draw=draw: draw.clone()
        best, _, loss, _ = attack.attack_single_run(images, labels)
        torch.rand, torch.randn = RAND, RANDN
        out[f"{norm}_{eps}_{steps}_image"] = to_ours(best)
        out[f"{norm}_{eps}_{steps}_loss"] = loss.detach().numpy()
  np.savez_compressed(path, **out)


def start(images, draw, eps, norm):
  """The package's first point for a given draw."""
  if norm == "linf":
    direction = 2 * draw - 1
    size = direction.abs().amax((1, 2, 3), keepdim=True)
  else:
    direction = draw
    size = (direction**2).sum((1, 2, 3), keepdim=True).sqrt()
  return (images + eps * direction / size).clamp(0, 1)


def to_ours(images):
  return images.detach().permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
  RAND, RANDN = torch.rand, torch.randn
  main(*sys.argv[1:])

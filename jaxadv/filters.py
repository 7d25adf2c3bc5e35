"""Linear filters of one image `(..., C)`: Gaussian, Fourier low-pass, Haar low band.

The spatial axes are all but the last. Frequencies are in cycles per pixel, so 0.5 is
Nyquist and a cutoff of 0.25 is the nominal band of a one-level Haar transform.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import inputs

__all__ = ["blur", "gaussian_kernel", "haar_low_pass", "low_pass", "low_pass_mask"]


def gaussian_kernel(sigma: float | jax.Array, size: int) -> jax.Array:
  """Centred Gaussian taps that sum to one.

  Args:
    sigma: standard deviation in pixels, > 0; may be traced.
    size: odd number of taps.

  Returns:
    `(size,)` float.

  Raises:
    ValueError: for an even size, and `sigma` not above 0.

  Example:
    >>> print(gaussian_kernel(1.0, 3).round(4))
    [0.2741     0.45189998 0.2741    ]
  """
  if size % 2 == 0 or size < 1:
    raise ValueError(f"`size` is {size}; a centred kernel has an odd number of taps.")
  inputs.check_positive("sigma", sigma, zero=False)
  taps = jnp.arange(size) - size // 2
  weights = jnp.exp(-0.5 * (taps / sigma) ** 2)
  return weights / weights.sum()


def blur(image: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves every spatial axis with `kernel`, zero outside the image.

  Args:
    image: `(..., C)` float.
    kernel: `(size,)`, odd size, symmetric.

  Returns:
    An array like `image`.

  Example:
    >>> blur(jnp.ones((3, 1)), jnp.array([0.25, 0.5, 0.25]))[:, 0].tolist()
    [0.75, 1.0, 0.75]
  """
  reach = kernel.shape[0] // 2
  for axis in range(image.ndim - 1):
    pads = [(reach, reach) if a == axis else (0, 0) for a in range(image.ndim)]
    padded = jnp.pad(image, pads)
    size = image.shape[axis]
    taps = [
      kernel[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i in range(kernel.shape[0])
    ]
    image = functools.reduce(jnp.add, taps)
  return image


def low_pass_mask(shape: tuple[int, ...], cutoff: float | jax.Array) -> jax.Array:
  """Frequencies inside the disc `sum_k f_k^2 <= cutoff^2`, in `fftn` layout.

  Args:
    shape: spatial shape, static.
    cutoff: radius in cycles per pixel; may be traced.

  Returns:
    Bool array of that shape.

  Example:
    >>> int(low_pass_mask((8, 8), 0.25).sum())
    13
  """
  squares = [np.fft.fftfreq(n) ** 2 for n in shape]
  radius = functools.reduce(np.add.outer, squares)
  # a frequency exactly on the circle belongs to the disc, whatever the rounding
  return jnp.asarray(radius) <= jnp.asarray(cutoff) ** 2 * (1 + 1e-6)


def low_pass(image: jax.Array, cutoff: float | jax.Array) -> jax.Array:
  """Keeps the frequencies inside the disc: `F^-1(M * F image)`, per channel.

  Linear, self-adjoint and idempotent, so the gradient of `||P d||^2 / 2` is `P d`.

  Args:
    image: `(..., C)` float.
    cutoff: radius in cycles per pixel.

  Returns:
    An array like `image`.

  Example:
    >>> wave = jnp.cos(jnp.pi * jnp.arange(8))[:, None]
    >>> bool(jnp.allclose(low_pass(1 + wave, 0.25), 1, atol=1e-6))
    True
  """
  axes = tuple(range(image.ndim - 1))
  mask = low_pass_mask(image.shape[:-1], cutoff)
  half = mask[..., : image.shape[-2] // 2 + 1, None]
  spectrum = jnp.fft.rfftn(image, axes=axes) * half
  return jnp.fft.irfftn(spectrum, s=image.shape[:-1], axes=axes).astype(image.dtype)


def haar_low_pass(image: jax.Array) -> jax.Array:
  """Low band of a one-level Haar transform: every 2 x 2 block becomes its mean.

  Args:
    image: `(..., C)` float; odd sides are padded with their edge.

  Returns:
    An array like `image`.

  Example:
    >>> haar_low_pass(jnp.array([[[1.0], [2.0]], [[3.0], [4.0]]]))[..., 0].tolist()
    [[2.5, 2.5], [2.5, 2.5]]
  """
  shape = image.shape[:-1]
  pads = [(0, n % 2) for n in shape] + [(0, 0)]
  padded = jnp.pad(image, pads, mode="edge")
  blocks = [size for n in padded.shape[:-1] for size in (n // 2, 2)]
  inner = tuple(range(1, 2 * len(shape), 2))
  means = padded.reshape(*blocks, -1).mean(inner)
  for axis in range(len(shape)):
    means = jnp.repeat(means, 2, axis)
  return means[tuple(slice(n) for n in shape)]

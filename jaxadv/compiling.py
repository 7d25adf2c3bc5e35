"""How XLA compiles: flags and memory that measured faster on CPU, programs on disk.

All are options of the process, and off until they are asked for.
"""

import contextlib
import ctypes
import os
import pathlib
import platform
import re
import tempfile
from typing import NamedTuple

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

__all__ = ["CacheError", "CpuFlags", "FlagsError", "configure_cpu", "keep_programs"]

PathLike = str | os.PathLike[str]

_GIB = 2**30
# Convolutions not by YNNPACK.
_NO_YNN_CONV = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
# From a jaxlib on, up to another, without it: what is faster there. A version that is
# in no row has not been measured: an unknown flag would end the process.
_MEASURED: tuple[tuple[tuple[int, int], tuple[int, int], tuple[str, ...]], ...] = (
  ((0, 10), (0, 11), (_NO_YNN_CONV,)),
  ((0, 12), (0, 13), (_NO_YNN_CONV,)),
)
# Options of glibc's malloc. XLA allocates on a thread of its own, hence one arena.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8
_MALLOPT = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))


class CpuFlags(NamedTuple):
  """What `configure_cpu` did.

  Attributes:
    jaxlib: the installed version.
    measured: whether this version was, on some x86-64; if not, there are no flags.
    flags: that were added to `$XLA_FLAGS`.
    keeps_memory: whether glibc's malloc was told to keep what is freed; one that is
      preloaded in its place does not care.
  """

  jaxlib: str
  measured: bool
  flags: tuple[str, ...]
  keeps_memory: bool


class CacheError(OSError):
  """A folder that cannot keep programs; the message says which and why in one line."""


class FlagsError(RuntimeError):
  """Flags that XLA would not read; the message says what to do in one line."""


def configure_cpu() -> CpuFlags:
  """Sets the XLA flags that measured faster on CPU for the installed jaxlib.

  They are added to `$XLA_FLAGS`, which XLA reads once, so call it before the first JAX
  operation. A flag that is already there keeps its value. Numbers change by float32
  rounding only; flags that change more, such as fast math, are not among them. The
  measurements are in docs/performance.md, the script is benchmarks/cpu_flags.py.

  Where the C library is glibc the process also keeps the memory that it frees:
  otherwise every call of a compiled program gets its temporary memory anew, page by
  page, a tenth of the time of a U-Net at batch 8. The price is that resident memory
  does not shrink, and that threads share one heap. Forked processes inherit it.

  Returns:
    What it did; no flags where they bring nothing or the version was not measured.

  Raises:
    FlagsError: once JAX has started, and when `$XLA_FLAGS` is the name of a file.

  Example:
    >>> started = jax.devices()
    >>> configure_cpu()  # too late  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    jaxadv.compiling.FlagsError: JAX has started, ...
  """
  if _has_started():
    raise FlagsError(
      "JAX has started, and XLA reads its flags once; call jaxadv.configure_cpu() "
      "right after the imports, before the first array, key or jax.devices()."
    )
  given = os.environ.get("XLA_FLAGS", "")
  if given.strip() and not given.lstrip().startswith("-"):
    raise FlagsError(
      f"$XLA_FLAGS is the file {given!r}; write your flags themselves into it, or add "
      "those of docs/performance.md to the file."
    )
  found = _flags_of(jaxlib.__version__, platform.machine())
  names = {word.partition("=")[0] for word in given.split()}
  new = tuple(flag for flag in found or () if flag.partition("=")[0] not in names)
  if new:
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *new])
  return CpuFlags(jaxlib.__version__, found is not None, new, _keep_memory())


def keep_programs(directory: PathLike, *, max_bytes: int = 2 * _GIB) -> None:
  """Keeps every compiled program in a folder, for the next process: JAX's cache on.

  A program is found again by its text, the flags, the version of jaxlib and the kind of
  device. Several runs may share a folder, machines with other CPUs should not. A file
  that cannot be read is compiled anew, with a warning; delete it to be rid of that.

  Args:
    directory: made when missing.
    max_bytes: the oldest programs beyond this are deleted now, 0 or more.

  Raises:
    CacheError: when the folder cannot be written.
    ValueError: for a negative `max_bytes`.

  Example:
    >>> keep_programs("/dev/null")
    Traceback (most recent call last):
    jaxadv.compiling.CacheError: cannot keep programs in /dev/null: File exists; \
choose another folder.
  """
  if max_bytes < 0:
    raise ValueError(f"`max_bytes` is {max_bytes}; write 0 or more.")
  folder = pathlib.Path(directory).absolute()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(b"0")
    _prune(folder, max_bytes)
  except OSError as error:
    raise CacheError(
      f"cannot keep programs in {folder}: {error.strerror}; choose another folder."
    ) from error
  compilation_cache.reset_cache()  # forgets a folder that was in use
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_enable_compilation_cache", True)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _keep_memory():
  """Whether glibc took all of it; elsewhere memory is left alone."""
  if platform.libc_ver()[0] != "glibc":
    return False
  set_option = ctypes.CDLL(None).mallopt
  return all(set_option(option, value) for option, value in _MALLOPT)


def _has_started():
  """JAX refuses another number of CPU devices once it has its devices."""
  name = "jax_num_cpu_devices"
  before = getattr(jax.config, name)
  try:
    jax.config.update(name, before + 1)
  except RuntimeError:
    return True
  jax.config.update(name, before)
  return False


def _flags_of(version, machine):
  """Flags for a version of jaxlib; `None` where it was not measured."""
  if machine.lower() not in ("x86_64", "amd64"):
    return None
  number = tuple(map(int, re.findall(r"\d+", version)[:2]))
  for first, last, flags in _MEASURED:
    if first <= number < last:
      return flags
  return None


def _prune(folder, max_bytes):
  """JAX's own bound needs a package that it does not bring."""
  kept = 0
  files = []
  for path in folder.glob("*-cache"):
    with contextlib.suppress(FileNotFoundError):  # another run prunes too
      files.append((path, path.stat()))
  for path, stat in sorted(files, key=lambda each: each[1].st_mtime, reverse=True):
    kept += stat.st_size
    if kept > max_bytes:
      path.unlink(missing_ok=True)

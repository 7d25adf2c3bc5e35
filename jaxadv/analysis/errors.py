"""What sets a score that the images do not have apart from input that is wrong."""

__all__ = ["UndefinedError"]


class UndefinedError(ValueError):
  """A score that these labels or estimates do not define, however good the model."""

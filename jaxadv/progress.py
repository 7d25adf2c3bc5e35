"""The progress line of the command line: what is done, how fast, how long still."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

__all__ = ["Progress", "named", "silent", "terminal"]

# advance(count, note)
Advance: TypeAlias = Callable[[int, str], None]
# progress(label, total, done) opens a line; inside, call its value to advance.
Progress: TypeAlias = Callable[
  [str, int, int], contextlib.AbstractContextManager[Advance]
]


@contextlib.contextmanager
def silent(label: str, total: int, done: int = 0) -> Iterator[Advance]:
  """Shows nothing.

  Example:
    >>> with silent("training", 10) as advance:
    ...   advance(1, "loss 0.3")
  """
  del label, total, done
  yield lambda count, note: None


def named(progress: Progress, name: str) -> Progress:
  """Lines that say which of several they are about."""
  return lambda label, total, done: progress(f"{label} {name}", total, done)


@contextlib.contextmanager
def terminal(label: str, total: int, done: int = 0) -> Iterator[Advance]:
  """A live line on standard error: bar, count, rate, time left and a note.

  Where that is no terminal, the finished line is printed once. Standard output is left
  to results.
  """
  from rich import console
  from rich import progress as rich_progress

  columns = (
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(bar_width=20),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TextColumn("{task.fields[rate]}"),
    rich_progress.TimeRemainingColumn(compact=True),
    rich_progress.TextColumn("[dim]{task.fields[note]}"),
  )
  shown = console.Console(stderr=True)
  with rich_progress.Progress(*columns, console=shown, speed_estimate_period=60) as bar:
    task = bar.add_task(label, total=total, completed=done, rate="", note="")

    def advance(count: int, note: str) -> None:
      bar.update(task, advance=count, note=note)
      bar.update(task, rate=_rate(bar.tasks[0].speed))

    yield advance


def _rate(per_second):
  """Two forms, as a slow rate is easier to read upside down.

  >>> _rate(12.34), _rate(0.25), _rate(None)
  ('12.3/s', '4.0 s each', '')
  """
  if not per_second:
    return ""
  return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s each"

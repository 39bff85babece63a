"""Every error that a user can meet.

LuthierError            base; the command line prints its message as one line
├── RecipeError         the recipe file or an override is wrong              exit 2
├── DataError           a data file or a row in it is wrong                  exit 2
├── ModelError          a model folder, a target or an adapter is wrong      exit 2
├── HubError            a model or data set cannot be fetched                exit 2
└── RunError            a run could not go on, or its proof failed           exit 1

A message names what is wrong, where, the bound, and the remedy. `assert` is for our own mistakes.
"""

from __future__ import annotations


class LuthierError(Exception):
    """A mistake that the user can put right. `exit_status` is the process's exit status."""

    exit_status = 2

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: the one line, as the command line does."""
        return [f"{type(self).__name__}: {self}"]


class RecipeError(LuthierError):
    """The recipe (or a `key=value` override) cannot be right."""


class DataError(LuthierError):
    """A data file, or rows in it, cannot be used."""


class ModelError(LuthierError):
    """A model folder, an adapter or a method's targets cannot be used."""


class HubError(LuthierError):
    """A model or a data set could not be fetched."""


class RunError(LuthierError):
    """The run had to stop, or what it produced did not pass its check."""

    exit_status = 1

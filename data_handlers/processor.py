"""Base of this package's processors."""

from __future__ import annotations

from qlib.data.dataset.processor import Processor

from data_handlers.arguments import NamedArguments

__all__ = ["FrameProcessor"]


class FrameProcessor(NamedArguments, Processor):
    """A processor that returns a new frame and leaves the one that it gets alone.

    Attributes
    ----------
    by_day : bool
        Every row depends on its own day and the past alone, whatever the frame's span.
    costly : bool
        It is worth running once on a long frame; see `data_handlers.sharing`.
    """

    by_day = costly = False

    def readonly(self) -> bool:
        """Return True: the input frame is not written to."""
        return True

"""Progress bars: on terminals and in notebooks, and nowhere else."""

import sys
import warnings
from typing import Any

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # In notebooks without ipywidgets; a bar of text does as well.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm


def progress_bar(things: Any = None, *, shown: bool = True, **options: Any) -> Any:
    """A bar of tqdm over `things`, hidden in logs and pipes.

    Args:
        things: to iterate over; None for a bar that is updated by hand.
        shown: whether the caller wants one at all.
        **options: of tqdm, such as total, desc and unit.
    """
    seen = shown and (sys.stderr.isatty() or _in_notebook())
    return tqdm(things, disable=not seen, **options)


def _in_notebook() -> bool:
    kernel = sys.modules.get("ipykernel.zmqshell")
    if kernel is None:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return isinstance(shell, kernel.ZMQInteractiveShell)

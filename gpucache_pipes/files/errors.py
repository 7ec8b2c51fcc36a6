"""Why a reader leaves a file to somebody else."""


class Unsupported(Exception):  # noqa: N818  (nothing is wrong with the file)
    """Not, or not certainly, what the fast reader knows; `torch.load` decides."""

"""Why a fast reader leaves a file to torch.load."""


class Unsupported(Exception):  # noqa: N818  (nothing is wrong with the file)
    """The file is not, or not certainly, what the fast reader understands."""

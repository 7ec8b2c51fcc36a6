"""Files of torch.save: read by their bytes, and what is left to torch.load."""

from gpucache_pipes.files.pt.reader import PtReader

__all__ = ["PtReader"]

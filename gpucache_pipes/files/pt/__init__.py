"""Files written by torch.save: a fast reader, and the fallback to torch.load."""

from gpucache_pipes.files.pt.reader import PtReader

__all__ = ["PtReader"]

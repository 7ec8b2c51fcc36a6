"""`.pt` files at the speed of their bytes, and never their code.

A file that torch.save wrote is a zip file of stored records: `data.pkl` says what the feature
is, `data/<n>` are the bytes of its storages. Here the directory is parsed, the pickle is read by
an interpreter that knows tensors and nothing else, and the bytes go straight to their place.

Most of it happens once for a data set: what a directory and a pickle mean is remembered as a
plan, and another file that has the same two (but for names and checksums) costs one read and a
comparison. For the next time that a file is read, its plan is remembered as well, as long as
inode, size and modification time stay the same.

Files that are anything else are Unsupported here, and torch.load decides.
"""

import sys

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Bytes, Plan, PlanReader
from gpucache_pipes.files.pt.directory import DirectoryTemplate
from gpucache_pipes.files.pt.template import FileTemplate

_FORMS_OF_A_SIZE = 8
_MOST_MET = 1 << 16
_MOST_BYTES = 64 << 20
"""What forms and their plans may take; where files have nothing in common, they are no use."""


class PtReader(PlanReader):
    """Opens `.pt` files; remembers their forms."""

    def __init__(self) -> None:
        super().__init__()
        # By the size of the file, the newest first.
        self._forms: dict[int, list[FileTemplate]] = {}
        self._forms_cost = 0
        self._met: set[int] = set()
        self._shapes: dict[tuple[int, int], DirectoryTemplate] = {}

    def plan(self, file: Bytes) -> Plan:
        """See PlanReader."""
        if sys.byteorder != "little":
            raise Unsupported("a big-endian machine")
        forms = self._forms.get(file.size, [])
        for form in forms:
            before = form.cost
            plan = form.plan(file)
            if plan is not None:
                if form.cost != before:
                    self._count(form.cost - before)
                return plan
        form = FileTemplate(file, self._shapes)
        # Remembered when it is met again: where each file has a form of its own, none is.
        kind = hash((file.size, form.numbers))
        if kind in self._met:
            self._count(form.cost)
            self._forms[file.size] = [form, *forms[: _FORMS_OF_A_SIZE - 1]]
        else:
            if len(self._met) >= _MOST_MET:
                self._met.clear()
            self._met.add(kind)
        return form.first_plan

    def _count(self, cost: int) -> None:
        self._forms_cost += cost
        if self._forms_cost > _MOST_BYTES:
            self._forms.clear()
            self._forms_cost = cost

"""Reads `.pt` files at the speed of their bytes, without running code that they name.

torch.save writes a zip file whose records are not compressed: `data.pkl` describes the feature, and
`data/<n>` are the bytes of its storages. The reader parses the zip directory, interprets the pickle
(see `pickle.py`), and reads the bytes directly into the buffers of the caller.

Most of this work is done once for a data set. A file template remembers what a directory and a
pickle mean, as a read plan. Another file with the same directory and pickle, prefix and checksums
aside, costs one read and a comparison. The read plan of each file is also remembered for the next
time that it is read, as long as its inode, size and modification time stay the same.

Any other file is Unsupported here, and `fallback.py` leaves it to torch.load.
"""

import sys
from functools import partial

from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.planned import Bytes, Parsed, PlanReader
from gpucache_pipes.files.plans import ReadPlan
from gpucache_pipes.files.pt.directory import DirectoryTemplate
from gpucache_pipes.files.pt.families import Families
from gpucache_pipes.files.pt.template import FileTemplate

_MAX_TEMPLATES_PER_SIZE = 8
_MAX_SEEN = 1 << 16
_MAX_TEMPLATES_COST = 64 << 20
"""Bytes for file templates and their read plans. Where files have nothing in common, templates are
of no use."""


class PtReader(PlanReader):
    """Opens `.pt` files, and remembers their file templates."""

    # Reader threads share these dicts and the set without a lock. That relies on `get`, `in`,
    # `add`, `clear` and item assignment being atomic under the GIL for keys that are ints or tuples
    # of ints. Lists of templates are replaced, never changed, so that a thread can iterate over the
    # list that it found. `plan` as a whole and `+=` are not atomic: of two templates that threads
    # add at the same time, one can be lost, and the cost is an estimate. That only costs time: no
    # file is read by a wrong template, because each file is compared with the template it is read
    # by.

    def __init__(self) -> None:
        super().__init__()
        # By the size of the file in bytes, the newest template first.
        self._templates: dict[int, list[FileTemplate]] = {}
        self._templates_cost = 0
        self._seen: set[int] = set()
        self._directory_templates: dict[tuple[int, int], DirectoryTemplate] = {}
        self._families = Families(self.selected)

    def plan(self, file: Bytes) -> ReadPlan:
        """See PlanReader."""
        return self._plan(file)[0]

    def parse(self, file: Bytes) -> Parsed:
        """See PlanReader."""
        plan, template = self._plan(file)
        return Parsed(plan, template.form, partial(self._families.learn, template, file))

    def _plan(self, file: Bytes) -> tuple[ReadPlan, FileTemplate]:
        if sys.byteorder != "little":
            raise Unsupported("the machine is big-endian")
        templates = self._templates.get(file.size, [])
        for template in templates:
            before = template.cost
            plan = template.plan(file)
            if plan is not None:
                if template.cost != before:
                    self._add_cost(template.cost - before)
                return plan, template
        template = FileTemplate(file, self._directory_templates)
        # A template is remembered when it is seen for the second time. Where each file has one of
        # its own, none is remembered.
        seen = hash((file.size, template.numbers))
        if seen in self._seen:
            self._add_cost(template.cost)
            self._templates[file.size] = [template, *templates[: _MAX_TEMPLATES_PER_SIZE - 1]]
        else:
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen.add(seen)
        return template.first_plan, template

    def _add_cost(self, cost: int) -> None:
        self._templates_cost += cost
        if self._templates_cost > _MAX_TEMPLATES_COST:
            self._templates.clear()
            self._templates_cost = cost

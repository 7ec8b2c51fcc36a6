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

from gpucache_pipes.files import zip_directory as zips
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.form import Form
from gpucache_pipes.files.planned import Bytes, Plan, PlanReader

_MOST_FORMS = 1024
_FORMS_OF_A_KIND = 7


class PtReader(PlanReader):
    """Opens `.pt` files; remembers their forms."""

    def __init__(self) -> None:
        super().__init__()
        self._forms: dict[zips.Tail, list[Form]] = {}

    def plan(self, file: Bytes) -> Plan:
        """See PlanReader."""
        if sys.byteorder != "little":
            raise Unsupported("a big-endian machine")
        tail = zips.find_directory(file)
        raw = file.read(tail.offset, tail.size)
        forms = self._forms.get(tail, [])
        for form in forms:
            plan = form.plan(file, raw)
            if plan is not None:
                return plan
        form = Form(file, zips.Directory(raw, tail.entries))
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
        self._forms[tail] = [form, *forms[:_FORMS_OF_A_KIND]]
        return form.first_plan

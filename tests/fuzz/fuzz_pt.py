"""Fuzzes the `.pt` reader: it must return what torch.load returns, or be Unsupported.

    pip install atheris; python tests/fuzz/fuzz_pt.py -max_total_time=600

Each input changes a file of torch.save in a few places, often in its pickle, so that most inputs
get past the zip directory. Not part of `make test`.
"""

import io
import os
import sys
import tempfile
import warnings
from typing import Any

import atheris
import torch

with atheris.instrument_imports(include=["gpucache_pipes.files"]):
    from gpucache_pipes.files import build
    from gpucache_pipes.files.errors import Unsupported
    from gpucache_pipes.files.pt.fallback import by_torch_load
    from gpucache_pipes.files.pt.reader import PtReader
    from gpucache_pipes.testing import assert_same

FEATURES: list[Any] = [
    {"a": torch.arange(6, dtype=torch.int16), "n": 3, "s": ["x", b"y", None, 1.5, True]},
    [torch.zeros(2, 3).t(), (torch.ones(1), torch.tensor(5)), {"k": torch.zeros(0, 2)}],
    torch.nn.Parameter(torch.arange(4.0))[1:].detach(),
]
DIRECTORY = tempfile.mkdtemp()
PATH = os.path.join(DIRECTORY, "x.pt")


def saved(feature: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(feature, buffer)
    return buffer.getvalue()


SEEDS = [saved(feature) for feature in FEATURES]


def read(opened: Any) -> Any:
    layout = opened.layout
    memory = bytearray(layout.span)
    opened.read_into([memoryview(memory)])
    opened.close()

    def leaf(n: int) -> torch.Tensor:
        dtype, shape, offset, nbytes = layout.leaves[n]
        data = torch.frombuffer(bytearray(memory[offset : offset + nbytes]) or bytearray(16),
                                dtype=torch.uint8)  # fmt: skip
        return data[:nbytes].view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)

    return build(layout.tree, leaf, lambda n: opened.values[n])


def mutated(provider: atheris.FuzzedDataProvider) -> bytes:
    data = bytearray(SEEDS[provider.ConsumeIntInRange(0, len(SEEDS) - 1)])
    for _ in range(provider.ConsumeIntInRange(0, 6)):
        kind = provider.ConsumeIntInRange(0, 2)
        at = provider.ConsumeIntInRange(0, len(data) - 1)
        if kind == 0:
            data[at] = provider.ConsumeIntInRange(0, 255)
        elif kind == 1:
            piece = provider.ConsumeBytes(provider.ConsumeIntInRange(1, 8))
            data[at : at + len(piece)] = piece
        else:
            # Within the pickle, which lies near the start of the file.
            data[min(len(data) - 1, 64 + at % 256)] = provider.ConsumeIntInRange(0, 255)
    return bytes(data)


def one_input(data: bytes) -> None:
    content = mutated(atheris.FuzzedDataProvider(data))
    with open(PATH, "wb") as file:  # noqa: PTH123
        file.write(content)
    try:
        got = read(PtReader().open(PATH))
    except Unsupported:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = read(by_torch_load(PATH, True))
    assert_same(got, expected)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()

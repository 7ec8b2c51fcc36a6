"""Fuzzes the native reader: what it reads must be what the Python readers read.

    python tests/fuzz/fuzz_native.py --seconds 300

Needs nothing but the package with its native module; that may be built with sanitizers. One half of
the inputs are files that were damaged in a few places, read by a `BatchReader` that knows the forms
of the intact ones. The other half are calls of the native functions, with arguments that are sound,
whose results are compared with those of a model, and with arguments that are not. A crash is
noticed as well. Not part of `make test`.
"""

import argparse
import io
import itertools
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gpucache_pipes.files import Progress, batch_reader
from gpucache_pipes.files.batch_reader import BatchReader
from gpucache_pipes.files.chunks import read_many
from gpucache_pipes.files.errors import Unsupported
from gpucache_pipes.files.npy import NpyReader
from gpucache_pipes.files.planned import PlanReader
from gpucache_pipes.files.pt.reader import PtReader
from gpucache_pipes.files.safetensors import SafetensorsReader
from gpucache_pipes.testing import assert_same
from gpucache_pipes.testing.contracts import build_feature, open_descriptors, read_feature

REFUSALS = (Unsupported, ValueError, OSError)
ERRORS = (ValueError, TypeError, OverflowError, MemoryError, BufferError)
"""What a native function may raise."""

UNKNOWN, LEFT_TO_PYTHON, COLUMNS = -1, -2, 6
MOST, LEAST = (1 << 63) - 1, -(1 << 63)
HOSTILE = [0, 1, -1, 2, 7, 8, 63, 64, -64, 1 << 31, 1 << 32, MOST - 1, MOST, LEAST, LEAST + 1,
           MOST // 8, MOST // 48, 1 << 64, -(1 << 64)]  # fmt: skip
SPARE = 24

native: Any = batch_reader._native


# Damaged files


def saved(feature: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(feature, buffer)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def safetensors(header: bytes, nbytes: int) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + bytes(i % 251 for i in range(nbytes))


def seeds() -> dict[type[PlanReader], list[bytes]]:
    """Intact files of each format."""
    base = torch.arange(24, dtype=torch.float32)
    features: list[Any] = [
        {"x": torch.arange(6), "y": torch.tensor(3)},
        torch.arange(40, dtype=torch.float32),
        [torch.ones(n, 3) for n in (1, 4, 2)],
        {"t": base.view(4, 6).t(), "e": torch.ones(1, 3).expand(5, 3)},
        {"same": base, "half": base[12:], "every": base[::2]},
        torch.linspace(-1, 1, 33).to(torch.bfloat16),
        {"a": torch.zeros(0, 2), "n": 3, "s": ["x", b"y", None, 1.5, True, float("nan")]},
        [torch.full((5,), n, dtype=torch.int16) for n in range(12)],
        # Python reads it by windows, not as a whole.
        {"large": torch.arange(30_000, dtype=torch.int32), "label": torch.tensor(7)},
    ]
    for n in (3, 4, 7):
        features.append({"x": torch.ones(n, 16), "label": n * n, "name": f"clip {n}"})
        features.append([torch.ones(4, n + 1), n, torch.ones(5 * n, 2), -1e9 * n])
    two = (
        b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"BF16","shape":[5],"data_offsets":[24,34]}}'
    )
    return {
        PtReader: [saved(feature) for feature in features],
        NpyReader: [
            npy(np.arange(50, dtype=np.float32)),
            npy(np.asfortranarray(np.arange(12).reshape(3, 4))),
            npy(np.zeros((0, 3), np.int16)),
            npy(np.array(True)),
        ],
        SafetensorsReader: [
            safetensors(two, 34),
            safetensors(b'{"x":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', 9),
            safetensors(b'{"__metadata__":{"k":"v"}}', 0),
        ],
    }


SEEDS = seeds()


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A copy that differs in a few places, often in length as well."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 6])):
        kind = draw.randrange(9)
        at = draw.randrange(len(data) + 1)
        if len(data) > 4096 and draw.random() < 0.8:
            at = draw.choice([at % 2048, len(data) - at % 2048])
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + draw.randint(1, 64)]
        elif kind == 2:
            data[at:at] = draw.randbytes(draw.randint(1, 64))
        elif kind == 3:
            data[at : at + 8] = draw.choice([b"\0", b"\xff", b"/", b"9"]) * len(data[at : at + 8])
        elif kind == 4:
            here = draw.randrange(len(data) + 1)
            piece = data[here : here + draw.randint(1, 64)]
            data[at : at + len(piece)] = piece
        elif at < len(data):
            data[at] = draw.choice([data[at] ^ 1 << draw.randrange(8), draw.randrange(256)])
    return bytes(data)


def in_memory(features: list[Any], cover: int) -> list[Any]:
    """These features, read in one go as a store reads them, without the files after them."""
    sizes = [f.layout.span + SPARE for f in features]
    ends = list(itertools.accumulate(sizes))
    begins = [end - size for end, size in zip(ends, sizes, strict=True)]
    memory = memoryview(bytearray(b"\xee" * (sum(sizes) + 1)))
    offsets = np.array(begins, np.int64)
    if cover < len(features):
        offsets[cover] = -1  # one whose pages do not lie in a row
    left = read_many(features, memory, offsets)
    assert len(set(left)) == len(left) and (cover in left or cover >= len(features))
    found = []
    for at, feature in enumerate(features):
        here = memory[begins[at] : ends[at]]
        if at in left:
            feature.read_into([here])
        feature.close()
        found.append(build_feature(feature, here))
        assert here[feature.layout.span :] == b"\xee" * SPARE, "bytes behind the feature changed"
    return found


class DamagedFiles:
    """Damaged files of one format, for one reader that learns."""

    def __init__(self, draw: random.Random, directory: str) -> None:
        self._draw = draw
        self._directory = directory
        self._make_reader = draw.choice([PtReader, PtReader, NpyReader, SafetensorsReader])
        self._many = BatchReader(self._make_reader())
        self._contents = list(SEEDS[self._make_reader])
        self._written = 0
        for content in self._contents * 3:
            self._check([content])

    def step(self) -> int:
        """Read a few files, and return how many."""
        draw = self._draw
        if draw.random() < 0.1:
            # Forms of damaged files are learned as well.
            self._contents.append(damaged(draw, draw.choice(self._contents)))
            contents = [self._contents[-1]] * 3
        else:
            base = draw.choice(self._contents)
            contents = [
                base if draw.random() < 0.2 else damaged(draw, base)
                for _ in range(draw.randint(1, 6))
            ]
        self._check(contents)
        return len(contents)

    def _check(self, contents: list[bytes]) -> None:
        paths = []
        for number, content in enumerate(contents):
            paths.append(f"{self._directory}/{number}")
            Path(paths[-1]).write_bytes(content)
            self._written += 1
            if self._draw.random() < 0.7:  # its read plan may be remembered
                os.utime(paths[-1], ns=(0, self._written << 30))
        while paths:
            features = self._many.open(paths, Progress())
            assert features, "no progress"
            read = [(n, f) for n, f in enumerate(features) if f is not None]
            cover = self._draw.choice([0, 1, 9])
            found = in_memory([feature for _, feature in read], cover)
            for (number, _), feature in zip(read, found, strict=True):
                assert_same(feature, self._expected(paths[number]))
            paths = paths[len(features) :]

    def _expected(self, path: str) -> Any:
        try:
            opened = self._make_reader().open(path)
        except REFUSALS as error:
            raise AssertionError("a new Python reader refuses it") from error
        try:
            return read_feature(opened, spare=SPARE)
        finally:
            opened.close()


# Sound calls


class Spec(NamedTuple):
    """The arguments of a form, before they are packed."""

    size: int
    growing: int
    equal: list[tuple[int, ...]]
    content: bytes
    digits: list[tuple[int, ...]]
    prefixes: list[tuple[int, ...]]
    numbers: list[tuple[int, ...]]

    def form(self) -> Any:
        """The native form."""
        runs = [np.array(r, np.int64).tobytes() for r in (self.equal, *self[4:])]
        return native.Form(self.size, self.growing, runs[0], self.content, *runs[1:])

    def is_sound(self) -> bool:
        """Whether `form` has to accept it."""
        runs = [*self.equal, *self.digits, *self.prefixes]
        return (
            self.size > 0
            and 0 <= self.growing <= 16
            and all(within(start, count, self.size) for start, count, _ in runs)
            and all(0 <= after <= self.growing for _, _, after in runs)
            and sum(count for _, count, _ in self.equal) == len(self.content)
            and sum(count for _, count, _ in [*self.digits, *self.prefixes]) <= MOST
            and len({count for _, count, _ in self.prefixes}) < 2
            and len(self.numbers) >= self.growing - 1
            and all(self._is_sound_number(*number) for number in self.numbers)
            and all(
                (after, begin, end, factor, divisor) == (self.growing, n, n + 1, 1, 1)
                for n, (_, _, after, _, begin, end, factor, divisor) in enumerate(
                    self.numbers[: max(0, self.growing - 1)]
                )
            )
        )

    def _is_sound_number(
        self, start: int, width: int, after: int, base: int, begin: int, end: int,
        factor: int, divisor: int,
    ) -> bool:  # fmt: skip
        return (
            1 <= width <= 4
            and within(start, width, self.size)
            and 0 <= after <= self.growing
            and 0 <= begin <= end <= self.growing
            and 0 <= base < 1 << 31
            and 0 <= factor <= 1 << 24
            and 1 <= divisor < 1 << 31
        )

    def fits(self, data: bytes) -> bool:
        """Whether a file is of this form."""
        grown = len(data) - self.size
        if grown and not self.growing:
            return False
        shift = [0]
        for start, width, _, base, *_ in self.numbers[: max(0, self.growing - 1)]:
            if not within(start + grown, width, len(data)):
                return False
            found = data[start + grown : start + grown + width]
            shift.append(shift[-1] + int.from_bytes(found, "little") - base)
        shift += [grown] if self.growing else []
        runs = [*self.equal, *self.digits, *self.prefixes]
        if not all(within(start + shift[after], count, len(data)) for start, count, after in runs):
            return False
        for start, width, after, base, begin, end, factor, divisor in self.numbers:
            at, growth = start + shift[after], shift[end] - shift[begin]
            if abs(growth) >= 1 << 31 or growth * factor % divisor:
                return False
            found = data[at : at + width] if within(at, width, len(data)) else b""
            value = base + growth * factor // divisor
            if not 0 <= value < 1 << min(8 * width, 31) or found != value.to_bytes(width, "little"):
                return False
        equal = b"".join(data[s + shift[after] :][:count] for s, count, after in self.equal)
        digits = [data[s + shift[after] :][:count] for s, count, after in self.digits]
        prefixes = {data[s + shift[after] :][:count] for s, count, after in self.prefixes}
        return (
            equal == self.content
            and all(number.isdigit() for number in digits)
            and len(prefixes) < 2
            and all(p.isascii() and b"/" not in p and b"\0" not in p for p in prefixes)
        )


def within(start: int, count: int, size: int) -> bool:
    return start >= 0 and count >= 0 and start + count <= size


def a_run(draw: random.Random, size: int, growing: int) -> tuple[int, int, int]:
    start = draw.randint(0, size)
    return start, draw.randint(0, min(size - start, 12)), draw.randint(0, growing)


def a_number(draw: random.Random, data: bytes, growing: int, tells: int) -> tuple[int, ...]:
    """One that this file has; `tells` by how much which part has grown, if not negative."""
    width = min(draw.randint(1, 4), len(data))
    start = draw.randint(0, len(data) - width)
    base = int.from_bytes(data[start : start + width], "little") & (1 << 31) - 1
    if tells >= 0:
        return start, width, growing, base, tells, tells + 1, 1, 1
    begin, end = sorted(draw.choices(range(growing + 1), k=2))
    factor, divisor = draw.choice([(0, 1), (1, 1), (3, 4), (1, 2), (1 << 24, 1)])
    return start, width, draw.randint(0, growing), base, begin, end, factor, divisor


def a_spec(draw: random.Random, data: bytes) -> Spec:
    """A form that this file often has."""
    size = len(data)
    growing = draw.choice([0, 0, 1, 2, 3])
    equal = [a_run(draw, size, growing) for _ in range(draw.randrange(4))]
    content = b"".join(data[start : start + count] for start, count, _ in equal)
    if content and draw.random() < 0.2:
        content = bytes([content[0] ^ 1]) + content[1:]
    digits = [(0, min(3, size), draw.randint(0, growing))] * draw.randrange(2)
    count = draw.randint(0, min(4, size))
    prefixes = [(draw.randint(0, size - count), count, growing)] * draw.randrange(3)
    numbers = [a_number(draw, data, growing, part) for part in range(growing - 1)]
    numbers += [a_number(draw, data, growing, -1) for _ in range(draw.randrange(3))]
    return Spec(size, growing, equal, content, digits, prefixes, numbers)


class Calls:
    """Calls of the native functions."""

    def __init__(self, draw: random.Random, directory: str) -> None:
        self._draw = draw
        self._files: dict[str, bytes | None] = {}
        for number in range(12):
            size = draw.choice([0, 1, 5, 63, 64, 65, 200, 3000])
            path = f"{directory}/c{number}"
            self._files[path] = draw.choice([b"123", b""]) + draw.randbytes(size)
            Path(path).write_bytes(self._files[path] or b"")
        fifo = f"{directory}/fifo"
        if not os.path.exists(fifo):
            os.mkfifo(fifo)
        for path in (fifo, directory, f"{directory}/missing", "", "a\0b", "\udcff\ud800"):
            self._files[path] = None
        specs = [a_spec(draw, data) for data in self._files.values() if data for _ in range(2)]
        self._specs = sorted(specs, key=lambda spec: (not spec.growing, spec.size))
        self._forms = tuple(spec.form() for spec in self._specs)

    def step(self) -> int:
        """Make one call, and return how many."""
        self._draw.choice([self._form, self._sound, self._read, self._copy])()
        return 1

    def _sound(self) -> None:
        """Files are read and copied as the model says."""
        draw = self._draw
        paths = draw.choices(list(self._files), k=draw.randint(1, 8))
        whole = draw.choice([0, 64, 200, 1 << 20])
        scratch = np.full(draw.choice([0, 1, 64, 65, 200, 4000, 30_000]) + 64, 0xEE, np.uint8)
        room = len(scratch) - 64
        rows = np.full((len(paths), COLUMNS), -9, np.int64)
        control = np.zeros(3, np.int64)
        end = native.read(self._forms, tuple(paths), whole, scratch[:room], rows, control)
        assert (scratch[room:] == 0xEE).all()
        used, expected_end = 0, len(paths)
        fitting = []
        for number in range(len(paths)):
            data = self._files[paths[number]]
            if not data or len(data) > whole:
                assert rows[number, 0] == LEFT_TO_PYTHON
                continue
            if len(data) >= room - used:
                if used:
                    expected_end = number
                    break
                assert rows[number, 0] == LEFT_TO_PYTHON
                continue
            fits = [n for n, spec in enumerate(self._specs) if spec.fits(data)]
            assert rows[number].tolist()[:2] == [fits[0] if fits else UNKNOWN, used]
            assert scratch[used : used + len(data)].tobytes() == data
            fitting += [number] if fits else []
            used = min(room, used + (len(data) + 63) // 64 * 64)
        assert end == expected_end, (end, expected_end)
        moves = []
        target = np.full(8000, 0xEE, np.uint8)
        expected = target.copy()
        for place, number in enumerate(fitting):
            data = self._files[paths[number]] or b""
            start, count, _ = a_run(draw, len(data), 0)
            here = 80 * place + 1
            moves.append((rows[number, 1] + start, here, count))
            expected[here : here + count] = np.frombuffer(data[start : start + count], np.uint8)
        native.copy(scratch[:room], target[:7000], np.array(moves, np.int64).reshape(-1, 3))
        assert (target == expected).all()

    def _form(self) -> None:
        """A form is made if, and only if, all that it names lies in its file."""
        draw = self._draw
        spec = draw.choice(self._specs)
        for _ in range(draw.randrange(3)):
            at = draw.randrange(len(spec))
            old: Any = spec[at]
            new: Any
            if at < 2:
                new = draw.choice([*HOSTILE, old + 1, old - 1])
            elif at == 3:
                new = old + b"x"
            else:
                width = 8 if at == 6 else 3
                numbers = [n for n in HOSTILE if LEAST <= n <= MOST] + [spec.size]
                new = [*old, tuple(draw.choice(numbers) for _ in range(width))]
            spec = spec._replace(**{Spec._fields[at]: new})
        if draw.random() < 0.2:
            arguments = [self._junk() for _ in range(draw.randint(4, 8))]
            refused(lambda: native.Form(*arguments))
            return
        made = not refused(spec.form)
        assert made == (spec.is_sound() and spec.size <= MOST), spec

    # Hostile calls

    def _read(self) -> None:
        paths: list[Any] = self._draw.choices(list(self._files), k=self._draw.randint(0, 6))
        arena = Arena(self._draw)
        for _ in range(self._draw.randrange(3)):
            paths.insert(self._draw.randint(0, len(paths)), self._bad_path(paths))
        arguments = [
            self._some_forms(),
            self._or_junk(tuple(paths)),
            self._number(1 << 20),
            self._or_junk(arena.part(True)),
            self._or_junk(arena.rows(len(paths))),
            self._or_junk(arena.part(True)),
        ]
        refused(lambda: native.read(*arguments))
        arena.require_untouched()

    def _copy(self) -> None:
        draw = self._draw
        arena = Arena(draw)
        usual = [*HOSTILE[:-2], *range(20)]
        moves = [draw.choice(usual) for _ in range(draw.randrange(16))]
        arguments = [
            self._or_junk(arena.part(False)),
            self._or_junk(arena.part(True)),
            self._or_junk(np.array(moves, np.int64)),
        ]
        refused(lambda: native.copy(*arguments))
        arena.require_untouched()

    def _some_forms(self) -> Any:
        draw = self._draw
        some = self._forms
        if draw.random() < 0.2:
            some = tuple(draw.choices(self._forms, k=draw.randrange(9)))
        if draw.random() < 0.05:
            some = (*some, self._junk())
        return self._or_junk(some)

    def _bad_path(self, paths: list[Any]) -> Any:
        draw = self._draw
        path = draw.choice(list(self._files))
        return draw.choice([None, 5, b"x", path.encode(errors="ignore"), Path(path), "x" * 5000,
                            Fickle(paths, draw.choice([0, 1, 40]), path),
                            Fickle(paths, draw.choice([0, 1, 40]), 5)])  # fmt: skip

    def _number(self, usual: int) -> Any:
        draw = self._draw
        if draw.random() < 0.03:
            return self._junk()
        return draw.randint(0, usual) if draw.random() < 0.7 else draw.choice(HOSTILE)

    def _or_junk(self, usual: Any) -> Any:
        return self._junk() if self._draw.random() < 0.03 else usual

    def _junk(self) -> Any:
        draw = self._draw
        return draw.choice([None, 1, -1, 1 << 70, 1.5, "x", b"", b"x" * 7, b"\xff" * 48, (), [],
                            [None], (None,), {}, native, native.Form, self._forms, bytearray(),
                            bytearray(48), memoryview(bytearray(64))[::2], np.zeros(0, np.int64),
                            np.zeros((4, 6), np.int64).T, range(3)])  # fmt: skip


class Fickle:
    """A path-like object that changes the list in which it is."""

    def __init__(self, paths: list[Any], left: int, result: Any) -> None:
        self._paths, self._left, self._result = paths, left, result

    def __fspath__(self) -> Any:
        paths, left, result = self._paths, self._left, self._result
        del paths[left:]
        paths.extend([result] * (left - len(paths)))
        return result


class Arena:
    """Memory of which parts are given away, which may overlap and be misaligned."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._memory = np.full(16_384, 0xEE, np.uint8)
        if draw.random() < 0.5:
            numbers = np.array([draw.choice(HOSTILE[:-2]) for _ in range(64)], np.int64)
            self._memory[:] = np.tile(numbers.view(np.uint8), 32)
        self._writable = np.zeros(16_384, bool)
        self._before = self._memory.copy()

    def part(self, writable: bool, nbytes: int | None = None) -> Any:
        """Some of it."""
        draw = self._draw
        if nbytes is None:
            nbytes = draw.choice([0, 8, 23, 24, 25, 64, 200, 4000, 12_000])
        start = draw.randrange(64, 16_384 - nbytes - 64)
        if draw.random() < 0.9:
            start -= start % 8
        if writable:
            self._writable[start : start + nbytes] = True
        return self._memory[start : start + nbytes]

    def rows(self, count: int) -> Any:
        """Rows for that many files or one too few."""
        return self.part(True, (count - self._draw.choice([0, 0, 0, 1])) * 48 % 16_000)

    def require_untouched(self) -> None:
        """Nothing outside of the writable parts has changed."""
        changed = (self._memory != self._before) & ~self._writable
        assert not changed.any(), f"bytes {np.flatnonzero(changed)[:9].tolist()} were changed"


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ERRORS:
        return True
    return False


# The fuzzer


def work(seed: int, first: int, seconds: float, note: Path) -> int:
    """In the child: generations of inputs, each with readers and random numbers of its own."""
    warnings.simplefilter("ignore")
    deadline = time.monotonic() + seconds
    inputs = [0, 0]
    with tempfile.TemporaryDirectory() as directory:
        Calls(random.Random(seed), directory).step()
        before = open_descriptors()
        for generation in itertools.count(first):
            note.write_text(f"{generation} {inputs[0]} {inputs[1]}")
            if time.monotonic() > deadline:
                break
            for kind, make in enumerate([DamagedFiles, Calls]):
                draw = random.Random(f"{seed} {generation} {kind}")
                fuzzed = make(draw, directory)
                for _ in range(60 if kind == 0 else 300):
                    inputs[kind] += fuzzed.step()
            assert open_descriptors() == before, "descriptors are left open"
    return 0


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", type=int, default=0, help="the generation to begin with")
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if native is None:
        print(f"there is no native reader: {batch_reader.native_problem}")
        return 1
    if options.note:
        return work(options.seed, options.first, options.seconds, options.note)
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory() as directory:
        note = Path(directory) / "note"
        note.write_text(f"{options.first} 0 0")
        again = [sys.executable, "-X", "faulthandler", __file__, "--seed", str(seed)]
        first = ["--first", str(options.first), "--seconds", str(options.seconds)]
        status = subprocess.run([*again, *first, "--note", str(note)], check=False).returncode
        generation, files, calls = note.read_text().split()
    print(f"{files} files and {calls} calls in {int(generation) - options.first} generations")
    if status:
        print(f"FAILED with status {status}; to repeat it: {' '.join(again[3:])} "
              f"--first {generation} --seconds 1")  # fmt: skip
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())

"""Random files, whole and damaged, against the libraries that define their formats."""

import collections
import io
import os
import random
import resource
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from gpucache_pipes import GPUFeatureStore
from gpucache_pipes.testing import assert_same

FILES, DAMAGES, PROGRAMS = 12, 12, 60
MOST_MIB = 2500

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.uint16, torch.uint64, torch.float8_e4m3fn,
]  # fmt: skip
NUMPY = ["f4", "f8", "i2", "u4", "c8", "?"]


def _tensor(draw: random.Random) -> torch.Tensor:
    shape = [draw.choice([0, 1, 2, 3, 7]) for _ in range(draw.randint(0, 3))]
    if draw.random() < 0.1:
        shape = [30_000]  # too large to be read in one piece
    raw = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(draw.randint(0, 99)))
    tensor = raw.to(draw.choice(DTYPES))
    form = draw.random()
    if form < 0.15 and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if form < 0.3 and tensor.dim():
        return tensor[::2]
    return tensor.unsqueeze(0).expand(2, *shape) if form < 0.35 else tensor


def _plain(draw: random.Random) -> Any:
    return draw.choice([None, True, 3, -(1 << 40), 1.5, "text", b"bytes", "\u00e4", torch.float32])


def _tree(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if depth > 3 or kind < 0.45:
        return _tensor(draw) if draw.random() < 0.7 else _plain(draw)
    parts = [_tree(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    if kind < 0.8:
        keys = [draw.choice(["x", "y", 3, 1.0, None, b"k", (1, 2), "long name"]) for _ in parts]
        return draw.choice([dict, collections.OrderedDict])(zip(keys, parts, strict=True))
    return parts if kind < 0.9 else tuple(parts)


def _write(draw: random.Random, path: Path) -> None:
    """A file of a random format; `path` gets its suffix."""
    suffix = path.suffix
    if suffix == ".npy":
        shape = draw.choice([(24,), (2, 3, 4), (0, 3), (1, 24), ()])
        array = np.arange(24)[: int(np.prod(shape))].reshape(shape).astype(draw.choice(NUMPY))
        np.save(path, np.asfortranarray(array) if draw.random() < 0.4 else array)
    elif suffix == ".safetensors":
        count = draw.randint(0, 4)
        safe = [dtype for dtype in DTYPES if dtype is not torch.uint64 or draw.random() < 0.5]
        feature = {
            f"{n}\u00e4": _tensor(draw).to(draw.choice(safe)).contiguous() for n in range(count)
        }
        metadata = {"a": "b"} if draw.random() < 0.3 else None
        safetensors.torch.save_file(feature, path, metadata=metadata)
    else:
        options: dict[str, Any] = {}
        if draw.random() < 0.1:
            options["_use_new_zipfile_serialization"] = False
        if draw.random() < 0.05:
            options["pickle_protocol"] = 4
        torch.save(_tree(draw), path, **options)
        if draw.random() < 0.1 and zipfile.is_zipfile(path):
            _pack(path)


def _pack(path: Path) -> None:
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


NAMES = [
    "torch Tensor", "torch FloatStorage", "torch Size", "torch float32", "builtins bytearray",
    "builtins set", "builtins complex", "collections OrderedDict", "collections Counter",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "_codecs encode",
    "torch.nn.parameter Parameter", "torch.storage UntypedStorage", "os system",
]  # fmt: skip


def _program(draw: random.Random) -> bytes:
    """A pickle made of opcodes that fit together more often than not."""
    parts = [b"\x80\x02"] if draw.random() < 0.9 else []
    for _ in range(draw.randint(1, 40)):
        kind = draw.random()
        if kind < 0.3:
            parts.append(draw.choice([b"K\x01", b"N", b"\x88", b"X\1\0\0\0x", b")", b"}", b"]"]))
        elif kind < 0.45:
            parts.append(b"\x85" * draw.choice([1, 1, 2, 9, 40, 100_000]))
        elif kind < 0.55:
            parts.append(draw.choice([b"\x86", b"\x87", b"(", b"t", b"s", b"u", b"a", b"e"]))
        elif kind < 0.7:
            module, name = draw.choice(NAMES).split()
            arguments = draw.choice(
                [b")", b"K\x09\x85", b"\x8a\x05\0\0\0\0\x02\x85", b"K\1K\2\x86"]
            )
            parts.append(f"c{module}\n{name}\n".encode() + draw.choice([b"", arguments + b"R"]))
        elif kind < 0.85:
            parts.append(
                draw.choice([b"q\0", b"h\0", b"q\1", b"h\1", b"h\0h\0\x86q\0", b"2", b"0"])
            )
        elif kind < 0.9:
            parts.append(b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0")
            parts.append(draw.choice([b"0", b"1"]) + b"X\3\0\0\0cpuK\x04tQ")
        else:
            parts.append(b"}K\x01K\x02s")
    return b"".join(parts) + b"."


def _write_program(draw: random.Random, path: Path) -> None:
    program = _program(draw)
    if draw.random() < 0.2:  # as torch.save wrote before 1.6
        magic = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
        rest = draw.choice([b"\x80\x02].", b"\x80\x02]X\1\0\0\x000a.", _program(draw)])
        path.write_bytes(magic + b"\x80\x02M\xe9\x03.\x80\x02}." + program + rest)
        return
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", program, len(program))
    writer.write_record("byteorder", b"little", 6)
    writer.write_record("data/0", bytes(16), 16)
    writer.write_end_of_file()


def _damage(draw: random.Random, data: bytes) -> bytes:
    content = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        kind = draw.random()
        # Most of what matters is near one of the ends.
        near = draw.choice([len(content), min(len(content), 600)])
        at = (
            draw.randrange(near) if draw.random() < 0.5 else len(content) - 1 - draw.randrange(near)
        )
        if kind < 0.5:
            content[at] ^= 1 << draw.randrange(8)
        elif kind < 0.7:
            content[at] = draw.choice([0, 1, 0x28, 0x2E, 0x71, 0x7F, 0x85, 0xFF])
        elif kind < 0.8:
            del content[at:]
        elif kind < 0.9:
            del content[at : at + draw.randint(1, 4)]
        else:
            content[at:at] = content[at // 2 : at // 2 + draw.randint(1, 8)]
        if not content:
            break
    return bytes(content)


def _theirs(path: Path) -> Any:
    if path.suffix == ".npy":
        return torch.from_numpy(np.ascontiguousarray(np.load(path)).reshape(np.load(path).shape))
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True, map_location="cpu")  # as the store does


def _compare(store: GPUFeatureStore, path: Path, whole: bool, counts: Counter[str]) -> None:
    try:
        ours = store.get(path)
    except Exception as error:
        if whole:
            # Some of it `torch.load` refuses as well; a damaged file need not be looked at again.
            try:
                _theirs(path)
            except Exception:
                counts["files that both refuse"] += 1
                return
            raise AssertionError(f"{path.name}: {error!r}") from error
        assert path.name in str(error), f"{error!r} does not name {path.name}"
        counts["damaged files that are refused"] += 1
        return
    expected = _theirs(path)
    if path.suffix == ".safetensors":
        expected = {name: expected[name] for name in ours if name in expected}
    if not any(type(part).__name__ == "StorageType" for part in tree_leaves(expected)):
        assert_same(_true(ours), _true(expected))  # that of torch.load is equal to itself alone
    counts["files that are the same"] += 1


def _true(feature: Any) -> Any:
    """With bools of one bit: where a byte is damaged, copying makes 1 of any but 0, or does not."""
    return tree_map_only(
        torch.Tensor, lambda t: t.contiguous().view(-1).view(torch.uint8).ne(0).view(t.shape)
        if t.dtype is torch.bool and t.numel() else t, feature,
    )  # fmt: skip


def _age(path: Path, minutes: int) -> None:
    """Each file another time: where an inode is used again, that is how a version is known."""
    os.utime(path, (60 * minutes, 60 * minutes))


def reading(seed: int, directory: Path) -> Counter[str]:
    """What comes out is what the library gives, bit for bit, or an error that names the file."""
    warnings.simplefilter("ignore")
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    with GPUFeatureStore("cpu", asynchronous=False, revalidate=True) as store:
        for number in range(FILES):
            suffix = draw.choice([".pt", ".pt", ".pt", ".npy", ".safetensors"])
            path = directory / f"{number}{suffix}"
            _write(draw, path)
            _age(path, number * (DAMAGES + 1))
            _compare(store, path, True, counts)
            data = path.read_bytes()
            for damage in range(DAMAGES):
                damaged = directory / f"{number}-{damage}{suffix}"
                damaged.write_bytes(_damage(draw, data))
                _age(damaged, number * (DAMAGES + 1) + damage + 1)
                _compare(store, damaged, False, counts)
                damaged.unlink()
        for number in range(PROGRAMS):
            path = directory / f"p{number}.pt"
            _write_program(draw, path)
            _age(path, (FILES + 1) * (DAMAGES + 1) + number)
            _compare(store, path, False, counts)
            path.unlink()
        store.check()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    assert peak < MOST_MIB, f"{peak} MiB"
    return counts

"""Random pipelines, resumed at every position: what comes then is what would have come."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchdata.nodes as tn

from attacks.common import device_of, require_right, store_options, write_files
from gpucache_pipes import (
    FeatureLoadError,
    GPUCachedPathDataLoader,
    GPUCollator,
    GPUFeatureStore,
    GPUPrefetcher,
    PathLister,
)

FILES = 23


def _lister(draw: random.Random, paths: list[str]) -> Callable[[], PathLister]:
    options: dict[str, Any] = {
        "batch_size": draw.choice([None, 1, 3, 4, 50]),
        "seed": draw.randint(0, 5),
    }
    if options["batch_size"] is not None:
        options["drop_last"] = draw.random() < 0.3
        if draw.random() < 0.3:
            options["bucket_by"] = "file_size"
    if options.get("drop_last") and options["batch_size"] == 50:
        options["drop_last"] = False
    if "bucket_by" not in options and draw.random() < 0.2:
        options["sampler"] = torch.utils.data.RandomSampler(paths)
    else:
        options["shuffle"] = draw.random() < 0.7
        if draw.random() < 0.3:
            shards = draw.choice([2, 3])
            options |= {
                "num_shards": shards,
                "shard_index": draw.randrange(shards),
                "shard": draw.choice(["epoch", "static"]),
            }
            options["drop_last"] = False
    source: Any = paths if draw.random() < 0.7 else str(Path(paths[0]).parent)
    return lambda: PathLister(source, **options)


def _features_of(element: Any) -> list[Any]:
    return [element] if isinstance(element, dict) else list(element)


def _numbers(element: Any, bad: set[int]) -> list[int]:
    """Which files an element is made of, after looking at every byte."""
    numbers = []
    for feature in _features_of(element):
        number = int(feature["label"])
        require_right(feature, number)
        assert number not in bad
        numbers.append(number)
    return numbers


def pipelines(seed: int, directory: Path) -> Counter[str]:
    """A pipeline of two epochs, against the same one from each of its states."""
    draw = random.Random(seed)
    paths = write_files(directory, FILES)
    bad = set(draw.sample(range(FILES), draw.choice([0, 0, 1, 5])))
    for number in bad:
        kind = draw.choice(["cut", "gone", "empty"])
        if kind == "gone":
            # In a directory that is listed, a link to nowhere is a file that is not there.
            Path(paths[number]).unlink()
            Path(paths[number]).symlink_to(directory / "nowhere")
        else:
            data = Path(paths[number]).read_bytes()
            Path(paths[number]).write_bytes(data[: len(data) // 2] if kind == "cut" else b"")
    lister = _lister(draw, paths)
    depth, device = draw.randint(1, 5), device_of(draw)
    on_error = draw.choice(["skip", "raise"]) if bad else "raise"
    kind = draw.choice(["nodes", "nodes", "collated", "prefetched", "loader"])
    with GPUFeatureStore(device, **store_options(draw, FILES)) as store:

        def make() -> Any:
            if kind == "loader" and lister().batch_size is not None:
                return GPUCachedPathDataLoader(
                    lister(), store=store, prefetch_batches=depth, collate_fn=list,
                    on_error=on_error,
                )  # fmt: skip
            node: Any = GPUPrefetcher(lister(), store, depth=depth, on_error=on_error)
            if kind == "collated":
                size = None if lister().batch_size is not None else 4
                node = GPUCollator(node, collate_fn=list, batch_size=size)
            if kind == "prefetched":
                node = tn.Prefetcher(node, prefetch_factor=2)
            return tn.Loader(node, restart_on_stop_iteration=False)

        counts = _run(make, bad if on_error == "skip" else set(), on_error == "raise" and bool(bad))
        store.check()
    shutil.rmtree(directory)
    directory.mkdir()
    return counts


def _take(source: Any, bad: set[int]) -> tuple[list[Any], list[Any]]:
    """All elements of an epoch, and the states in front of them and behind the last."""
    elements: list[Any] = []
    states = [source.state_dict()]
    for element in source:
        elements.append(_numbers(element, bad))
        states.append(source.state_dict())
    return elements, states


def _run(make: Callable[[], Any], bad: set[int], raises: bool) -> Counter[str]:
    source = make()
    if raises:
        try:
            _take(source, bad)
        except (FeatureLoadError, FileNotFoundError):
            return Counter({"pipelines that raise": 1})
        except RuntimeError as error:  # torchdata's threads raise a text of it
            assert "FeatureLoadError" in str(error), error
            return Counter({"pipelines that raise": 1})
        return Counter({"pipelines without the bad file": 1})
    try:
        first, states = _take(source, bad)
    except RuntimeError as error:
        # Of a part of the files, all may be bad.
        assert "nothing of this epoch could be loaded" in str(error), error
        return Counter({"pipelines of which nothing is left": 1})
    for at, state in enumerate(states[:-1]):
        resumed = make()
        resumed.load_state_dict(state)
        rest = [_numbers(element, bad) for element in resumed]
        assert rest == first[at:], f"resumed at {at}: {rest} instead of {first[at:]}"
    return Counter({"pipelines": 1, "resumes": len(states) - 1, "elements": len(first)})

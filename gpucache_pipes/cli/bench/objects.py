"""Contenders for features in object storage: what people write, and the bare requests."""

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from gpucache_pipes.cli.bench.contender import Contender, Opener, Run
from gpucache_pipes.cli.bench.loaders import BASELINE, LOADERS, OURS, dataloader
from gpucache_pipes.cli.bench.work import Work, load
from gpucache_pipes.files.remote.clients import open_client
from gpucache_pipes.files.remote.urls import locate

Options = Mapping[str, Any]
Fetch = Callable[[str], bytes]
"""Gets an object by its URL."""

_REQUESTS = 32


def fetch_by_obstore(options: Options) -> Fetch:
    """A function that gets an object, by the client of this package."""
    clients: dict[str, Any] = {}

    def fetch(url: str) -> bytes:
        location = locate(url)
        client = clients.get(location.root)
        if client is None:
            client = clients[location.root] = open_client(location, options)
        return bytes(client.get(location.name, None).data)

    return fetch


def fetch_by_s3fs(options: Options) -> Fetch:
    """The same by s3fs, with what it calls the usual options."""
    import s3fs

    names = {"access_key_id": "key", "secret_access_key": "secret", "session_token": "token",
             "skip_signature": "anon"}  # fmt: skip
    given = {theirs: options[ours] for ours, theirs in names.items() if ours in options}
    client = {"endpoint_url": options.get("endpoint"), "region_name": options.get("region")}
    files = s3fs.S3FileSystem(client_kwargs={k: v for k, v in client.items() if v}, **given)
    fetch: Fetch = files.cat_file
    return fetch


class Objects(Dataset[Any]):
    """The data set that people write, indexed by URL. Each worker makes a client of its own."""

    def __init__(
        self,
        options: Options,
        weights_only: bool,
        make: Callable[[Options], Callable[[str], bytes]],
    ) -> None:
        self._options = options
        self._weights_only = weights_only
        self._make = make
        self._fetch: Fetch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fetch": None}

    def __getitem__(self, url: str) -> Any:
        if self._fetch is None:
            self._fetch = self._make(self._options)
        return load(io.BytesIO(self._fetch(url)), self._weights_only, name=url)


def _dataloader(workers: int, make: Callable[[Options], Fetch]) -> Opener:
    # Clients have threads, which a fork would not copy.
    return dataloader(
        workers,
        lambda work: Objects(work.storage_options or {}, work.weights_only, make),
        "forkserver",
    )


def _requests(work: Work, share: float) -> Iterator[Run]:
    fetch = fetch_by_obstore(work.storage_options or {})

    def epoch(number: int) -> Iterable[Any]:
        for batch in work.batches[number]:
            get_all = partial(_get_all, iter(batch), threading.Lock(), fetch)
            crew = [threading.Thread(target=get_all) for _ in range(_REQUESTS)]
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
            yield None

    yield Run(epoch)


def _get_all(urls: Iterator[str], lock: threading.Lock, fetch: Fetch) -> None:
    while True:
        with lock:
            url = next(urls, None)
        if url is None:
            return
        fetch(url)


def objects_contenders() -> Sequence[Contender]:
    """The contenders for URLs."""
    own = [contender for contender in LOADERS if contender.name.startswith(("GPUCollator", "dict"))]
    return [
        OURS,
        *own,
        Contender(BASELINE.name, "peer", _dataloader(0, fetch_by_obstore)),
        *(
            Contender(f"DataLoader, {n} workers", "peer", _dataloader(n, fetch_by_obstore))
            for n in (2, 8)
        ),
        Contender(
            "DataLoader, 8 workers, s3fs", "peer", _dataloader(8, fetch_by_s3fs), needs="s3fs"
        ),
        Contender(
            f"obstore, {_REQUESTS} requests at once", "limit", _requests, cases=("first",),
            makes_batches=False,
        ),
    ]  # fmt: skip

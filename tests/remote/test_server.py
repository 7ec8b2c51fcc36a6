"""Whether there is a server at all: the other tests of this folder are skipped without one."""

from pathlib import Path

from remote.servers import SeaweedFS, options


def test_a_real_server_runs_here(tmp_path: Path) -> None:
    import obstore
    from obstore.store import S3Store

    server = SeaweedFS(tmp_path)
    try:
        store = S3Store("tests", **options(server.port))
        obstore.put(store, "a/b.pt", b"here")
        assert bytes(obstore.get(store, "a/b.pt").bytes()) == b"here"
        [[found]] = obstore.list(store, "a")
        assert found["path"] == "a/b.pt" and found["size"] == 4
    finally:
        server.kill()

"""Features in object storage: RemoteFiles, and how URLs are listed."""

__all__: list[str] = []

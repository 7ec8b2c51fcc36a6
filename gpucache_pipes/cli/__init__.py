"""The commands of `python -m gpucache_pipes`: inspect, plan and bench."""

__all__: list[str] = []

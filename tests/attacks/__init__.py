"""Ways to attack the package; see `tests/attack.py`.

A way is a function of a seed and an empty directory. It raises what is wrong, and returns what it
did: counts by name. All that it draws comes from the seed.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from attacks.devices import devices
from attacks.pipelines import pipelines
from attacks.reading import reading
from attacks.signals import signals
from attacks.stores import stores

Way = Callable[[int, Path], Counter[str]]

WAYS: dict[str, Way] = {way.__name__: way for way in (pipelines, stores, reading, signals, devices)}

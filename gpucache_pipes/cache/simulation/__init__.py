"""Simulation: request traces, replayed against a shadow cache without files or a device."""

from gpucache_pipes.cache.simulation.simulate import Served, Simulation, simulate
from gpucache_pipes.cache.simulation.trace import Trace, Turn

__all__ = ["Served", "Simulation", "Trace", "Turn", "simulate"]

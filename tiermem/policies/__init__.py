"""Eviction policies, and what else decides which units move: admission, prefetch, recompute."""

from tiermem.policies.base import Candidates, Eviction, EvictionBase, RequestFacts
from tiermem.policies.registry import load, names

__all__ = ["Candidates", "Eviction", "EvictionBase", "RequestFacts", "load", "names"]

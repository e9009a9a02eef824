"""The fixtures `tiny_llama` and `local`."""

from tiny_swarm_fixtures import local, tiny_llama

__all__ = ["local", "tiny_llama"]

"""The fixtures `tiny_llama`, `local` and `open_world`."""

from tiny_swarm_fixtures import local, open_world, tiny_llama

__all__ = ["local", "open_world", "tiny_llama"]

"""The fixture `tiny_servers`; and for networks in one process, `tiny_llama` and `local`."""

from tiny_servers import tiny_servers
from tiny_swarm_fixtures import local, tiny_llama

__all__ = ["local", "tiny_llama", "tiny_servers"]

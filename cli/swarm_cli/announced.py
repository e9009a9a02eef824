"""What a swarm announces: its models, and who serves which blocks of them. Loads no model."""

from dataclasses import dataclass
from pathlib import PurePath

from p2pswarm.client.membership import Membership
from p2pswarm.core.errors import ModelNotFound
from p2pswarm.core.ids import ModelId
from p2pswarm.core.server_info import ServerInfo, ServerState
from p2pswarm.core.span import Span, uncovered


@dataclass(frozen=True, slots=True)
class AnnouncedModel:
    """One model as the swarm announces it."""

    model_id: ModelId
    num_blocks: int
    servers: tuple[ServerInfo, ...]
    """In the order of their blocks."""

    @property
    def uncovered(self) -> list[Span]:
        """Blocks that no online server holds."""
        online = [server.span for server in self.servers if server.state is ServerState.ONLINE]
        return uncovered(online, Span(0, self.num_blocks))


async def find_models(membership: Membership, wanted: str | None) -> list[AnnouncedModel]:
    """The models that the user may mean; None: all. Raises `ModelNotFound` where none has the wanted name."""
    summaries = await membership.directory.models()
    chosen = [model_id for model_id in sorted(summaries) if wanted is None or is_named(model_id, wanted)]
    if wanted is not None and not chosen:
        announced = f"announced are {', '.join(sorted(summaries))}" if summaries else "no model at all is announced"
        raise ModelNotFound(f"no model {wanted} in this swarm; {announced}")
    found = []
    for model_id in chosen:
        servers = (await membership.directory.servers(model_id)).values()
        in_order = sorted(servers, key=lambda server: (server.span, server.peer_id))
        found.append(AnnouncedModel(model_id, summaries[model_id].num_blocks, tuple(in_order)))
    return found


def is_named(model_id: ModelId, wanted: str) -> bool:
    """Whether the user may mean this model: its id, its name, or a path or hub id that ends in the name."""
    name = model_id.partition("@")[0]
    return wanted in (model_id, name) or PurePath(wanted).name.removesuffix(".gguf") == name

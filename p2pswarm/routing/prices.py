"""Two price lists for the ways of a routing graph: for one decoded token, and for the rest of a broken session."""

from collections.abc import Mapping
from dataclasses import dataclass

from p2pswarm.core.ids import PeerId
from p2pswarm.core.server_info import ServerInfo
from p2pswarm.routing.costs import CostModel, CostParts


@dataclass(frozen=True, slots=True)
class DecodePrices:
    """The time of one decoded token."""

    costs: CostModel
    round_trips_s: Mapping[PeerId, float]
    """Measured from the client."""
    cache_tokens_needed: int

    def enter_us(self, server: ServerInfo) -> int:
        return self.enter(server).total_us

    def push_us(self, server: ServerInfo, following: ServerInfo) -> int:
        return self.push(server, following).total_us

    def leave_us(self, server: ServerInfo) -> int:
        return self.costs.half_round_trip_us(self.round_trips_s.get(server.peer_id))

    def block_us(self, server: ServerInfo) -> int:
        return self.costs.block_us(server)

    def enter(self, server: ServerInfo) -> CostParts:
        """What `enter_us` is made of."""
        arrival = self.costs.arrival(server, self.cache_tokens_needed)
        return arrival._replace(network_us=self.costs.half_round_trip_us(self.round_trips_s.get(server.peer_id)))

    def push(self, server: ServerInfo, following: ServerInfo) -> CostParts:
        """What `push_us` is made of."""
        arrival = self.costs.arrival(following, self.cache_tokens_needed)
        link_us = self.costs.half_round_trip_us(server.next_rtts_s.get(following.peer_id))
        return arrival._replace(network_us=link_us)


@dataclass(frozen=True, slots=True)
class RebuildPrices:
    """The time of all tokens that a session has yet to decode, after a server new to it was given the history."""

    decode: DecodePrices
    position: int
    """Tokens of history."""
    remaining_tokens: int

    def enter_us(self, server: ServerInfo) -> int:
        return self.decode.enter_us(server) * self.remaining_tokens + self.rebuild_us(server)

    def push_us(self, server: ServerInfo, following: ServerInfo) -> int:
        return self.decode.push_us(server, following) * self.remaining_tokens + self.rebuild_us(following)

    def leave_us(self, server: ServerInfo) -> int:
        return self.decode.leave_us(server) * self.remaining_tokens

    def block_us(self, server: ServerInfo) -> int:
        prefill_us = self.decode.costs.prefill_block_us(server, self.position)
        return self.decode.block_us(server) * self.remaining_tokens + prefill_us

    def rebuild_us(self, server: ServerInfo) -> int:
        """Opening a session and sending the history; running it is charged block by block."""
        costs = self.decode.costs
        one_way_us = costs.half_round_trip_us(self.decode.round_trips_s.get(server.peer_id))
        return 2 * costs.open_round_trips * one_way_us + costs.transfer_us(server, self.position)

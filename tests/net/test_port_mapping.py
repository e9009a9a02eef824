"""Having a router forward a port, with routers of all tempers."""

from random import Random

import pytest

from p2pswarm.net.nat.port_mapping import LEASE_S, MAX_TRIES, MappedPort, PortMapper


class Router:
    """What miniupnpc gives for one: raises bare exceptions."""

    lanaddr = "192.168.1.7"

    def __init__(self, *, taken: int = 0, knows_leases: bool = True, fails: bool = False) -> None:
        self.num_taken = taken
        self.knows_leases = knows_leases
        self.fails = fails
        self.mappings: dict[int, tuple[str, int, int]] = {}
        self.asked: list[int] = []

    def addportmapping(
        self, external: int, protocol: str, host: str, port: int, description: str, remote_host: str, lease_s: int
    ) -> bool:
        assert (protocol, remote_host) == ("TCP", "")
        if external not in self.asked:
            self.asked.append(external)
        if len(self.asked) <= self.num_taken:
            raise Exception("ConflictInMappingEntry")
        if lease_s and not self.knows_leases:
            raise Exception("OnlyPermanentLeasesSupported")
        self.mappings[external] = (host, port, lease_s)
        return True

    def deleteportmapping(self, external: int, protocol: str) -> bool:
        if self.fails:
            raise Exception("NoSuchEntryInArray")
        return self.mappings.pop(external) is not None


def mapper_for(router: Router) -> PortMapper:
    return PortMapper(Random(1), lambda: router)


async def test_the_same_port_is_mapped_for_a_time_and_taken_back():
    router = Router()
    mapper = mapper_for(router)
    assert await mapper.map(4001) == MappedPort(4001, 4001) == mapper.mapped
    assert router.mappings == {4001: ("192.168.1.7", 4001, LEASE_S)}
    await mapper.unmap()
    assert (router.mappings, mapper.mapped) == ({}, None)


async def test_a_taken_port_is_replaced_by_another_and_kept_when_renewed():
    router = Router(taken=2)
    mapper = mapper_for(router)
    mapped = await mapper.map(4001)
    assert mapped is not None
    assert mapped.internal == 4001
    assert mapped.external != 4001
    assert await mapper.map(4001) == mapped
    assert list(router.mappings) == [mapped.external]


async def test_a_router_that_refuses_every_port_maps_none():
    router = Router(taken=MAX_TRIES)
    assert await mapper_for(router).map(4001) is None
    assert len(router.asked) == MAX_TRIES


async def test_a_router_without_leases_maps_for_ever():
    router = Router(knows_leases=False)
    assert await mapper_for(router).map(4001) == MappedPort(4001, 4001)
    assert router.mappings == {4001: ("192.168.1.7", 4001, 0)}


async def test_without_a_router_there_is_no_mapping_and_nothing_to_take_back():
    def find() -> Router:
        raise Exception("No UPnP device discovered")

    mapper = PortMapper(Random(1), find)
    assert await mapper.map(4001) is None
    await mapper.unmap()


async def test_a_router_that_does_not_take_a_mapping_back_harms_nothing():
    mapper = mapper_for(Router(fails=True))
    await mapper.map(4001)
    await mapper.unmap()
    assert mapper.mapped is None


async def test_a_mapping_is_due_at_half_its_lease(autojump_clock):
    mapper = mapper_for(Router())
    assert not mapper.is_due
    mapper.mapped = MappedPort(4001, 4001)
    mapper.renew_at_s = 100.0
    assert not mapper.is_due
    autojump_clock.jump(LEASE_S / 2)
    assert mapper.is_due


@pytest.mark.parametrize("port", [1, 65535])
async def test_any_port_can_be_asked_for(port: int):
    assert await mapper_for(Router()).map(port) == MappedPort(port, port)

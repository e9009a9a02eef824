import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ConfigError
from p2pswarm.net.identity import Identity
from p2pswarm.net.private.invitation import PREFIX, Invitation, accept_invitations
from p2pswarm.net.private.swarm_key import SwarmKey

OWNER = Identity.generate(bytes(32))
KEY = SwarmKey(bytes(range(32)), OWNER.peer_id)
ADDRESS = f"/ip4/192.0.2.7/tcp/4001/p2p/{OWNER.peer_id}"
OTHER_ADDRESS = f"/ip6/2001:db8::1/tcp/4001/p2p/{OWNER.peer_id}"
INVITATION = Invitation(KEY, (ADDRESS, OTHER_ADDRESS))


def test_invitation_survives_being_written() -> None:
    text = str(INVITATION)
    assert Invitation.parse(text) == INVITATION
    assert Invitation.parse(f"  {text}\n") == INVITATION


def test_invitation_is_one_word_that_a_shell_leaves_alone() -> None:
    assert set(str(INVITATION).removeprefix(PREFIX)) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    )


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_damaged_invitation_is_refused_without_its_key_being_told(data: st.DataObject) -> None:
    text = str(INVITATION)
    at = data.draw(st.integers(len(PREFIX), len(text) - 1))
    letter = data.draw(st.sampled_from("AZaz09-_").filter(lambda letter: letter != text[at]))
    damaged = data.draw(st.sampled_from([text[:at], text[:at] + letter + text[at + 1 :]]))
    with pytest.raises(ConfigError) as raised:
        Invitation.parse(damaged)
    assert text[12:40] not in str(raised.value)


@given(st.text(max_size=60))
def test_what_is_no_invitation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Invitation.parse(PREFIX + text)


def test_invitation_to_an_address_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiaddr"):
        Invitation.parse(str(Invitation(KEY, ("nowhere",))))


def test_invitations_among_peers_give_their_addresses_and_key() -> None:
    assert accept_invitations([ADDRESS], None) == ((ADDRESS,), None)
    assert accept_invitations([ADDRESS], KEY) == ((ADDRESS,), KEY)
    assert accept_invitations([str(INVITATION)], None) == ((ADDRESS, OTHER_ADDRESS), KEY)
    assert accept_invitations([OTHER_ADDRESS, str(INVITATION)], KEY) == ((OTHER_ADDRESS, ADDRESS, OTHER_ADDRESS), KEY)


def test_invitation_to_another_swarm_than_the_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="one node is in one swarm"):
        accept_invitations([str(INVITATION)], SwarmKey.generate(OWNER))

"""Offences: a few are tolerated, more bar for a while, longer each time, and all is forgotten in the end."""

from p2pswarm.net.offences import MAX_REMEMBERED, Offences


def offences() -> Offences[str]:
    return Offences(tolerated=3, period_s=60.0, first_bar_s=10.0, longest_bar_s=25.0)


def test_a_few_offences_are_tolerated_and_one_more_bars() -> None:
    noted = offences()
    assert [noted.commit("eve", 0.0) for _ in range(4)] == [False, False, False, True]
    assert noted.is_barred("eve", 9.9)
    assert not noted.is_barred("eve", 10.0)
    assert not noted.is_barred("bob", 0.0)


def test_offences_far_between_are_forgotten() -> None:
    noted = offences()
    assert not any(noted.commit("eve", 30.0 * count) for count in range(100))


def test_a_grave_offence_bars_at_once() -> None:
    noted = offences()
    assert noted.commit("eve", 0.0, is_grave=True)
    assert noted.is_barred("eve", 5.0)


def test_bars_grow_to_the_longest_and_shrink_after_a_good_while() -> None:
    noted = offences()
    now_s, lengths_s = 0.0, []
    for _ in range(4):
        noted.commit("eve", now_s, is_grave=True)
        begun_at_s = now_s
        while noted.is_barred("eve", now_s):
            now_s += 1
        lengths_s.append(now_s - begun_at_s)
    assert lengths_s == [10, 20, 25, 25]
    now_s += 26
    noted.commit("eve", now_s, is_grave=True)
    assert not noted.is_barred("eve", now_s + 10)


def test_offences_while_barred_change_nothing() -> None:
    noted = offences()
    noted.commit("eve", 0.0, is_grave=True)
    assert not any(noted.commit("eve", 5.0, is_grave=True) for _ in range(10))
    assert not noted.is_barred("eve", 10.0)


def test_a_flood_of_offenders_takes_bounded_room() -> None:
    noted = offences()
    noted.commit("eve", 0.0, is_grave=True)
    for number in range(MAX_REMEMBERED):
        noted.commit(f"mallory-{number}", 0.0)
    assert len(noted._files) == MAX_REMEMBERED
    assert not noted.is_barred("eve", 0.0)

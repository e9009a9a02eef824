from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.checkpoint.disk_room import MIN_FREE_BYTES, CachedFile, DiskState, least_recently_used_first

GIB = 1 << 30


def cached(name: str, size_bytes: int, claimed_bytes: int | None = None, last_used_s: float = 0.0) -> CachedFile:
    return CachedFile(Path(name), size_bytes, size_bytes if claimed_bytes is None else claimed_bytes, last_used_s)


def test_without_a_limit_all_but_one_gib_of_the_disk_may_be_used() -> None:
    files = [cached("a", 5 * GIB)]

    assert DiskState(files, free_bytes=GIB, max_bytes=None).excess_bytes() == 0
    assert DiskState(files, free_bytes=GIB - 7, max_bytes=None).excess_bytes() == 7


def test_a_limit_counts_what_files_will_take_when_they_are_whole() -> None:
    files = [cached("a", 5 * GIB), cached("b", 0, claimed_bytes=3 * GIB)]

    assert DiskState(files, free_bytes=100 * GIB, max_bytes=8 * GIB).excess_bytes() == 0
    assert DiskState(files, free_bytes=100 * GIB, max_bytes=7 * GIB).excess_bytes() == GIB


def test_what_others_are_about_to_write_is_not_free() -> None:
    files = [cached("theirs", GIB, claimed_bytes=4 * GIB), cached("ours", 0, claimed_bytes=2 * GIB)]

    assert DiskState(files, free_bytes=6 * GIB, max_bytes=None).excess_bytes() == 0
    assert DiskState(files, free_bytes=5 * GIB, max_bytes=None).excess_bytes() == GIB


def test_files_needed_together_must_fit_together() -> None:
    files = [cached("a", 2 * GIB), cached("other", 3 * GIB)]
    wanted = [(Path("a"), 2 * GIB), (Path("b"), 2 * GIB)]

    assert DiskState(files, free_bytes=50 * GIB, max_bytes=4 * GIB).lacking_bytes(wanted) == 0
    assert DiskState(files, free_bytes=50 * GIB, max_bytes=3 * GIB).lacking_bytes(wanted) == GIB
    assert DiskState(files, free_bytes=GIB, max_bytes=None).lacking_bytes(wanted) == 0  # when `other` goes
    assert DiskState(files[:1], free_bytes=GIB, max_bytes=None).lacking_bytes(wanted) == 2 * GIB


def test_the_least_recently_used_goes_first() -> None:
    files = [cached("a", 1, last_used_s=3.0), cached("b", 1, last_used_s=1.0), cached("c", 1, last_used_s=2.0)]

    assert [file.path.name for file in least_recently_used_first(files)] == ["b", "c", "a"]


sizes = st.integers(0, 10 * GIB)
files_of_all_kinds = st.lists(
    st.tuples(sizes, sizes).map(lambda pair: cached("x", min(pair), claimed_bytes=max(pair))), max_size=8
)


@given(files=files_of_all_kinds, free_bytes=sizes, max_bytes=st.none() | sizes)
@settings(deadline=None)
def test_once_the_excess_is_gone_the_limits_hold(
    files: list[CachedFile], free_bytes: int, max_bytes: int | None
) -> None:
    state = DiskState(files, free_bytes, max_bytes)
    left_to_go = state.excess_bytes()
    kept = []
    freed_bytes = 0
    for file in files:
        if left_to_go > 0:
            left_to_go -= file.claimed_bytes
            freed_bytes += file.size_bytes
        else:
            kept.append(file)

    after = DiskState(kept, free_bytes + freed_bytes, max_bytes)

    if left_to_go <= 0:
        assert after.excess_bytes() == 0
        assert after.unclaimed_bytes >= 0 or not files
        assert max_bytes is None or after.claimed_bytes <= max_bytes
        outstanding_bytes = sum(file.claimed_bytes - file.size_bytes for file in kept)
        assert after.free_bytes - outstanding_bytes >= MIN_FREE_BYTES

"""Two `WeightCache`s over one folder stand for two processes: a lock is of an open file, not of a process."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from p2pswarm.checkpoint.disk_room import MIN_FREE_BYTES
from p2pswarm.checkpoint.progress import Progress, Work
from p2pswarm.checkpoint.weight_cache import Fill, WeightCache
from p2pswarm.core.errors import ConfigError

PLENTY = 100 * MIN_FREE_BYTES


def filled(size_bytes: int) -> Fill:
    def fill(file: BinaryIO) -> None:
        file.write(b"x" * (size_bytes - file.tell()))

    return fill


def put(cache: WeightCache, name: str, size_bytes: int = 100, used_at_s: float | None = None) -> Path:
    path = cache.add(f"m/{name}.safetensors", size_bytes, filled(size_bytes))
    if used_at_s is not None:
        os.utime(path, (used_at_s, used_at_s))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*.safetensors"))


def test_a_file_is_made_once_and_then_found(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    assert cache.find("m/a.safetensors") is None

    path = put(cache, "a")

    def fail(file: BinaryIO) -> None:
        raise AssertionError("made again")

    assert WeightCache(tmp_path).find("m/a.safetensors") == path
    assert WeightCache(tmp_path).add("m/a.safetensors", 100, fail) == path
    assert path.read_bytes() == b"x" * 100


def test_the_least_recently_used_goes_first_when_the_limit_is_reached(tmp_path: Path) -> None:
    before = WeightCache(tmp_path)
    for name, used_at_s in (("a", 1000.0), ("b", 3000.0), ("c", 2000.0)):
        put(before, name, used_at_s=used_at_s)
    before.release()

    put(WeightCache(tmp_path, max_bytes=300), "d")
    assert names(tmp_path) == ["b", "c", "d"]


def test_finding_a_file_is_using_it(tmp_path: Path) -> None:
    before = WeightCache(tmp_path)
    put(before, "a", used_at_s=1000.0)
    put(before, "b", used_at_s=2000.0)
    before.find("m/a.safetensors")
    before.release()

    put(WeightCache(tmp_path, max_bytes=200), "c")
    assert names(tmp_path) == ["a", "c"]


def test_what_another_process_holds_never_goes(tmp_path: Path) -> None:
    server, other = WeightCache(tmp_path), WeightCache(tmp_path, max_bytes=200)
    put(server, "a", used_at_s=1000.0)

    put(other, "b", used_at_s=2000.0)
    other.release()
    put(other, "c")

    assert names(tmp_path) == ["a", "c"]


def test_nothing_goes_when_that_would_not_be_enough(tmp_path: Path) -> None:
    server = WeightCache(tmp_path)
    put(server, "used", 300)
    idle = WeightCache(tmp_path)
    put(idle, "idle", 100)
    idle.release()

    with pytest.raises(ConfigError, match=r"no room for 200 B of weights .* a limit of 400 B, 400 B are there"):
        put(WeightCache(tmp_path, max_bytes=400), "new", 200)

    assert names(tmp_path) == ["idle", "used"]
    assert not list(tmp_path.rglob("*.partial"))


def test_released_files_may_go(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, max_bytes=100)
    put(cache, "a")
    cache.release()

    put(cache, "b")

    assert names(tmp_path) == ["b"]


def test_a_cache_that_is_forgotten_holds_nothing(tmp_path: Path) -> None:
    put(WeightCache(tmp_path), "a")

    put(WeightCache(tmp_path, max_bytes=100), "b")

    assert names(tmp_path) == ["b"]


def test_the_last_gib_of_the_disk_stays_free(tmp_path: Path) -> None:
    before = WeightCache(tmp_path)
    put(before, "a")
    before.release()
    free_bytes = MIN_FREE_BYTES

    cache = WeightCache(tmp_path, free_bytes=lambda folder: free_bytes)
    put(cache, "b")
    assert names(tmp_path) == ["b"]

    free_bytes -= 1
    with pytest.raises(ConfigError, match=r"has no limit.*the disk has 1024 MiB free, of which 1.0 GiB stay free"):
        put(cache, "c")


def test_what_is_needed_together_is_refused_before_any_of_it_is_made(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, max_bytes=250)
    put(cache, "a")

    cache.require_room({"m/a.safetensors": 100, "m/b.safetensors": 100})
    with pytest.raises(ConfigError, match="no room for 300 B"):
        cache.require_room({"m/a.safetensors": 100, "m/b.safetensors": 100, "m/c.safetensors": 100})


def test_what_a_failed_attempt_wrote_is_where_the_next_one_goes_on(tmp_path: Path) -> None:
    def fail_half_way(file: BinaryIO) -> None:
        file.write(b"y" * 60)
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        WeightCache(tmp_path).add("m/a.safetensors", 100, fail_half_way)
    assert WeightCache(tmp_path).find("m/a.safetensors") is None

    path = put(WeightCache(tmp_path), "a")

    assert path.read_bytes() == b"y" * 60 + b"x" * 40


def test_an_abandoned_half_goes_like_any_other_file(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"y" * 60)
        raise ConnectionError("cut")

    with pytest.raises(ConnectionError):
        WeightCache(tmp_path).add("m/a.safetensors", 100, fail)

    put(WeightCache(tmp_path, max_bytes=100), "b")

    assert [path.name for path in (tmp_path / "m").iterdir()] == ["b.safetensors"]


def test_a_disk_that_fills_up_is_told_with_what_can_be_done(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match=r"no room for .*free some of the disk, or move the cache \(--cache-dir or"):
        WeightCache(tmp_path).add("m/a.safetensors", 100, fill)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(ConfigError, match=r"cannot use the cache .*/file: .*set P2PSWARM_CACHE or --cache-dir"):
        WeightCache(tmp_path / "file").add("m/a.safetensors", 100, filled(100))


def test_a_folder_emptied_by_hand_is_filled_again(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    put(cache, "a").unlink()

    assert cache.find("m/a.safetensors") is None
    assert put(cache, "a").exists()


def test_damaged_files_are_removed(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    put(cache, "a")

    cache.remove("m/a.safetensors")

    assert cache.find("m/a.safetensors") is None
    assert names(tmp_path) == []


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_of_two_that_need_the_same_file_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def fill_slowly(file: BinaryIO) -> None:
        begun.set()
        assert may_end.wait(10)
        file.write(b"first")

    told: list[Progress] = []

    def hear(progress: Progress) -> None:
        told.append(progress)
        may_end.set()

    first = WeightCache(tmp_path)
    maker = in_thread(lambda: first.add("m/a.safetensors", 5, fill_slowly))
    assert begun.wait(10)

    path = WeightCache(tmp_path, listener=hear).add("m/a.safetensors", 5, lambda file: None)

    maker.join()
    assert path.read_bytes() == b"first"
    assert told == [Progress(Work.WAITING, "m/a.safetensors", 0, 5)]


def test_who_waits_goes_on_where_the_other_failed(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def fail_slowly(file: BinaryIO) -> None:
        begun.set()
        assert may_end.wait(10)
        file.write(b"half")
        raise ConnectionError("cut")

    def try_and_fail() -> None:
        with pytest.raises(ConnectionError):
            WeightCache(tmp_path).add("m/a.safetensors", 8, fail_slowly)

    maker = in_thread(try_and_fail)
    assert begun.wait(10)

    waiting = WeightCache(tmp_path, listener=lambda progress: may_end.set())
    path = waiting.add("m/a.safetensors", 8, filled(8))

    maker.join()
    assert path.read_bytes() == b"halfxxxx"


def test_two_at_once_do_not_promise_themselves_the_same_room(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def fill_slowly(file: BinaryIO) -> None:
        begun.set()
        assert may_end.wait(10)
        file.write(b"x" * 80)

    first = WeightCache(tmp_path, max_bytes=100)
    maker = in_thread(lambda: first.add("m/a.safetensors", 80, fill_slowly))
    assert begun.wait(10)

    with pytest.raises(ConfigError, match="no room for 30 B"):
        put(WeightCache(tmp_path, max_bytes=100), "b", 30)

    may_end.set()
    maker.join()
    assert names(tmp_path) == ["a"]

"""Who broke the rules lately, and is refused for a while: longer each time, and forgotten after a good while. Pure.

Only an opinion of this node; it is never told to others. Few offences are tolerated, since not each is somebody's
fault: a handshake fails when a client has found a better address meanwhile.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_REMEMBERED = 4096

Offender = TypeVar("Offender")


@dataclass(slots=True)
class _File:
    level: float
    """Offences not forgotten yet."""
    noted_at_s: float
    barred_until_s: float
    num_bars: int


class Offences(Generic[Offender]):
    """Peers or addresses by what they did; the times are the caller's."""

    def __init__(self, *, tolerated: int, period_s: float, first_bar_s: float, longest_bar_s: float) -> None:
        """More than `tolerated` in `period_s`, or somewhat more in longer: barred."""
        self._tolerated = tolerated
        self._period_s = period_s
        self._first_bar_s = first_bar_s
        self._longest_bar_s = longest_bar_s
        self._files: OrderedDict[Offender, _File] = OrderedDict()

    def commit(self, offender: Offender, now_s: float, *, is_grave: bool = False) -> bool:
        """Notes an offence, or one that is not tolerated even once; whether the offender is barred from now on."""
        file = self._files.setdefault(offender, _File(0.0, now_s, now_s, 0))
        self._files.move_to_end(offender)
        if len(self._files) > MAX_REMEMBERED:
            self._files.popitem(last=False)
        if now_s < file.barred_until_s:
            return False
        if now_s - file.barred_until_s > self._longest_bar_s:
            file.num_bars = 0
        leaked = (now_s - file.noted_at_s) * self._tolerated / self._period_s
        file.level = max(0.0, file.level - leaked) + 1
        file.noted_at_s = now_s
        if file.level <= self._tolerated and not is_grave:
            return False
        file.level = 0.0
        file.barred_until_s = now_s + min(self._longest_bar_s, self._first_bar_s * 2.0**file.num_bars)
        file.num_bars = min(file.num_bars + 1, 30)
        return True

    def is_barred(self, offender: Offender, now_s: float) -> bool:
        file = self._files.get(offender)
        return file is not None and now_s < file.barred_until_s

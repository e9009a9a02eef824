"""What runs next on a device: decode steps together, nobody left waiting for ever, and time shared as promised."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pswarm.core.errors import ServerBusy
from p2pswarm.core.ids import PeerId
from swarmd.scheduling.costs import BACKWARD_COST, FIRST_PASS_TOKENS, MAX_PART_TOKENS, MIN_PART_TOKENS, CostModel
from swarmd.scheduling.fairness import TIME_CONSTANT_S, Service
from swarmd.scheduling.scheduler import (
    DECODING_S,
    FORWARD_SHARE_WHILE_DECODING,
    LONG_PART_S,
    MAX_FORWARDS_PER_PEER,
    QUIET_STAGE_STEPS,
    SHARED_GATHER_GAP_STEPS,
    SHARED_GROUPS,
    STALL_STEPS,
    Scheduler,
)
from swarmd.scheduling.work import Kind, Part, Work

STEP_S, ROW_S, TOKEN_S = 0.014, 0.001, 0.0008
"""Ten blocks of SmolLM2 on one thread of an old machine."""
STAGE_TOKEN_S = BACKWARD_COST * TOKEN_S
"""Of a backward pass, for as many stages as there are blocks."""
NUM_BLOCKS, NUM_STAGES = 10, 25
"""Half of the blocks keep notes."""
ALICE, BOB = PeerId("alice"), PeerId("bob")


@dataclass
class Machine:
    """A device with fixed costs, driven by the scheduler."""

    scheduler: Scheduler = field(default_factory=lambda: Scheduler(CostModel(STEP_S, ROW_S, TOKEN_S)))
    now_s: float = 100.0
    parts: list[tuple[float, Part, float]] = field(default_factory=list)
    """When each began, and how long it took."""

    def add(self, kind: Kind, peer_id: PeerId = ALICE, rows: int = 1, tokens: int = 1, **more: object) -> Work:
        key = "key" if kind is Kind.DECODE else None
        work = Work(kind, peer_id, rows, tokens, self.now_s, **{"batch_key": key, **more})  # type: ignore[arg-type]
        self.scheduler.add(work)
        return work

    def took_s(self, part: Part) -> float:
        if part.kind is Kind.DECODE:
            return STEP_S + ROW_S * (part.num_rows - 1)
        if part.kind is Kind.BACKWARD:
            return STAGE_TOKEN_S * part.num_token_passes
        return STEP_S + TOKEN_S * part.num_rows * part.num_tokens

    def run_one(self, until_s: float = math.inf) -> Part | None:
        """The next part, run; None after a wait for one, `until_s` at most, or where nothing waits."""
        part = self.scheduler.next(self.now_s)
        if part is None:
            wake_at_s = min(self.scheduler.wake_at_s, until_s)
            if wake_at_s < math.inf:
                self.now_s = max(self.now_s, wake_at_s)
            return None
        took_s = self.took_s(part)
        self.parts.append((self.now_s, part, took_s))
        self.now_s += took_s
        self.scheduler.note(part, took_s, self.now_s)
        return part

    def run_all(self, max_parts: int = 10_000) -> Iterator[Part]:
        for _ in range(max_parts):
            part = self.run_one()
            if part is not None:
                yield part
            elif self.scheduler.wake_at_s == math.inf:
                return
        pytest.fail("work is left for ever")

    def decode_for(self, seconds: float, sessions: int, think_s: float = 0.0) -> list[float]:
        """Sessions take one step after the other, beside what else waits; how long each step took them, waiting
        included."""
        took_s: list[float] = []
        next_at_s = dict.fromkeys(range(sessions), self.now_s)
        asked: dict[Work, int] = {}
        ends_s = self.now_s + seconds
        while self.now_s < ends_s:
            for session, at_s in list(next_at_s.items()):
                if at_s <= self.now_s:
                    del next_at_s[session]
                    work = Work(Kind.DECODE, PeerId(f"decoder {session}"), 1, 1, at_s, session, "key")
                    self.scheduler.add(work)
                    asked[work] = session
            part = self.run_one(min(next_at_s.values(), default=math.inf))
            for work in part.works if part is not None else ():
                if work in asked:
                    took_s.append(self.now_s - work.arrived_s)
                    next_at_s[asked.pop(work)] = self.now_s + think_s
        return took_s


def test_steps_of_all_sessions_run_as_one_batch() -> None:
    machine = Machine()
    works = [
        machine.add(Kind.DECODE, PeerId(f"peer {number}"), rows=1 + number % 3, session=number) for number in range(8)
    ]
    part = machine.run_one()
    assert part is not None
    assert set(part.works) == set(works)
    assert part.num_rows == sum(work.num_rows for work in works)
    assert all(work.is_done for work in works)


def test_steps_through_other_blocks_run_apart_and_those_without_a_key_alone() -> None:
    machine = Machine()
    for number, key in enumerate(["a", "b", "a", None, "b", None]):
        machine.add(Kind.DECODE, session=number, batch_key=key)
    assert sorted(len(part.works) for part in machine.run_all()) == [1, 1, 2, 2]


def test_the_only_session_never_waits_for_others() -> None:
    machine = Machine()
    for _ in range(3):
        machine.add(Kind.DECODE, session=1)
        assert machine.run_one() is not None
        machine.now_s += 0.05


def test_a_step_is_held_for_a_moment_while_others_decode() -> None:
    machine = Machine()
    for session in range(3):
        machine.add(Kind.DECODE, session=session)
    machine.run_one()
    machine.now_s += 0.05
    machine.add(Kind.DECODE, session=0)
    assert machine.scheduler.next(machine.now_s) is None
    assert 0 < machine.scheduler.wake_at_s - machine.now_s < 0.2 * STEP_S
    machine.add(Kind.DECODE, session=1)
    machine.add(Kind.DECODE, session=2)
    part = machine.scheduler.next(machine.now_s)
    assert part is not None
    assert len(part.works) == 3


def shared_machine(sessions: int) -> Machine:
    """One whose time others use, on which so many sessions have decoded just now."""
    machine = Machine(Scheduler(CostModel(STEP_S, ROW_S, TOKEN_S), is_shared=lambda now_s: True))
    for session in range(sessions):
        machine.add(Kind.DECODE, session=session)
    for _ in range(SHARED_GROUPS):
        machine.run_one()
    return machine


def test_a_step_is_held_longer_where_others_use_the_time() -> None:
    machine = shared_machine(6)
    machine.add(Kind.DECODE, session=0)
    assert machine.scheduler.next(machine.now_s) is None
    assert machine.scheduler.wake_at_s - machine.now_s == pytest.approx(SHARED_GATHER_GAP_STEPS * STEP_S)
    machine.now_s += 0.9 * SHARED_GATHER_GAP_STEPS * STEP_S
    machine.add(Kind.DECODE, session=1)
    assert machine.scheduler.next(machine.now_s) is None
    machine.now_s += 1.1 * SHARED_GATHER_GAP_STEPS * STEP_S
    part = machine.scheduler.next(machine.now_s)
    assert part is not None
    assert len(part.works) == 2


def test_where_others_use_the_time_each_half_of_the_sessions_is_a_batch() -> None:
    machine = shared_machine(6)
    assert [len(part.works) for _, part, _ in machine.parts] == [3, 3]
    for session in (4, 0, 2):
        assert machine.scheduler.next(machine.now_s) is None
        machine.add(Kind.DECODE, session=session)
    part = machine.scheduler.next(machine.now_s)
    assert part is not None
    assert len(part.works) == 3


def test_a_prompt_goes_whole_where_only_its_own_session_or_one_that_is_over_has_decoded() -> None:
    machine = Machine()
    for session in (1, 2):
        machine.add(Kind.DECODE, session=session)
    machine.run_one()
    machine.scheduler.forget_session(2)
    machine.add(Kind.PREFILL, tokens=400, session=1)
    part = machine.run_one()
    assert part is not None
    assert part.num_tokens == 400


def test_who_does_not_come_is_not_waited_for() -> None:
    machine = Machine()
    for session in range(2):
        machine.add(Kind.DECODE, session=session)
    machine.run_one()
    began_s = machine.now_s
    machine.add(Kind.DECODE, session=0)
    assert len(list(machine.run_all())) == 1
    assert machine.now_s - began_s <= 1.4 * STEP_S + 1e-9
    machine.now_s += DECODING_S
    machine.add(Kind.DECODE, session=0)
    assert machine.run_one() is not None


def test_rows_that_cost_too_much_are_not_all_decoded_at_once() -> None:
    machine = Machine(Scheduler(CostModel(STEP_S, STEP_S, TOKEN_S)))
    for session in range(20):
        machine.add(Kind.DECODE, PeerId(f"peer {session}"), session=session)
    part = machine.run_one()
    assert part is not None
    assert part.num_rows == 8


def test_a_prompt_runs_in_long_parts_while_nobody_decodes() -> None:
    machine = Machine()
    machine.add(Kind.PREFILL, tokens=2000)
    sizes = [part.num_tokens for part in machine.run_all()]
    assert sum(sizes) == 2000
    assert max(sizes) - min(sizes) <= 1 + 2000 % len(sizes)
    assert all(took_s <= LONG_PART_S for _, _, took_s in machine.parts)
    assert len(sizes) <= 1.2 * 2000 * TOKEN_S / LONG_PART_S + 1


def test_a_prompt_does_not_stall_those_who_decode() -> None:
    quiet_s = Machine().decode_for(2.0, sessions=1, think_s=0.03)
    machine = Machine()
    machine.decode_for(0.5, sessions=1, think_s=0.03)
    prompt = machine.add(Kind.PREFILL, BOB, tokens=2000)
    stalled_s = machine.decode_for(12.0, sessions=1, think_s=0.03)
    assert max(stalled_s[1:]) <= (1 + STALL_STEPS[Kind.PREFILL]) * max(quiet_s) * 1.05
    assert prompt.is_done


def test_a_prompt_goes_on_however_many_decode() -> None:
    machine = Machine()
    machine.decode_for(0.5, sessions=16)
    prompt = machine.add(Kind.PREFILL, BOB, tokens=500)
    began_s = machine.now_s
    while not prompt.is_done:
        machine.decode_for(0.1, sessions=16)
        assert machine.now_s - began_s < 6 * (500 * TOKEN_S + 20 * STEP_S)


def test_forward_passes_leave_time_for_decoding() -> None:
    quiet_s = Machine().decode_for(3.0, sessions=1, think_s=0.03)
    machine = Machine()
    machine.decode_for(0.5, sessions=1, think_s=0.03)
    before = len(machine.parts)
    for _ in range(MAX_FORWARDS_PER_PEER):
        machine.add(Kind.FORWARD, BOB, rows=8, tokens=256)
    busy_s = machine.decode_for(3.0, sessions=1, think_s=0.03)
    forward_s = sum(took_s for _, part, took_s in machine.parts[before:] if part.kind is Kind.FORWARD)
    assert 0.5 * FORWARD_SHARE_WHILE_DECODING < forward_s / 3.0 <= FORWARD_SHARE_WHILE_DECODING * 1.05
    assert len(busy_s) > 0.75 * len(quiet_s)


def test_forward_passes_run_in_whole_rows_or_pieces_of_one_row() -> None:
    machine = Machine()
    work = machine.add(Kind.FORWARD, rows=7, tokens=100)
    parts = [(part.num_rows, part.num_tokens) for part in machine.run_all()]
    assert work.is_done
    assert sum(rows for rows, _ in parts) == 7
    assert {tokens for _, tokens in parts} == {100}
    machine = Machine()
    machine.add(Kind.FORWARD, rows=2, tokens=1000)
    parts = [(part.num_rows, part.num_tokens) for part in machine.run_all()]
    assert {rows for rows, _ in parts} == {1}
    assert sum(tokens for _, tokens in parts) == 2000


def backward(machine: Machine, peer_id: PeerId = BOB, rows: int = 8, tokens: int = 128, **more: object) -> Work:
    stages = {"num_stages": NUM_STAGES, "stage_passes": 1 / NUM_BLOCKS}
    return machine.add(Kind.BACKWARD, peer_id, rows, tokens, **{**stages, **more})


def test_backward_passes_leave_more_than_half_of_the_speed_to_those_who_decode() -> None:
    quiet_s = Machine().decode_for(3.0, sessions=1, think_s=0.03)
    machine = Machine()
    machine.decode_for(0.5, sessions=1, think_s=0.03)
    before = len(machine.parts)
    for number in range(MAX_FORWARDS_PER_PEER):
        machine.add(Kind.FORWARD, BOB, rows=8, tokens=128) if number % 2 else backward(machine)
    busy_s = machine.decode_for(3.0, sessions=1, think_s=0.03)
    trained_s = [took_s for _, part, took_s in machine.parts[before:] if part.kind.queue is Kind.FORWARD]
    assert any(part.kind is Kind.BACKWARD for _, part, _ in machine.parts[before:])
    assert 0.5 * FORWARD_SHARE_WHILE_DECODING < sum(trained_s) / 3.0 <= FORWARD_SHARE_WHILE_DECODING * 1.05
    assert max(trained_s) <= 1.05 * STALL_STEPS[Kind.FORWARD] * STEP_S
    assert len(busy_s) > 0.75 * len(quiet_s)


def test_rows_whose_gradients_have_begun_are_finished_before_others_of_any_peer_begin() -> None:
    machine = Machine()
    works = [backward(machine, PeerId(f"peer {number}"), max_rows=3) for number in range(3)]
    forward = machine.add(Kind.FORWARD, ALICE, rows=8, tokens=128)
    under_way: Counter[int] = Counter()
    for _ in machine.run_all():
        begun = [work for work in works if work.rows_begun]
        under_way[len(begun)] += 1
        assert all(work.rows_begun <= 3 for work in begun)
    assert under_way.keys() == {0, 1}
    assert forward.is_done
    assert all(work.is_done for work in works)


def test_one_stage_of_rows_never_takes_long_though_nobody_decodes_when_they_begin() -> None:
    machine = Machine()
    work = backward(machine, rows=256, tokens=32)
    machine.run_one()
    machine.decode_for(0.1, sessions=1)
    before = len(machine.parts)
    machine.decode_for(12.0, sessions=1)
    trained_s = [took_s for _, part, took_s in machine.parts[before:] if part.kind is Kind.BACKWARD]
    assert trained_s
    assert max(trained_s) <= 1.05 * QUIET_STAGE_STEPS * STEP_S
    assert max(trained_s[-10:]) <= 1.05 * STALL_STEPS[Kind.BACKWARD] * STEP_S
    assert not work.is_done


def test_rows_go_back_together_where_nobody_ever_decoded() -> None:
    machine = Machine(Scheduler(CostModel()))
    for _ in range(2):
        backward(machine, rows=16, tokens=8)
    assert {part.num_rows for part in machine.run_all()} == {16}


def test_what_a_stage_of_a_backward_pass_costs_is_little_more_than_forward_until_it_is_measured() -> None:
    costs = CostModel(STEP_S, ROW_S, TOKEN_S)
    assert costs.token_s[Kind.BACKWARD] == pytest.approx(STAGE_TOKEN_S)
    for _ in range(40):
        costs.note_part(Kind.BACKWARD, 7.5, 7.5 * 5 * TOKEN_S)
    assert costs.token_s[Kind.BACKWARD] == pytest.approx(5 * TOKEN_S, rel=0.01)
    assert costs.tokens_within(Kind.BACKWARD, 1.0) == int(1.0 / (5 * TOKEN_S))


@pytest.mark.parametrize("num_stages", [29, 20, 2])
def test_what_a_stage_costs_is_learnt_alike_from_passes_of_many_stages_and_of_few(num_stages: int) -> None:
    machine = Machine(Scheduler(CostModel()))
    works = [backward(machine, num_stages=num_stages) for _ in range(4)]
    assert all(part.kind is Kind.BACKWARD for part in machine.run_all())
    assert all(work.is_done for work in works)
    assert machine.scheduler.costs.token_s[Kind.BACKWARD] == pytest.approx(STAGE_TOKEN_S)


def test_reading_the_weights_costs_as_much_as_some_tokens() -> None:
    assert CostModel().pass_tokens == FIRST_PASS_TOKENS
    assert CostModel(STEP_S, ROW_S, TOKEN_S).pass_tokens == STEP_S / TOKEN_S


def test_tokens_of_a_backward_pass_are_counted_once() -> None:
    machine = Machine()
    backward(machine, rows=5, tokens=100)
    num_tokens = 0
    while (part := machine.scheduler.next(machine.now_s)) is not None:
        num_tokens += part.num_finished_tokens
        machine.scheduler.note(part, 0.01, machine.now_s)
    assert num_tokens == 500


def test_a_peer_with_many_prompts_does_not_keep_another_from_its_first() -> None:
    machine = Machine()
    for _ in range(10):
        machine.add(Kind.PREFILL, BOB, tokens=1000)
    for _ in range(3):
        machine.run_one()
    prompt = machine.add(Kind.PREFILL, ALICE, tokens=300)
    began_s = machine.now_s
    for _ in machine.run_all():
        if prompt.is_done:
            break
    assert machine.now_s - began_s < 3 * LONG_PART_S


def test_peers_who_want_all_of_it_get_equal_parts() -> None:
    machine = Machine()
    for peer_id in (ALICE, BOB):
        for _ in range(4 if peer_id is BOB else 8):
            machine.add(Kind.FORWARD, peer_id, rows=16, tokens=100)
    served_s: Counter[PeerId] = Counter()
    for _ in range(20):
        machine.run_one()
    for _, part, took_s in machine.parts:
        served_s[part.works[0].peer_id] += took_s
    assert served_s[ALICE] == pytest.approx(served_s[BOB], rel=0.2)


def test_a_full_queue_sends_requests_elsewhere() -> None:
    machine = Machine(Scheduler(CostModel(), max_waiting=3))
    for _ in range(3):
        work = machine.add(Kind.DECODE)
    with pytest.raises(ServerBusy, match="3 requests are waiting"):
        machine.add(Kind.DECODE)
    machine.scheduler.remove(work)
    machine.add(Kind.DECODE)


def test_one_peer_cannot_fill_the_queue_with_forward_passes() -> None:
    machine = Machine()
    for _ in range(MAX_FORWARDS_PER_PEER):
        machine.add(Kind.FORWARD, BOB)
    with pytest.raises(ServerBusy, match="8 forward or backward passes of one peer wait already"):
        machine.add(Kind.FORWARD, BOB)
    machine.add(Kind.FORWARD, ALICE)


def test_forward_and_backward_passes_of_a_peer_count_together() -> None:
    machine = Machine()
    for number in range(MAX_FORWARDS_PER_PEER):
        machine.add(Kind.FORWARD if number % 2 else Kind.BACKWARD, BOB)
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        with pytest.raises(ServerBusy, match="wait already"):
            machine.add(kind, BOB)
    machine.add(Kind.BACKWARD, ALICE)


def test_work_given_up_while_it_runs_does_not_come_back() -> None:
    machine = Machine()
    work = machine.add(Kind.PREFILL, tokens=2000)
    part = machine.scheduler.next(machine.now_s)
    assert part is not None
    machine.scheduler.remove(work)
    machine.scheduler.note(part, 0.1, machine.now_s)
    assert machine.scheduler.num_waiting == 0


@dataclass(frozen=True)
class Asked:
    """A request as hypothesis draws it."""

    kind: Kind
    peer: int
    rows: int
    tokens: int
    key: str | None
    after_s: float
    stages: int
    max_rows: int | None


requests = st.builds(
    Asked,
    kind=st.sampled_from(Kind),
    peer=st.integers(0, 3),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 3000),
    key=st.sampled_from(["a", "b", None]),
    after_s=st.floats(0, 2) | st.just(0.0),
    stages=st.integers(1, 30),
    max_rows=st.none() | st.integers(1, 3),
)


@given(st.lists(requests, min_size=1, max_size=40))
@settings(deadline=None, max_examples=150)
def test_all_work_is_done_once_and_the_device_never_idles_without_reason(asked: list[Asked]) -> None:
    machine = Machine()
    forwards: Counter[int] = Counter()
    works: list[Work] = []
    ran: Counter[Work] = Counter()
    pending = list(asked)
    for _ in range(20_000):
        while pending and (not works or 100.0 + pending[0].after_s <= machine.now_s):
            request = pending.pop(0)
            is_training = request.kind.queue is Kind.FORWARD
            forwards[request.peer] += is_training
            if forwards[request.peer] > MAX_FORWARDS_PER_PEER and is_training:
                continue
            is_decode = request.kind is Kind.DECODE
            works.append(
                machine.add(
                    request.kind,
                    PeerId(f"peer {request.peer}"),
                    request.rows,
                    1 if is_decode else request.tokens,
                    session=len(works),
                    batch_key=request.key if is_decode else None,
                    num_stages=request.stages if request.kind is Kind.BACKWARD else 1,
                    max_rows=request.max_rows,
                )
            )
        began_s = machine.now_s
        part = machine.run_one()
        if part is None and machine.scheduler.wake_at_s == math.inf:
            assert machine.scheduler.num_waiting == 0
            if not pending:
                break
            machine.now_s = max(machine.now_s, 100.0 + pending[0].after_s)
        elif part is None:
            assert machine.now_s - began_s <= DECODING_S
        else:
            assert (
                part.kind in (Kind.DECODE, Kind.BACKWARD)
                or part.num_rows * part.num_tokens <= MAX_PART_TOKENS
                or part.num_tokens == 1
            )
            for work in part.works:
                num_rows = work.num_rows if work.kind is Kind.DECODE else part.num_rows
                ran[work] += num_rows * part.num_tokens * part.num_stages
    else:
        pytest.fail("work is left for ever")
    assert all(work.is_done for work in works)
    assert {work: work.num_rows * work.num_tokens * work.num_stages for work in works} == dict(ran)


@given(
    st.floats(1e-4, 0.1), st.floats(0, 1), st.floats(1e-6, 1e-2), st.lists(st.integers(1, 64), min_size=60, max_size=90)
)
@settings(deadline=None)
def test_costs_are_learnt_from_what_runs(step_s: float, row_share: float, token_s: float, batches: list[int]) -> None:
    row_s = row_share * step_s / 10
    costs = CostModel()
    for num_rows in itertools.chain(batches, [1] * 40):
        costs.note_decode(num_rows, step_s + row_s * (num_rows - 1))
        costs.note_part(Kind.PREFILL, 64, step_s + 64 * token_s)
    assert costs.step_s == pytest.approx(step_s, rel=0.05)
    budget_s = 10 * step_s
    num_tokens = costs.tokens_within(Kind.PREFILL, budget_s)
    assert num_tokens <= MIN_PART_TOKENS or num_tokens * costs.token_s[Kind.PREFILL] <= budget_s * 1.01


def test_a_batch_says_what_its_rows_cost() -> None:
    costs = CostModel(STEP_S)
    for _ in range(40):
        costs.note_decode(16, STEP_S + 15 * ROW_S)
        costs.note_decode(1, STEP_S)
    assert costs.decode_s(16) == pytest.approx(STEP_S + 15 * ROW_S, rel=0.02)
    assert costs.rows_within(STEP_S + 20 * ROW_S) == pytest.approx(21, abs=1)


def test_service_fades() -> None:
    service = Service()
    service.note(ALICE, 2.0, now_s=0.0)
    service.note(BOB, 1.0, now_s=0.0)
    service.note(ALICE, 1.0, now_s=TIME_CONSTANT_S)
    assert service.used_s(ALICE, TIME_CONSTANT_S) == pytest.approx(1 + 2 / math.e)
    assert service.by_peer(2 * TIME_CONSTANT_S)[BOB] == pytest.approx(math.e**-2)
    for number in range(5000):
        service.note(PeerId(f"peer {number}"), 1e-4, now_s=100.0)
    assert len(service.by_peer(100.0)) < 2000

"""Retries: within the budget, at the provider's pace, never in vain, and without a key."""

from __future__ import annotations

import asyncio
import gc
import math
import time
import traceback
import weakref

import pytest

from refimg.adapters import retry
from refimg.adapters.retry import Account, Failure, ProviderError, RunLimits, asked_wait
from refimg.engine.protocols import Call

KEY = "sk-" + "abc123" * 5


@pytest.fixture(autouse=True)
def scaled(monkeypatch):
    """A hundredth of the real waits."""
    monkeypatch.setattr(retry, "_BACKOFF", (0.005, 0.2))
    monkeypatch.setattr(retry, "_LONGEST", 0.6)
    monkeypatch.setattr(retry, "_SPREAD", 0.02)


class Said(Exception):
    """An SDK's exception: it knows its failure, and its request holds the key."""

    def __init__(self, failure: Failure):
        self.failure, self.request = failure, {"authorization": f"Bearer {KEY}"}
        super().__init__(f"{failure.text} {KEY}")


def read(error: Exception) -> Failure:
    return getattr(error, "failure", Failure("never", repr(error)))


class Provider:
    """Answers from a list; a Failure is raised, a number is slept, the last answer stays."""

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), 0

    async def __call__(self):
        self.calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Failure):
            raise Said(answer)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        return answer


AGAIN, NEVER, DOWN = Failure("again", "503"), Failure("never", "400"), Failure("down", "401")


async def ask(provider: Provider, name: str = "p", seconds: float = 5, **more):
    return await Account(name).attempts(provider, read, seconds=seconds, call=Call(**more))


async def test_an_answer_needs_one_call():
    provider = Provider("yes")
    assert await ask(provider) == "yes" and provider.calls == 1


async def test_again_is_tried_again():
    provider = Provider(AGAIN, AGAIN, "yes")
    assert await ask(provider) == "yes" and provider.calls == 3


@pytest.mark.parametrize("failure", [NEVER, DOWN])
async def test_what_never_works_is_not_tried_again(failure):
    provider = Provider(failure, "yes")
    with pytest.raises(ProviderError, match=f"p: {failure.text}"):
        await ask(provider)
    assert provider.calls == 1


async def test_alone_a_call_has_a_few_tries_and_each_call_its_own():
    for _ in range(2):
        provider = Provider(AGAIN)
        with pytest.raises(ProviderError):
            await ask(provider)
        assert provider.calls == 4


async def test_one_call_cannot_eat_the_budget_of_a_run():
    provider = Provider(AGAIN)
    limits = RunLimits(1000)
    with pytest.raises(ProviderError):
        await ask(provider, limits=limits)
    assert provider.calls == 6 and limits.tokens == 195


@pytest.mark.parametrize(("planned", "tokens"), [(0, 8), (40, 8), (45, 9), (96, 19)])
async def test_the_budget_of_a_run_is_20_percent_but_8_at_least(planned, tokens):
    provider, limits = Provider(AGAIN), RunLimits(planned)
    calls = [ask(provider, limits=limits) for _ in range(30)]
    await asyncio.gather(*calls, return_exceptions=True)
    assert provider.calls == 30 + tokens


async def test_two_runs_at_once_have_a_budget_each():
    async def run(provider, limits):
        calls = [ask(provider, limits=limits) for _ in range(30)]
        await asyncio.gather(*calls, return_exceptions=True)

    first, second = Provider(AGAIN), Provider(AGAIN)
    await asyncio.gather(run(first, RunLimits(50)), run(second, RunLimits(100)))
    assert (first.calls, second.calls) == (40, 50)


async def test_a_provider_that_is_down_is_not_called_again_in_this_run_only():
    down, other, limits = Provider(DOWN), Provider("yes"), RunLimits(10)
    for _ in range(3):
        with pytest.raises(ProviderError, match="401"):
            await ask(down, "a", limits=limits)
    assert await ask(other, "b", limits=limits) == "yes"
    assert down.calls == 1
    with pytest.raises(ProviderError):
        await ask(down, "a", limits=RunLimits(10))
    assert down.calls == 2


async def test_a_retry_that_waits_is_not_made_once_the_provider_is_down():
    slow, limits = Provider(Failure("again", "503", wait=0.2), "yes"), RunLimits(10)
    waiting = asyncio.create_task(ask(slow, limits=limits))
    await asyncio.sleep(0.05)
    with pytest.raises(ProviderError):
        await ask(Provider(DOWN), limits=limits)
    with pytest.raises(ProviderError, match="401"):
        await waiting
    assert slow.calls == 1


async def test_calls_queued_behind_a_throttled_provider_end_when_it_is_down():
    limits, account = RunLimits(10), Account("p")
    account.lane.limit = 1
    await account.lane.enter()
    calls = [asyncio.create_task(ask(Provider("yes"), limits=limits)) for _ in range(20)]
    await asyncio.sleep(0)
    limits.down[account] = DOWN
    account.lane.leave()
    ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
    assert {str(end) for end in ends} == {"p: 401"}


async def test_each_attempt_has_a_total_time():
    provider = Provider(9.0, "yes")
    assert await ask(provider, seconds=0.1) == "yes" and provider.calls == 2


async def test_a_call_that_hides_its_timeout_is_late_all_the_same():
    async def wraps():
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:
            raise Said(NEVER) from None

    with pytest.raises(ProviderError, match=r"no answer within 0\.02 s"):
        await Account("p").attempts(wraps, read, seconds=0.02)


@pytest.mark.parametrize("asked", [0, 0.0, -5, None, float("nan")])
async def test_a_wait_of_nothing_is_no_wait_that_was_asked_for(asked, monkeypatch):
    monkeypatch.setattr(retry, "_BACKOFF", (0.05, 0.2))
    provider = Provider(Failure("again", "429", wait=asked, throttled=True), "yes")
    began = time.perf_counter()
    await ask(provider)
    assert time.perf_counter() - began >= 0.05 and Account("p").lane.held_until == -math.inf


@pytest.mark.parametrize(("after", "least", "most"), [
    ("7", 7, 7), ("0.5", 0.5, 0.5), ("0", 0, 0), ("99999999999999999999", 1e20, 1e20),
    ("Mon, 01 Jan 2001 00:00:00 GMT", 0, 0), ("Fri, 31 Dec 9999 23:59:59 GMT", 1e9, 1e12),
    *((text, None, None) for text in (
        "", "-5", "nan", "inf", "1e999", "soon", "2OO", "Mon, 99 Foo 2001",
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT")),
])  # fmt: skip
def test_a_header_is_a_wait_or_it_is_none(after, least, most):
    wait = asked_wait(after)
    assert wait is None if least is None else least <= wait <= most


@pytest.mark.parametrize("asked", [0.2, 1e9])
async def test_the_providers_wait_is_kept_and_clamped(asked):
    provider = Provider(Failure("again", "429", wait=asked), "yes")
    began = time.perf_counter()
    await ask(provider)
    assert min(asked, 0.6) <= time.perf_counter() - began


async def test_a_cancellation_passes_untouched_and_costs_nothing():
    provider, limits = Provider(9.0), RunLimits(1)
    task = asyncio.create_task(ask(provider, limits=limits))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert limits.tokens == 8 and provider.calls == 1


@pytest.mark.parametrize("wait", [50.0, None])
async def test_a_cancellation_is_heard_while_waiting(wait, monkeypatch):
    monkeypatch.setattr(retry, "_BACKOFF", (60.0, 60.0))
    monkeypatch.setattr(retry, "_LONGEST", 60.0)
    provider = Provider(Failure("again", "429", wait=wait, throttled=bool(wait)))
    task = asyncio.create_task(ask(provider))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)


async def test_what_is_no_exception_passes():
    with pytest.raises(asyncio.CancelledError):
        await ask(Provider(asyncio.CancelledError()))


async def test_no_key_and_no_request_hang_on_the_error(caplog):
    caplog.set_level(0)
    provider = Provider(Failure("again", f"503 from {KEY}\nsecond line"))
    with pytest.raises(ProviderError) as caught:
        await ask(provider)
    error = caught.value
    assert error.provider == "p" and error.failure.kind == "again"
    seen = [error]
    for one in seen:
        seen += [e for e in (one.__cause__, one.__context__) if e is not None and e not in seen]
    assert not [e for e in seen if isinstance(e, Said)]
    text = "".join(traceback.format_exception(error)) + str(error) + repr(error) + repr(vars(error))
    logged = caplog.text + repr([vars(r) for r in caplog.records])
    assert KEY not in text + logged and "Bearer" not in text + logged
    assert "\n" not in str(error) and caplog.records


async def test_an_error_that_a_call_raises_itself_counts():
    provider, limits = Provider(ProviderError("elsewhere", DOWN)), RunLimits(1)
    with pytest.raises(ProviderError, match="p: 401"):
        await ask(provider, limits=limits)
    assert limits.down[Account("p")] == DOWN


async def test_a_retry_needs_approval_and_a_late_answer_may_be_paid():
    provider, asked = Provider(9.0, AGAIN, AGAIN, "yes"), []

    def may_retry(paid: bool) -> bool:
        asked.append(paid)
        return len(asked) < 3

    with pytest.raises(ProviderError):
        await ask(provider, seconds=0.02, may_retry=may_retry)
    assert provider.calls == 3 and asked == [True, False, False]


class Bucket:
    """A provider with a token bucket, as Replicate describes its own; a call takes `seconds`."""

    def __init__(self, per_second: float, burst: int, hint: bool, seconds: float = 0.05):
        self.rate, self.burst, self.hint, self.seconds = per_second, burst, hint, seconds
        self.tokens, self.at, self.refused, self.served = burst, time.monotonic(), 0, 0

    async def __call__(self):
        await asyncio.sleep(0.002)
        now = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            self.refused += 1
            wait = (1 - self.tokens) / self.rate
            raise Said(Failure("again", "429", wait=wait if self.hint else None, throttled=True))
        self.tokens -= 1
        self.served += 1
        await asyncio.sleep(self.seconds)
        return "yes"


@pytest.mark.parametrize("hint", [True, False])
async def test_a_token_bucket_is_kept_busy_and_seldom_refuses(hint):
    bucket, limits, places = Bucket(200, 16, hint), RunLimits(320), asyncio.Semaphore(16)

    async def one():
        async with places:
            return await ask(bucket, limits=limits)

    assert await asyncio.gather(*(one() for _ in range(320))) == ["yes"] * 320
    assert bucket.refused < 64


async def test_one_429_halves_what_is_under_way_and_holds_nobody_up():
    release, throttled = asyncio.Event(), Failure("again", "429", throttled=True)

    async def slow():
        await release.wait()
        return "yes"

    lane, limits = Account("p").lane, RunLimits(100)
    calls = [asyncio.create_task(ask(slow, limits=limits)) for _ in range(9)]
    await asyncio.sleep(0)
    assert lane.under_way == 9 and lane.limit == math.inf
    refused = asyncio.create_task(ask(Provider(throttled, "yes"), limits=limits))
    await asyncio.sleep(0.02)
    assert lane.limit == 5 and lane.held_until == -math.inf
    release.set()
    assert await asyncio.gather(*calls, refused) == ["yes"] * 10
    assert lane.under_way == 0 and 5 < lane.limit < 7


async def test_never_more_calls_than_the_limit_are_under_way():
    lane, most = Account("p").lane, 0
    lane.limit = 3

    async def counted():
        nonlocal most
        most = max(most, lane.under_way)
        await asyncio.sleep(0.001)
        assert lane.under_way <= max(3, lane.limit)
        return "yes"

    await asyncio.gather(*(ask(counted) for _ in range(40)))
    assert 3 <= most <= 10 and lane.under_way == 0


async def test_a_server_error_slows_nobody_but_its_call():
    await ask(Provider(Failure("again", "503", wait=0.05), AGAIN, "yes"))
    lane = Account("p").lane
    assert (lane.limit, lane.held_until) == (math.inf, -math.inf)


async def test_a_wait_that_was_asked_for_holds_every_call_of_the_account_and_no_other(monkeypatch):
    spreads = []
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: spreads.append((low, high)) or 0)
    asked = Failure("again", "429", throttled=True, wait=0.5)
    first = asyncio.create_task(ask(Provider(asked, "yes"), "a"))
    await asyncio.sleep(0.02)
    begun = time.monotonic()
    await ask(Provider("yes"), "b")
    assert time.monotonic() - begun < 0.25
    ends, Account("a").lane.limit = [], 8

    async def ended():
        await ask(Provider("yes"), "a")
        ends.append(time.monotonic() - begun)

    await asyncio.gather(first, *(ended() for _ in range(5)))
    assert all(end > 0.4 for end in ends)
    assert len(spreads) >= 6 and all(low == 0 < high <= 0.5 for low, high in spreads)


async def test_two_keys_at_one_provider_do_not_share_a_fate():
    one, two = (Account.of("p", key) for key in ("first-key", "second-key"))
    assert one != two and "first" not in repr(one)
    limits = RunLimits(10)
    with pytest.raises(ProviderError):
        await one.attempts(Provider(DOWN), read, seconds=5, call=Call(limits=limits))
    said = await two.attempts(Provider("yes"), read, seconds=5, call=Call(limits=limits))
    assert said == "yes" and one.lane is not two.lane


async def test_a_retry_is_told_once_and_by_refimg(caplog):
    caplog.set_level(0)
    await ask(Provider(AGAIN, "yes"))
    assert {record.name for record in caplog.records} - {"asyncio"} == {"refimg.adapters.retry"}


async def test_a_burst_of_429s_halves_the_limit_once():
    lane = Account("p").lane
    for _ in range(8):
        await lane.enter()
    now = asyncio.get_running_loop().time()
    for _ in range(5):
        lane.narrow(now - 2)
    assert lane.limit == 4
    lane.narrow(asyncio.get_running_loop().time())
    assert lane.limit == 2


async def test_a_kept_place_is_left_by_its_caller():
    account = Account("p")
    assert await account.attempts(Provider("yes"), read, seconds=5, keep=True) == "yes"
    assert account.lane.under_way == 1
    with pytest.raises(ProviderError):
        await account.attempts(Provider(NEVER), read, seconds=5, keep=True)
    assert account.lane.under_way == 1
    account.lane.leave()


async def test_a_cancelled_call_leaves_its_place_wherever_it_waits():
    lane = Account("p").lane
    lane.limit = 1
    for provider in (Provider(9.0), Provider(Failure("again", "429", wait=0.5, throttled=True))):
        tasks = [asyncio.create_task(ask(provider)) for _ in range(4)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert lane.under_way == 0


async def test_throttled_calls_have_a_budget_of_their_own():
    throttled = Failure("again", "429", throttled=True)
    limits = RunLimits(10)
    for _ in range(4):
        assert await ask(Provider(throttled, throttled, "yes"), limits=limits) == "yes"
    assert (limits.tokens, limits.throttles) == (8, 2)
    with pytest.raises(ProviderError):
        await ask(Provider(throttled), limits=limits)
    assert limits.tokens == 8


def test_event_loops_one_after_another_have_a_lane_each():
    async def run():
        throttled = Provider(Failure("again", "429", throttled=True, wait=0.01), "yes")
        assert Account("p").lane.limit == math.inf
        await asyncio.gather(*(ask(throttled) for _ in range(3)))
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(run()) for _ in range(3)]
    gc.collect()
    assert [loop() for loop in loops[:2]] == [None, None]

"""What each key has spent: decided before compute, paid before the answer leaves, exact across restarts.

One thread decides everything, and one process has the folder: so what is reserved is kept in memory, a process that
dies gives it back by dying, and only what was paid is in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from services.policy import Policy
from services.schemas import UsageReport
from services.usage_file import UsageFile

SECOND = 10**9


@dataclass(frozen=True, eq=False)
class Ticket:
    """One request's claim on the budgets of its key."""

    key: str
    policy: Policy
    images: int
    digests: frozenset[bytes] = frozenset()
    """Of its distinct images; empty where the policy does not limit them."""


class OverBudget(Exception):  # noqa: N818 - a state, not a defect
    """A budget has no room: its name in the policy, the rule, what is left, and whole seconds until it has room.

    The seconds are None where waiting does not help.
    """

    def __init__(self, limit: str, rule: str, left: str, retry_after: int | None) -> None:
        self.limit, self.rule, self.left, self.retry_after = limit, rule, left, retry_after
        super().__init__(limit, rule, left, retry_after)


class Usage:
    """The counters of all keys. Not thread-safe: a `Scribe` calls it."""

    def __init__(self, file: UsageFile) -> None:
        self._file = file
        self._reserved: dict[Ticket, str] = {}
        """The day of each."""
        self._images: Counter[tuple[str, str]] = Counter()
        """Reserved, by key and day."""
        self._digests: dict[str, Counter[bytes]] = {}
        """Reserved, by key, how often; those that have been answered meanwhile are not among them."""
        self._paid_off: dict[str, int] = {}

    def commit(self) -> None:
        """What was settled is on the disk."""
        self._file.commit()

    def rollback(self) -> None:
        """What was settled since the last commit is given back."""
        self._file.rollback()
        self._digests = {}
        for ticket in self._reserved:
            self._digests.setdefault(ticket.key, Counter()).update(ticket.digests)

    def reserve(self, ticket: Ticket, now: int) -> None:
        """Sets a request's images aside, all or none.

        Args:
            ticket: what it needs.
            now: nanoseconds of Unix time.

        Raises:
            OverBudget: nothing was set aside.
        """
        day = _day(now)
        self._require_day(ticket, day, now)
        new = self._require_distinct(ticket)
        self._paid_off[ticket.key] = self._require_pace(ticket, now)
        self._reserved[ticket] = day
        self._images[ticket.key, day] += ticket.images
        self._digests.setdefault(ticket.key, Counter()).update(new)

    def release(self, ticket: Ticket) -> None:
        """Gives back what was reserved and not settled; does nothing where nothing is."""
        if self._take(ticket) is not None:
            self._paid_off[ticket.key] -= _cost(ticket)

    def reduce(self, ticket: Ticket, smaller: Ticket) -> None:
        """What was reserved becomes less; does nothing where nothing is reserved.

        Args:
            ticket: as it was reserved.
            smaller: of the same key, in its place.
        """
        day = self._take(ticket)
        if day is None:
            return
        self._paid_off[ticket.key] += _cost(smaller) - _cost(ticket)
        self._reserved[smaller] = day
        self._images[smaller.key, day] += smaller.images
        new = smaller.digests - self._file.seen(smaller.key, smaller.digests)
        self._digests.setdefault(smaller.key, Counter()).update(new)

    def settle(self, ticket: Ticket) -> None:
        """What was reserved is spent.

        Raises:
            ValueError: it was not reserved, or settled before.
        """
        day = self._take(ticket)
        if day is None:
            raise ValueError("only what was reserved can be settled, and once")
        self._file.spend(ticket.key, day, ticket.images, ticket.digests, self._paid_off[ticket.key])
        for digest in ticket.digests:
            self._digests[ticket.key].pop(digest, None)

    def report(self, key: str, policy: Policy, now: int) -> UsageReport:
        """What a key has used and has left; what is under way is not left, and told apart."""
        totals, day = self._file.totals(key), _day(now)
        distinct = policy.distinct_images
        return UsageReport(
            key=key,
            requests=totals.requests,
            images=totals.images,
            images_under_way=self._images[key, day],
            day=day,
            images_today=self._file.images_of(key, day),
            images_today_left=self._left_today(key, policy, day),
            images_per_second=policy.images_per_second,
            distinct_images=None if distinct is None else totals.distinct_images,
            distinct_images_left=self._left_distinct(key, policy),
        )

    def _left_today(self, key: str, policy: Policy, day: str) -> int | None:
        if policy.images_per_day is None:
            return None
        return max(0, policy.images_per_day - self._file.images_of(key, day) - self._images[key, day])

    def _left_distinct(self, key: str, policy: Policy) -> int | None:
        if policy.distinct_images is None:
            return None
        return max(0, policy.distinct_images - self._file.totals(key).distinct_images - len(self._pending(key)))

    def _pending(self, key: str) -> Mapping[bytes, int]:
        return self._digests.get(key, {})

    def _require_day(self, ticket: Ticket, day: str, now: int) -> None:
        left, most = self._left_today(ticket.key, ticket.policy, day), ticket.policy.images_per_day
        if left is not None and most is not None and ticket.images > left:
            wait = _seconds_left(now) if ticket.images <= most else None
            raise OverBudget("images_per_day", f"is {most} for this key", f"{left} left today", wait)

    def _require_distinct(self, ticket: Ticket) -> frozenset[bytes]:
        """The digests that the key has not been answered yet.

        Those of requests under way use the budget too, until they are answered or given back.
        """
        left = self._left_distinct(ticket.key, ticket.policy)
        if left is None:
            return frozenset()
        new = ticket.digests - self._file.seen(ticket.key, ticket.digests)
        if len(new - self._pending(ticket.key).keys()) > left:
            rule = f"is {ticket.policy.distinct_images} in a lifetime for this key"
            raise OverBudget("distinct_images", rule, f"{left} left", None)
        return new

    def _require_pace(self, ticket: Ticket, now: int) -> int:
        """When all will be paid off: a second's worth may come at once, and more than that from a standstill."""
        if ticket.key not in self._paid_off:
            self._paid_off[ticket.key] = self._file.totals(ticket.key).paid_off
        cost, start = _cost(ticket), max(now, self._paid_off[ticket.key])
        early = start + cost - now - max(SECOND, cost)
        if cost and early > 0:
            rule = f"is {ticket.policy.images_per_second:g} for this key"
            raise OverBudget("images_per_second", rule, "none left now", -(-early // SECOND))
        return start + cost

    def _take(self, ticket: Ticket) -> str | None:
        day = self._reserved.pop(ticket, None)
        if day is None:
            return None
        self._images[ticket.key, day] -= ticket.images
        pending = self._digests.setdefault(ticket.key, Counter())
        pending.subtract(ticket.digests & pending.keys())
        self._digests[ticket.key] = +pending
        return day


def _cost(ticket: Ticket) -> int:
    """Nanoseconds of a pace; rounded down, so that a whole second's worth never costs more than a second."""
    pace = ticket.policy.images_per_second
    return 0 if pace is None else int(ticket.images * SECOND / pace)


def _day(now: int) -> str:
    return datetime.fromtimestamp(now // SECOND, UTC).date().isoformat()


def _seconds_left(now: int) -> int:
    """Until 24:00 UTC."""
    moment = datetime.fromtimestamp(now // SECOND, UTC)
    ends = datetime(moment.year, moment.month, moment.day, tzinfo=UTC) + timedelta(days=1)
    return int((ends - moment).total_seconds())

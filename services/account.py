"""What a teacher was asked for, and whether it may be asked for more."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_cache.errors import BudgetError
from teacher_cache.service_spec import BudgetSpec
from teacher_cache.teachers.base import Bill


@dataclass(frozen=True)
class Account:
    """What one teacher was asked for, all builders together."""

    requests: int = 0
    """Answered, under way, or perhaps answered and lost."""
    images: int = 0
    """In them."""
    lost_requests: int = 0
    """Of them those that were cut off, came too late, or were under way when their process was killed."""
    lost_images: int = 0
    damaged: int = 0
    """Answers that no longer had their checksum, and were asked for again."""

    def beyond(self, budget: BudgetSpec, images: int) -> BudgetError | None:
        """Why one request of so many images more may not leave; None where it may."""
        found = self._bound(budget, images)
        if found is None:
            return None
        name, unit, asked, most = found
        rule = f"is used up: {asked} {unit} were asked for, and {most} may be"
        hint = "All that was answered is kept: raise it, and run the same command again; it goes on."
        return BudgetError(f"teacher.budget.{name}", rule, getattr(budget, name), hint)

    def _bound(self, budget: BudgetSpec, images: int) -> tuple[str, str, int, int] | None:
        if budget.max_requests is not None and self.requests + 1 > budget.max_requests:
            return "max_requests", "requests", self.requests, budget.max_requests
        most = budget.images
        if most is not None and self.images + images > most:
            return "max_images" if budget.max_images == most else "max_spend", "images", self.images, most
        return None

    def bill(self, budget: BudgetSpec) -> Bill:
        """What whoever pays should know."""
        price = budget.price_per_image
        spent = None if price is None else str(self.images * price)
        return Bill(self.requests, self.images, spent, self.notes(budget))

    def notes(self, budget: BudgetSpec) -> tuple[str, ...]:
        """What was lost, where anything was."""
        found = []
        if self.lost_requests:
            cost = "" if budget.price_per_image is None else f" ({self.lost_images * budget.price_per_image})"
            found.append(
                f"{self.lost_requests} requests of {self.lost_images} images{cost} may have been answered and paid for "
                "in vain: they were cut off, came too late, or were under way when their process was killed."
            )
        if self.damaged:
            found.append(f"{self.damaged} answers in the journal were damaged, and were asked for again.")
        return tuple(found)

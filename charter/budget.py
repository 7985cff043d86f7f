"""Make the token and cost limit of a process from the settings."""

from __future__ import annotations

from collections.abc import Collection

from charter.models import RoleModels, is_endpoint
from engine.budget import Budget, parse_prices
from engine.bus.port import Bus
from engine.errors import UsageError
from engine.settings import Settings


def make_budget(
    settings: Settings, models: RoleModels, bus: Bus, roles: Collection[str], *, admits_prompts: bool
) -> Budget | None:
    """Return the token and cost limit of a process that uses the models of these roles. Return None if there is no limit.

    The token limit stops only new prompts, so a process needs it if `admits_prompts` is true: the stage respond and the generator.
    Raises UsageError if there is a cost limit but the price of an endpoint is missing.
    """
    budget = settings.budget
    prices = parse_prices(budget.prices)
    for spec in {models.get_spec(role) for role in roles} if budget.max_cost else set():
        model_name = spec.partition("#")[2]
        if is_endpoint(spec) and model_name not in prices:
            raise UsageError(
                f"budget.max_cost cannot limit the cost of {model_name}",
                "budget.prices has no price for this model",
                f'add its prices per million tokens (prompt/completion): --set "budget.prices={model_name}=0.15/0.60"',
            )
    if not budget.max_cost and not (budget.max_tokens and admits_prompts):
        return None
    return Budget(bus, settings.run.id, max_tokens=budget.max_tokens, max_cost=budget.max_cost, prices=prices)

"""One schedule: what a seed makes of a room full of jobs, and what the checker says in the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from simulation.actors import Habits, Jobs, Plan
from simulation.checker import broken_promises
from simulation.world import NO_FAULTS, Faults, World, simulated

# In commits/ the generations 1, 0 and 2 of s249 lie in this order, so that a listing meets them in another than they
# were made in.
PLAN: Plan = {"s249": ("a", "b"), "s1": ("c", "d")}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a schedule ended; `violations` is empty when every promise was kept."""

    seed: int
    violations: tuple[str, ...]
    num_steps: int
    num_faults: int
    trace: tuple[str, ...]


def run_schedule(
    seed: int,
    habits: Habits = Habits(),  # noqa: B008 - frozen
    bug: Callable[[World], AbstractContextManager[object]] | None = None,
    is_traced: bool = False,
) -> Outcome:
    """Everything that happens follows from the seed, to the last request."""
    world = World(seed, is_traced=is_traced)
    jobs = Jobs(world, PLAN, habits)
    with simulated(world), bug(world) if bug else nullcontext():
        draw = world.random
        world.faults = Faults(
            lost=draw.choice((0.0, 0.05, 0.15, 0.3)),
            outage=draw.choice((0.0, 0.005, 0.015)),
            paused=draw.choice((0.0, 0.02, 0.05)),
            killed=draw.choice((0.0, 0.0, 0.01, 0.03)),
        )
        world.page_keys = draw.choice((1, 2, 4, 1000))
        for number in range(draw.choice((1, 2, 2, 3))):
            world.spawn(f"writer{number}", partial(jobs.write, f"writer{number}"))
        for number in range(draw.choice((0, 1, 2, 3))):
            world.spawn(f"retry{number}", partial(_after, world, partial(jobs.retry, f"retry{number}")))
        world.spawn("publisher", partial(jobs.publish_often, "publisher"))
        world.spawn("collector", partial(jobs.collect, "collector"))
        world.spawn("reader", partial(jobs.read, "reader"))
        if draw.random() < 0.3:
            world.spawn("rot", partial(_rot, world), can_be_killed=False)
            for number in range(draw.choice((1, 2))):
                world.spawn(f"repair{number}", partial(_after, world, partial(jobs.repair, f"repair{number}")))
        world.run()
        world.faults, world.outage_until = NO_FAULTS, 0.0
        # A quiet day: one run after the other ends what is left.
        for name, act in (
            ("last writer", partial(jobs.write, "last writer")),
            ("last repair", partial(jobs.repair, "last repair")),
            ("last repair", partial(jobs.repair, "last repair")),
            ("last collector", partial(jobs.collect, "last collector")),
            ("last publisher", partial(jobs.publish, "last publisher", set())),
        ):
            world.spawn(name, act)
            world.run()
    objects = {key: stored.data for key, stored in world.objects.items()}
    violations = world.violations + broken_promises(objects, PLAN, world.claims, world.written)
    return Outcome(seed, tuple(violations), world.num_steps, world.num_faults, tuple(world.trace))


def _after(world: World, act: Callable[[], object]) -> None:
    world.sleep(world.random.uniform(0, 4))
    act()


def _rot(world: World) -> None:
    """Up to twice, a file that a record names loses a bit or vanishes."""
    for _ in range(world.random.choice((1, 2))):
        world.sleep(world.random.uniform(0, 4))
        records = [stored.data for key, stored in world.objects.items() if key.startswith("commits/")]
        named = sorted(key for key in world.objects if any(f'"{key}"'.encode() in record for record in records))
        if named:
            world.rot(world.random.choice(named))

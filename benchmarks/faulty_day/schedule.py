"""Which tier breaks when and how: a seed makes a day, and in it some tier is always well.

Pure. An episode is one kind of fault of one tier over a stretch of time; it is met by a share of
the tier's requests. A tier keeps watch for a while, during which it has no episode; the watches
overlap, so that a request that is moved from tier to tier finds one that was well all along.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

POOL = "small"
PROVIDERS = ("mini", "full")
TIERS = (POOL, *PROVIDERS)
WORKERS = 3

# Each kind with the seconds that it lasts at least and at most.
OF_PROVIDERS: dict[str, tuple[float, float]] = {
    "refuse": (4, 12),
    "half-open": (4, 12),
    "unknown host": (3, 8),
    "hang": (4, 12),
    "reset": (4, 12),
    "comments for ever": (4, 10),
    "slow head": (4, 10),
    "trickle": (4, 10),
    "key rotated": (3, 3),
    "HTML": (4, 10),
    "wrong form": (4, 10),
    "key as 400": (4, 10),
    "error in 200": (4, 10),
    "choices empty": (4, 10),
    "error beside choices": (4, 10),
    "cut whole": (4, 10),
    "cut before": (4, 10),
    "cut later": (4, 10),
    "error later": (4, 10),
    "no [DONE]": (4, 10),
    "null error": (4, 10),
    "usage absent": (4, 10),
    "usage senseless": (4, 10),
    "packed": (4, 10),
    **{
        str(status): (4, 10)
        for status in (301, 401, 402, 403, 404, 408, 409, 418, 429, 500, 502, 503, 504, 529)
    },
}
OF_WORKERS: dict[str, tuple[float, float]] = {
    "refuse": (3, 10),
    "restart": (0.5, 2),
    "drain": (2, 6),
    "half-open": (3, 10),
    "hang": (3, 8),
    "trickle": (3, 10),
    "cut whole": (4, 10),
    "cut later": (4, 10),
    "error later": (4, 10),
    "error in 200": (4, 10),
    "HTML": (4, 10),
    "reset": (4, 10),
    **{str(status): (4, 10) for status in (404, 429, 500, 502, 503)},
}
# A client notices nothing of these but time: the tier is well.
HARMLESS = frozenset(
    {"slow head", "trickle", "no [DONE]", "null error", "usage absent", "usage senseless", "packed"}
)
# After these a provider's stream may only end with an error: nobody else can go on from there.
ENDS_STREAMS = frozenset({"cut later", "error later"})
PUSHES = ("threshold", "threshold", "tenant", "timeouts")


@dataclass(frozen=True)
class Episode:
    """share: of the tier's requests that meet it. workers: of a pool, those that break."""

    tier: str
    kind: str
    start_s: float
    end_s: float
    share: float = 1.0
    workers: tuple[int, ...] = ()

    @property
    def disables(self) -> bool:
        """Whether the tier may be unable to answer meanwhile."""
        return self.kind not in HARMLESS and (self.tier != POOL or len(self.workers) == WORKERS)


@dataclass(frozen=True)
class Push:
    """Settings that change while requests are under way."""

    what: str
    at_s: float
    value: float


def day(
    seed: int, seconds: float, watch_s: float, overlap_s: float, pace: float = 1.0
) -> list[Episode]:
    """Episodes by their start. Every kind comes before any comes again.

    pace: of their lengths, what is left of them; a rotated key takes its second.
    """
    rng = random.Random(seed)
    watches = list(_watches(rng, seconds, watch_s, overlap_s))
    found: list[Episode] = []
    for tier in TIERS:
        kinds = OF_WORKERS if tier == POOL else OF_PROVIDERS
        own = [(start, end) for name, start, end in watches if name == tier]
        bag: list[str] = []
        now = rng.uniform(0.0, 2.0)
        while now < seconds:
            if not bag:
                bag = sorted(kinds)
                rng.shuffle(bag)
            kind = bag.pop()
            lasts = rng.uniform(*kinds[kind]) * (pace if kind != "key rotated" else 0.7)
            end = min(seconds, now + lasts)
            hurt = tuple(range(WORKERS))
            if tier == POOL:
                hurt = tuple(sorted(rng.sample(hurt, rng.randint(1, WORKERS))))
            episode = Episode(tier, kind, now, end, rng.choice((1.0, 1.0, 0.5)), hurt)
            if episode.disables:
                met = [(a, b) for a, b in own if a < end and now < b]
                if met:  # it keeps watch: what disables it comes later
                    if tier == POOL and len(hurt) == WORKERS:
                        episode = Episode(tier, kind, now, end, episode.share, hurt[1:])
                    else:
                        bag.insert(rng.randrange(len(bag) + 1), kind)
                        harmless = [each for each in sorted(kinds) if each in HARMLESS]
                        end = min(now + 2.0 * pace, seconds)
                        episode = Episode(tier, rng.choice(harmless), now, end)
            found.append(episode)
            now = end + rng.uniform(0.2, 1.5) * pace
    return sorted(found, key=lambda episode: episode.start_s)


def _watches(
    rng: random.Random, seconds: float, watch_s: float, overlap_s: float
) -> Iterator[tuple[str, float, float]]:
    now, last = 0.0, ""
    while now < seconds + overlap_s:
        last = rng.choice([tier for tier in TIERS if tier != last])
        end = now + watch_s * rng.uniform(0.7, 1.3)
        yield last, now - overlap_s, end
        now = end


def pushes(seed: int, seconds: float, every_s: float) -> list[Push]:
    """When which setting changes."""
    rng = random.Random(f"{seed}/pushes")
    found, now = [], every_s
    while now < seconds:
        found.append(Push(rng.choice(PUSHES), now, rng.random()))
        now += rng.uniform(0.5, 1.5) * every_s
    return found

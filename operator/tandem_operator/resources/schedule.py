"""When a schedule of an AutoscalingPolicy holds: cron lines and time zones, read by libraries.

Cron lines are Debian cron's five fields (cronsim), time zones IANA names (zoneinfo).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

FIELDS = "minute (0-59) hour (0-23) day (1-31) month (1-12) weekday (0-7, 0 and 7 are Sunday)"


def checked_cron(line: str) -> str:
    """The line itself.

    Raises ValueError with the part that cannot be read.
    """
    count = len(line.split())
    if count != 5:
        raise ValueError(f"{line!r} has {count} fields; give {FIELDS}")
    try:
        CronSim(line, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f"{line!r}: {str(error).lower()}; give {FIELDS}") from None
    return line


def checked_time_zone(name: str) -> str:
    """The name itself. Raises ValueError for a zone that nobody knows."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"{name!r} is not a time zone; use an IANA name such as UTC or Europe/Berlin"
        ) from None
    return name


def in_force(cron: str, time_zone: str, length_s: float, now: datetime) -> bool:
    """Whether what begins at `cron` and holds for `length_s` seconds holds at `now`.

    now: with a time zone. Raises ValueError for what the checks above refuse.
    """
    local = now.astimezone(ZoneInfo(checked_time_zone(time_zone))).replace(microsecond=0)
    began = _last_start(checked_cron(cron), local.replace(second=0), local.tzinfo)
    return began is not None and now - began < timedelta(seconds=length_s)


@lru_cache(maxsize=256)  # asked every few seconds, and the answer holds for the minute
def _last_start(cron: str, minute: datetime, _zone: object) -> datetime | None:
    """When it last began, this minute included."""
    after = (minute.astimezone(UTC) + timedelta(seconds=1)).astimezone(minute.tzinfo)
    return next(CronSim(cron, after, reverse=True), None)

"""KEEP: which snapshots stay, the trash, the alarm, and the space that `prune` frees."""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from conftest import FOLDER, Process, World, held, make_database, uncovered, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zbackup as z

QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SECOND, HOUR, DAY = 10**9, 3600 * 10**9, 86400 * 10**9
T0 = 1_790_000_000 * SECOND  # 2026-09-21 14:13:20 UTC
KIB, MIB = 1 << 10, 1 << 20


def noise(size: int, seed: object) -> bytes:
    """Return bytes that do not compress, the same for the same seed."""
    return random.Random(str(seed)).getrandbits(8 * size).to_bytes(size, "big") if size else b""


def do(world: World, *arguments: str, code: int = 0) -> str:
    """Run a command on a world's store in this process, which is quicker; returns what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        found = z.main([arguments[0], "--store", str(world.store), *arguments[1:]])
    assert found == code, f"exit code {found}: {said.getvalue()}"
    return said.getvalue()


def names_of(world: World, folder: str = FOLDER) -> list[str]:
    """Return the snapshots of a node, the oldest first."""
    return [row["SNAPSHOT"] for row in json.loads(do(world, "list", folder, "--json"))]


# ---- which snapshots a rule keeps ----


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let the server stand in another time zone."""

    def move(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    move("UTC")
    yield move
    monkeypatch.undo()
    time.tzset()


def moment(text: str) -> int:
    """Return a moment (ns) from a time with its offset, such as 2026-10-25T02:30+02:00."""
    return int(datetime.datetime.fromisoformat(text).timestamp()) * SECOND


def make(sequence: int, started: int, grade: str = "stable", **more: Any) -> z.Snapshot:
    name = f"{z.name_time(started)}-{sequence}"  # unlike real names, so that none comes twice
    return z.Snapshot(name, "here", sequence, started, started, grade, **more)


def make_history(snapshots: Sequence[z.Snapshot], **more: Any) -> z.History:
    return z.History("here", tuple(snapshots), **more)


def series(*times: int, grades: str = "") -> z.History:
    """Return snapshots at these times, in this order; `grades` has one letter each: f, s, t or p."""
    names = {"f": "frozen", "s": "stable", "t": "torn", "p": "partial"}
    letters = grades or "s" * len(times)
    return make_history([make(n, t, names[g]) for n, (t, g) in enumerate(zip(times, letters), 1)])


def kept(history: z.History, keep: str) -> list[int]:
    """Return the sequence numbers of what rules keep."""
    return [c.snapshot.sequence for c in z.plan_history(history, z.parse_keep(keep)) if c.keep]


def reason(history: z.History, keep: str, sequence: int) -> str:
    rules = z.parse_keep(keep) if keep else ()
    return next(c.reason for c in z.plan_history(history, rules) if c.snapshot.sequence == sequence)


def test_last_keeps_the_newest_and_the_rest_goes(zone: Callable[[str], None]) -> None:
    history = series(*(T0 + n * HOUR for n in range(6)))
    assert kept(history, "last 3") == [4, 5, 6]
    assert reason(history, "last 3", 6) == "last 1"
    assert reason(history, "last 3", 4) == "last 3"
    assert reason(history, "last 3", 3) == "no rule keeps it"


def test_without_rules_all_stay() -> None:
    history = series(*(T0 + n * DAY for n in range(5)))
    assert [c.keep for c in z.plan_history(history, ())] == [True] * 5
    assert reason(history, "", 1) == "no --keep is given"


def test_newest_of_each_day_stays(zone: Callable[[str], None]) -> None:
    start = moment("2026-09-21T00:00+00:00")
    history = series(*(start + n * 6 * HOUR for n in range(16)))  # four days, four a day
    assert kept(history, "daily 3") == [8, 12, 16]
    assert reason(history, "daily 3", 12) == "daily 2"


def test_rules_of_the_issue_over_four_years(zone: Callable[[str], None]) -> None:
    """One a day: of 1,500 about 3 + 7 + 5 + 12 + 3 stay, each rule beginning at the newest."""
    start = moment("2022-01-01T12:00+00:00")
    history = series(*(start + n * DAY for n in range(1500)))
    rules = "last 3, daily 7, weekly 5, monthly 12, yearly 3"
    days = [datetime.date(2022, 1, 1) + datetime.timedelta(n - 1) for n in kept(history, rules)]
    last = datetime.date(2022, 1, 1) + datetime.timedelta(1499)
    assert set(days[-7:]) == {last - datetime.timedelta(n) for n in range(7)}
    sundays = [d for d in days if d.isoweekday() == 7]
    assert len(sundays) >= 4
    ends = [d for d in days if d.year == 2025 and (d + datetime.timedelta(1)).day == 1]
    assert len(ends) == 10  # March to December; of January and February 2026 the newest
    years = [d for d in days if (d + datetime.timedelta(1)).timetuple().tm_yday == 1]
    assert [d.year for d in years] == [2024, 2025]
    assert len(days) == len({*days}) <= 30


def test_rule_with_places_left_keeps_the_oldest(zone: Callable[[str], None]) -> None:
    """So that `yearly 3` has something from the first day on, and it does not vanish within the year."""
    history = series(*(T0 + n * HOUR for n in range(6)))
    assert kept(history, "last 1, yearly 3") == [1, 6]
    assert reason(history, "last 1, yearly 3", 1) == "yearly, the oldest"
    assert kept(history, "last 1, yearly 1") == [6]


def test_rule_of_all_keeps_one_of_each_period(zone: Callable[[str], None]) -> None:
    history = series(*(T0 + n * 12 * HOUR for n in range(9)))
    assert kept(history, "daily all") == [1, 3, 5, 7, 9]


def test_all_reasons_are_told(zone: Callable[[str], None]) -> None:
    history = series(T0, T0 + DAY)
    assert reason(history, "last 1, daily 1, monthly 1", 2) == "last 1, daily 1, monthly 1"


def test_torn_and_partial_ones_between_good_ones_go_and_fill_no_place(zone: Callable[[str], None]) -> None:
    history = series(*(T0 + n * HOUR for n in range(6)), grades="stpfps")
    assert kept(history, "last 2") == [4, 6]
    assert reason(history, "last 2", 5) == "partial, and a good one is newer"
    assert reason(history, "last 2", 2) == "torn, and a good one is newer"


def test_torn_ones_newer_than_the_last_good_one_stay(zone: Callable[[str], None]) -> None:
    history = series(*(T0 + n * HOUR for n in range(5)), grades="fftpt")
    assert kept(history, "last 1") == [2, 3, 4, 5]
    assert reason(history, "last 1", 4) == "newer than the last good one"


def test_day_without_a_good_one_keeps_its_newest(zone: Callable[[str], None]) -> None:
    day = moment("2026-09-21T10:00+00:00")
    times = [day, day + HOUR, day + DAY, day + DAY + HOUR, day + 2 * DAY, day + 2 * DAY + HOUR]
    history = series(*times, grades="sstpss")
    assert kept(history, "daily 2") == [2, 4, 6]
    assert reason(history, "daily 2", 4) == "daily, no good one there"


def test_bad_one_of_a_day_that_has_a_good_one_goes(zone: Callable[[str], None]) -> None:
    day = moment("2026-09-21T10:00+00:00")
    assert kept(series(day, day + HOUR, day + DAY, grades="sts"), "daily 2") == [1, 3]


def test_node_without_any_good_one_loses_nothing(zone: Callable[[str], None]) -> None:
    history = series(*(T0 + n * DAY for n in range(5)), grades="ptptp")
    assert kept(history, "last 1") == [1, 2, 3, 4, 5]
    assert reason(history, "last 1", 1) == "no good one yet"


def test_harmed_one_does_not_count(zone: Callable[[str], None]) -> None:
    """What has lost content must not push out what has not."""
    history = series(*(T0 + n * HOUR for n in range(4)))
    harmed = replace(history, harmed=frozenset(s.name for s in history.snapshots[2:]))
    assert kept(harmed, "last 1") == [2, 3, 4]
    assert reason(harmed, "last 1", 3) == "newer than the last good one"
    between = replace(history, harmed=frozenset([history.snapshots[2].name]))
    assert kept(between, "last 2") == [2, 4]


def test_node_of_which_all_are_harmed_loses_nothing(zone: Callable[[str], None]) -> None:
    history = series(T0, T0 + DAY)
    harmed = replace(history, harmed=frozenset(s.name for s in history.snapshots))
    assert kept(harmed, "last 1") == [1, 2]


def test_what_latest_shows_stays(zone: Callable[[str], None]) -> None:
    history = series(*(T0 + n * HOUR for n in range(4)))
    shown = replace(history, shown=frozenset([history.snapshots[1].name]))
    assert kept(shown, "last 1") == [2, 4]
    assert reason(shown, "last 1", 2) == "shown by latest"


def test_alarm_holds_itself_and_all_before_until_released(zone: Callable[[str], None]) -> None:
    history = series(*(T0 + n * HOUR for n in range(6)))
    snapshots = list(history.snapshots)
    snapshots[3] = replace(snapshots[3], alarm="it has 0 files")
    alarmed = replace(history, snapshots=tuple(snapshots))
    assert kept(alarmed, "last 1") == [1, 2, 3, 4, 6]
    assert reason(alarmed, "last 1", 1) == f"held by the alarm of {snapshots[3].name}, until `release here`"
    assert kept(replace(alarmed, released=3), "last 1") == [1, 2, 3, 4, 6]  # an older alarm was answered
    assert kept(replace(alarmed, released=4), "last 1") == [6]


def test_second_alarm_holds_what_is_between_too(zone: Callable[[str], None]) -> None:
    snapshots = [make(n, T0 + n * HOUR, alarm="few" if n in (2, 4) else "") for n in range(1, 7)]
    history = make_history(snapshots)
    assert kept(history, "last 1") == [1, 2, 3, 4, 6]
    assert kept(replace(history, released=2), "last 1") == [1, 2, 3, 4, 6]
    assert kept(replace(history, released=4), "last 1") == [6]


@pytest.mark.parametrize("keep", ["last 0", "last 0, daily 0, yearly 0"])
def test_rules_that_keep_no_good_one_are_refused(keep: str) -> None:
    history = series(T0, T0 + DAY, grades="sp")
    with pytest.raises(z.UsageError, match="would remove all 2 snapshots of here; nothing is removed"):
        z.plan_history(history, z.parse_keep(keep))


def test_rule_of_none_beside_another_is_no_error(zone: Callable[[str], None]) -> None:
    assert kept(series(T0, T0 + DAY), "last 1, daily 0") == [2]


def test_clock_that_jumped_back(zone: Callable[[str], None]) -> None:
    """The order in which snapshots were made decides, not what the clock said."""
    history = series(T0, T0 + 3650 * DAY, T0 + DAY, T0 + 2 * DAY)
    assert kept(history, "last 1") == [4]
    assert kept(history, "last 2") == [3, 4]
    assert kept(history, "daily 3") == [2, 3, 4]


def test_day_that_came_twice_fills_one_place(zone: Callable[[str], None]) -> None:
    history = series(T0 - DAY, T0, T0 + DAY, T0 + HOUR, T0 + DAY + HOUR)
    assert kept(history, "daily 3") == [1, 4, 5]


def test_snapshots_of_an_absent_node_stay_for_ever(zone: Callable[[str], None]) -> None:
    """Places are counted in periods that have snapshots, so an old snapshot is as good as a new one."""
    history = series(*(moment("1999-03-01T12:00+00:00") + n * DAY for n in range(7)))
    assert kept(history, "last 3, daily 7") == [1, 2, 3, 4, 5, 6, 7]
    assert kept(history, "daily 3") == [5, 6, 7]


# ---- local time ----


@pytest.mark.parametrize(
    ("name", "start", "hours"),
    [
        ("Europe/Berlin", "2026-03-29T00:00+01:00", 23),
        ("Europe/Berlin", "2026-10-25T00:00+02:00", 25),
        ("America/New_York", "2026-03-08T00:00-05:00", 23),
        ("America/New_York", "2026-11-01T00:00-04:00", 25),
    ],
)
def test_day_on_which_the_clocks_change(zone: Callable[[str], None], name: str, start: str, hours: int) -> None:
    """A day is a day of the wall clock, however long; each of its hours is one of its own."""
    zone(name)
    begin = moment(start)
    history = series(*(begin + n * HOUR for n in range(-24, hours + 24)))
    days = kept(history, "daily 3")
    assert [n - 25 for n in days] == [-1, hours - 1, hours + 23]
    assert len(kept(history, "hourly all")) == hours + 48
    assert kept(history, "hourly 30") == list(range(hours + 48 - 29, hours + 49))
    at_half = series(begin, *(begin + n * HOUR // 2 for n in range(2, 2 * hours)))
    assert len(kept(at_half, f"hourly {hours}")) == hours


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("Europe/Berlin", "2026-10-25T02:30+02:00", "2026-10-25T02:30+01:00"),
        ("America/New_York", "2026-11-01T01:30-04:00", "2026-11-01T01:30-05:00"),
    ],
)
def test_two_snapshots_in_the_hour_that_comes_twice(
    zone: Callable[[str], None], name: str, first: str, second: str
) -> None:
    zone(name)
    one, two = moment(first), moment(second)
    assert two - one == HOUR
    history = series(one - HOUR, one, one + 600 * SECOND, two, two + HOUR)
    assert kept(history, "hourly 4") == [1, 3, 4, 5]
    assert kept(history, "daily 1") == [5]


def test_day_is_the_servers_not_utcs(zone: Callable[[str], None]) -> None:
    late, early = moment("2026-07-01T23:30+02:00"), moment("2026-07-02T00:30+02:00")
    history = series(late - 12 * HOUR, late, early, early + 12 * HOUR)
    zone("UTC")
    assert kept(history, "daily 2") == [3, 4]
    zone("Europe/Berlin")
    assert kept(history, "daily 2") == [2, 4]
    zone("Asia/Kathmandu")  # the server moved: what was kept by one reckoning is one more in another
    assert kept(history, "daily 2") == [1, 4]


def test_weeks_at_the_turn_of_a_year(zone: Callable[[str], None]) -> None:
    """1 January 2027 is in week 53 of 2026; 30 December 2024 is in week 1 of 2025."""
    days = ["2026-12-27", "2026-12-28", "2026-12-31", "2027-01-01", "2027-01-03", "2027-01-04", "2027-01-05"]
    history = series(*(moment(f"{day}T12:00+00:00") for day in days))
    assert kept(history, "weekly 3") == [1, 5, 7]
    assert kept(history, "yearly 2") == [3, 7]
    days = ["2024-12-29", "2024-12-30", "2025-01-05", "2025-01-06", "2025-12-29"]
    history = series(*(moment(f"{day}T12:00+00:00") for day in days))
    assert kept(history, "weekly 4") == [1, 3, 4, 5]


def test_months_have_the_lengths_of_the_calendar(zone: Callable[[str], None]) -> None:
    start = moment("2027-12-30T12:00+00:00")
    history = series(*(start + n * DAY for n in range(65)))  # to 4 March of a leap year
    last_days = [datetime.date(2027, 12, 30) + datetime.timedelta(n - 1) for n in kept(history, "monthly 4")]
    assert [str(day) for day in last_days] == ["2027-12-31", "2028-01-31", "2028-02-29", "2028-03-03"]


# ---- the rules beside a model of them ----


def bucket_of(period: str, started: int) -> tuple[object, ...]:
    """Return the period of a moment, by other means than the program's."""
    local = time.localtime(started // SECOND)
    day = datetime.date(*local[:3])
    return {
        "hourly": (day, local.tm_hour, local.tm_gmtoff),
        "daily": (day,),
        "weekly": day.isocalendar()[:2],
        "monthly": (local.tm_year, local.tm_mon),
        "yearly": (local.tm_year,),
    }[period]


def model(newest: Sequence[z.Snapshot], counted: set[str], period: str, most: int) -> set[str]:
    """Return what one rule keeps, said in another way than the program says it."""
    good = [s for s in newest if s.name in counted]
    if period == "last":
        chosen = good[:most]
        return {s.name for s in (chosen if len(good) >= most else good)}
    buckets = list(dict.fromkeys(bucket_of(period, s.started) for s in good))
    keep = {next(s.name for s in good if bucket_of(period, s.started) == bucket) for bucket in buckets[:most]}
    if good and len(buckets) < most:
        keep.add(good[-1].name)
    for place, snapshot in enumerate(newest):
        bucket = bucket_of(period, snapshot.started)
        newer = newest[:place]
        filled = {bucket_of(period, s.started) for s in newer if s.name in counted}
        first = all(bucket_of(period, s.started) != bucket for s in newer)
        if bucket not in buckets and first and len(filled) < most:
            keep.add(snapshot.name)
    return keep


BASES = ["2026-03-28T12:00+00:00", "2026-10-24T12:00+00:00", "2026-12-30T00:00+00:00", "2028-02-28T06:00+00:00"]
TIMES = st.tuples(
    st.sampled_from([moment(text) for text in BASES]),
    st.one_of(st.integers(0, 72).map(lambda n: n * HOUR // 2), st.integers(-400, 400).map(lambda n: n * DAY)),
).map(sum)
HISTORIES = st.lists(
    st.tuples(TIMES, st.sampled_from(["stable", "stable", "frozen", "torn", "partial"]), st.booleans()), max_size=14
).map(
    lambda rows: make_history(
        [make(n, started, grade) for n, (started, grade, _) in enumerate(rows, 1)],
        harmed=frozenset(
            make(n, started).name for n, (started, _, harmed) in enumerate(rows, 1) if harmed and n % 4 == 0
        ),
    )
)
RULES = st.dictionaries(st.sampled_from(z.PERIODS), st.integers(0, 6), min_size=1, max_size=3).map(
    lambda rules: tuple(rules.items())
)


def counted_of(history: z.History) -> set[str]:
    return {s.name for s in history.snapshots if s.grade in ("stable", "frozen") and s.name not in history.harmed}


@pytest.mark.parametrize("name", ["Europe/Berlin", "America/New_York", "UTC"])
@QUICK
@given(history=HISTORIES, rules=RULES)
def test_rules_and_their_model(
    zone: Callable[[str], None], name: str, history: z.History, rules: tuple[z.Rule, ...]
) -> None:
    zone(name)
    newest, counted = history.snapshots[::-1], counted_of(history)
    wanted: set[str] = set()
    for rule in rules:
        found = z.choose_by_rule(newest, counted, rule)
        assert set(found) == model(newest, counted, *rule)
        wanted |= set(found)
    if counted and not wanted & counted:
        with pytest.raises(z.UsageError):
            z.plan_history(history, rules)
        return
    last_good = max((s.sequence for s in newest if s.name in counted), default=-1)
    newer = {s.name for s in newest if s.sequence > last_good}
    choices = z.plan_history(history, rules)
    assert [c.snapshot for c in choices] == list(history.snapshots)
    assert {c.snapshot.name for c in choices if c.keep} == wanted | newer
    assert all(c.reason for c in choices)
    if counted:
        assert next(c for c in choices if c.snapshot.sequence == last_good).keep


@QUICK
@given(history=HISTORIES, rules=RULES, other=RULES)
def test_pruning_twice_and_with_more_rules(
    zone: Callable[[str], None], history: z.History, rules: tuple[z.Rule, ...], other: tuple[z.Rule, ...]
) -> None:
    """A second prune finds nothing to do, so time alone removes nothing; more rules never remove more."""
    zone("Europe/Berlin")
    with contextlib.suppress(z.UsageError):
        first = [c.snapshot for c in z.plan_history(history, rules) if c.keep]
        assert all(c.keep for c in z.plan_history(replace(history, snapshots=tuple(first)), rules))
        both = (*rules, *((period, most) for period, most in other if period not in dict(rules)))
        assert set(first) <= {c.snapshot for c in z.plan_history(history, both) if c.keep}
        larger = tuple((period, most + 1) for period, most in rules)
        assert set(first) <= {c.snapshot for c in z.plan_history(history, larger) if c.keep}


@QUICK
@given(history=HISTORIES, rules=RULES, at=st.integers(0, 13), released=st.integers(0, 14))
def test_what_an_alarm_holds(
    zone: Callable[[str], None], history: z.History, rules: tuple[z.Rule, ...], at: int, released: int
) -> None:
    zone("UTC")
    snapshots = [replace(s, alarm="few files" if n == at else "") for n, s in enumerate(history.snapshots)]
    alarmed = replace(history, snapshots=tuple(snapshots), released=released)
    with contextlib.suppress(z.UsageError):
        plain = {c.snapshot.name for c in z.plan_history(history, rules) if c.keep}
        held_ones = {s.name for s in snapshots[: at + 1]} if at < len(snapshots) and at + 1 > released else set()
        assert {c.snapshot.name for c in z.plan_history(alarmed, rules) if c.keep} == plain | held_ones


# ---- --keep as it is typed ----


def test_keep_is_read() -> None:
    assert z.parse_keep("last 3, daily 7, weekly 5, monthly 12, yearly 3") == (
        ("last", 3),
        ("daily", 7),
        ("weekly", 5),
        ("monthly", 12),
        ("yearly", 3),
    )
    assert z.parse_keep(" hourly  24,last 1 ") == (("hourly", 24), ("last", 1))
    (rule,) = z.parse_keep("daily all")
    assert rule[1] > 10**6


@pytest.mark.parametrize("command", ["prune", "server"])
@pytest.mark.parametrize(
    "text",
    ["", "3", "last", "last 3,", "last -1", "last 3 daily 7", "last 3; daily 7", "Last 3", "minutely 3"]
    + ["last 3, last 5", "daily 1.5", "daily seven", "daily ٣", "last 1234567", "daily 7\0"],
)
def test_keep_that_is_no_rule(command: str, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ["--range", "9"] if command == "server" else []
    with pytest.raises(SystemExit) as caught:
        z.main([command, *where, "--store", str(tmp_path / "none"), "--keep", text])
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert said[-1].startswith(f"zbackup {command}: error: argument --keep: ")
    assert "is not a rule such as 'last 3, daily 7, monthly all'" in said[-1] and "hourly" in said[-1]
    assert not (tmp_path / "none").exists()


# ---- a store made by hand, pruned by the command ----


class Shop:
    """A store in which snapshots are made at once, and a clock that a test moves."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.path = path / "backups"
        self.capsys = capsys
        self.now = T0
        self.wanted: dict[tuple[str, str], dict[str, bytes]] = {}  # what each snapshot held, by node and name
        self.on_sleep: Callable[[], None] = lambda: None
        self.slept = 0
        monkeypatch.setattr(z, "make_clock", lambda: z.Clock(lambda: self.now, lambda: self.slept, self._sleep))
        z.open_store(str(self.path), create=True).close()

    def _sleep(self, seconds: float) -> None:
        self.slept += 1  # a second each time, so that all waiting ends
        self.on_sleep()

    @contextlib.contextmanager
    def open(self) -> Iterator[z.Store]:
        with contextlib.closing(z.open_store(str(self.path))) as store:
            yield store

    @contextlib.contextmanager
    def writing(self) -> Iterator[z.PackWriter]:
        """Write one pack."""
        with self.open() as store:
            writer = z.PackWriter(store.packs, store.index, z.ZLIB, 1)
            yield writer
            writer.seal()

    def save(
        self, files: Mapping[str, bytes | z.Content], node: str = "here", unnamed: bytes = b"", **fields: Any
    ) -> str:
        """Make a snapshot an hour after the last one, its new content and unnamed bytes in one pack."""
        self.now += HOUR
        with self.open() as store:
            folder = store.node(node)
            folder.make()
            if not (Path(folder.path) / "node.json").exists():
                folder.save_known(z.Known(node, "0" * 32, first_seen=self.now, last_seen=self.now))
            writer = z.PackWriter(store.packs, store.index, z.ZLIB, 1)
            blocks = z.BlockWriter(writer)
            if unnamed:
                writer.put_chunk(unnamed)
            for name, data in sorted(files.items()):
                if isinstance(data, z.Content):
                    content = data
                else:
                    chunks = [writer.put_chunk(data[at : at + z.CHUNK]) for at in range(0, len(data), z.CHUNK)]
                    content = z.Content(len(data), tuple(chunks), (), "stable")
                stat = z.Stat(name.encode(), "file", 0o644, 0, 0, "root", "root", content.size)
                blocks.put(z.Entry(z.encode_stat(stat), z.encode_content(content)))
            sequence = 1 + max((s.sequence for s in folder.list_snapshots()), default=0)
            values = {"grade": "stable", "blocks": blocks.close(), "started": self.now, "finished": self.now, **fields}
            writer.seal()
            name = folder.save_snapshot(z.Snapshot(z.name_time(values["started"]), node, sequence, **values)).name
        self.wanted[node, name] = {name: data for name, data in files.items() if isinstance(data, bytes)}
        return name

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run a command in this process; returns what it printed, problems last."""
        self.capsys.readouterr()
        found = z.main([*arguments[:1], "--store", str(self.path), *arguments[1:]])
        said = "".join(self.capsys.readouterr())
        assert found == code, f"exit code {found}: {said}"
        return said

    def prune(self, *arguments: str, code: int = 0) -> str:
        return self.run("prune", "--reserve", "0", *arguments, code=code)

    def names(self, node: str = "here") -> list[str]:
        return sorted(path.stem for path in (self.path / node / "snapshots").glob("*.json"))

    def trash(self, node: str = "here") -> list[str]:
        return sorted(path.stem.partition("~")[0] for path in (self.path / node / "trash").glob("*.json"))

    def packs(self) -> dict[str, int]:
        """Return the sizes of all packs."""
        return {path.stem: path.stat().st_size for path in (self.path / "packs").glob("??/*.pack")}

    def size(self) -> int:
        return sum(self.packs().values())

    def read(self, node: str, name: str) -> dict[str, bytes]:
        """Return all files of a snapshot, each chunk checked."""
        found = {}
        with self.open() as store, contextlib.closing(store.reader()) as reader:
            snapshot = store.node(node).load_snapshot(name)
            for entry in z.list_entries(reader, snapshot.blocks):
                chunks = z.list_chunks(reader, entry.content)
                parts = [bytes(z.CHUNK * c) if isinstance(c, int) else reader.get(c) for c in chunks]
                found[entry.stat.path.decode()] = b"".join(parts)
        return found

    def check(self, code: int = 0) -> None:
        """Read each snapshot back, and verify the store."""
        nodes = {path.parent.parent.name for path in self.path.glob("*/snapshots/*.json")}
        for node in nodes:
            for name in self.names(node):
                found = self.read(node, name)
                wanted = self.wanted[node, name]
                assert {path: found[path] for path in wanted} == wanted, f"{node}/{name}"
        self.run("verify", code=code)


@pytest.fixture
def shop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], zone: Callable[[str], None]
) -> Shop:
    return Shop(tmp_path, monkeypatch, capsys)


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return all that is in a folder: modes, times and bytes."""
    found = {}
    for file in sorted(path.rglob("*")):
        stat = file.lstat()
        found[str(file.relative_to(path))] = (
            stat.st_mode,
            0 if file.is_dir() else stat.st_mtime_ns,
            file.read_bytes() if file.is_file() else b"",
        )
    return found


def damage_pack(shop: Shop, name: str, at: float = 0.3) -> None:
    """Change one byte of a pack."""
    path = shop.path / "packs" / name[:2] / f"{name}.pack"
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0xFF
    path.write_bytes(data)


def new_packs(shop: Shop, before: Mapping[str, int]) -> list[str]:
    return sorted(shop.packs().keys() - before.keys())


# ---- snapshots to the trash and back ----


def three(shop: Shop) -> list[str]:
    """Make three snapshots that have little in common."""
    return [shop.save({"a": noise(200_000, n), "same": noise(50_000, "same")}) for n in range(3)]


def test_prune_moves_to_the_trash_and_frees_nothing_yet(shop: Shop) -> None:
    names = three(shop)
    before = shop.packs()
    said = shop.prune("--keep", "last 1")
    assert shop.names() == names[2:] and shop.trash() == names[:2]
    assert shop.packs() == before
    assert re.search(rf"{names[0]} +stable +remove +no rule keeps it\n", said)
    assert re.search(rf"{names[2]} +stable +keep +last 1\n", said)
    assert "prune: 2 snapshots removed, 0 purged from the trash, 0 packs dropped, 0 rewritten, 0 B freed" in said
    removed = [path.stem.partition("~")[2] for path in (shop.path / "here/trash").iterdir()]
    assert removed == [z.name_time(shop.now)] * 2
    shop.check()


def test_prune_without_keep_removes_no_snapshot(shop: Shop) -> None:
    names = three(shop)
    said = shop.prune()
    assert shop.names() == names and not shop.trash()
    assert said.count("no --keep is given") == 3


def test_grace_is_exact(shop: Shop) -> None:
    names = three(shop)
    shop.now = shop.now // SECOND * SECOND
    shop.prune("--keep", "last 1")
    removed = shop.now
    shop.now = removed + 7 * DAY - 1
    shop.prune()
    assert shop.trash() == names[:2]
    assert "prune: 0 snapshots removed, 0 purged" in shop.prune("--grace", "8d")
    shop.now = removed + 7 * DAY
    before = shop.size()
    said = shop.prune()
    assert shop.trash() == []
    assert f"purge from the trash: here/{names[0]}" in said and "2 purged from the trash" in said
    assert before - shop.size() > 390_000
    shop.check()


def test_grace_of_another_length(shop: Shop) -> None:
    names = three(shop)
    shop.prune("--keep", "last 1")
    shop.now += 3 * HOUR
    shop.prune("--grace", "4h")
    assert shop.trash() == names[:2]
    shop.prune("--grace", "1h")
    assert shop.trash() == []


def test_without_grace_nothing_goes_through_the_trash(shop: Shop) -> None:
    names = three(shop)
    shop.prune("--keep", "last 2")
    before = shop.size()
    said = shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.names() == names[2:] and shop.trash() == []
    assert "1 snapshots removed, 1 purged from the trash" in said
    assert before - shop.size() > 390_000
    shop.check()


def test_trash_of_a_clock_that_was_ahead_stays(shop: Shop) -> None:
    names = three(shop)
    shop.now += 400 * DAY
    shop.prune("--keep", "last 1")
    shop.now -= 400 * DAY
    shop.prune()
    assert shop.trash() == names[:2]


def test_undelete_brings_back_every_byte(shop: Shop) -> None:
    names = three(shop)
    shop.prune("--keep", "last 1")
    assert shop.run("undelete", "here", names[0]) == f"here/{names[0]} is back\n"
    assert shop.names() == [names[0], names[2]] and shop.trash() == [names[1]]
    shop.now += 30 * DAY
    shop.prune()
    assert shop.trash() == []
    shop.check()
    shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.names() == names[2:]


def test_undelete_all(shop: Shop) -> None:
    names = three(shop)
    shop.prune("--keep", "last 1")
    assert shop.run("undelete", "here", "--all").splitlines() == [f"here/{name} is back" for name in names[:2]]
    assert shop.names() == names and shop.trash() == []
    assert shop.run("undelete", "here", "--all") == ""
    shop.check()


def test_undelete_of_a_name_that_is_not_there(shop: Shop) -> None:
    names = three(shop)
    shop.prune("--keep", "last 1")
    said = shop.run("undelete", "here", names[0], names[2], code=2)
    assert said == f"zbackup: the trash of here has no {names[2]}; it has {names[0]}, {names[1]}\n"
    assert shop.trash() == names[:2]  # all or nothing
    shop.run("undelete", "here", "--all")
    assert "it has nothing" in shop.run("undelete", "here", names[0], code=2)
    assert "the store has no node there; it has: here" in shop.run("undelete", "there", "--all", code=2)


@pytest.mark.parametrize("arguments", [[], ["2026-01-01T00-00-00Z", "--all"]])
def test_undelete_of_nothing_or_both(shop: Shop, arguments: list[str]) -> None:
    three(shop)
    assert "Name them, or --all" in shop.run("undelete", "here", *arguments, code=2)


def test_undelete_that_was_interrupted(shop: Shop) -> None:
    """The snapshot has both names then; each command sees it through."""
    names = three(shop)
    shop.prune("--keep", "last 1")
    (trashed,) = (shop.path / "here/trash").glob(f"{names[0]}~*")
    os.link(trashed, shop.path / "here/snapshots" / f"{names[0]}.json")
    shop.run("undelete", "here", names[0])
    assert shop.names() == [names[0], names[2]] and shop.trash() == [names[1]]
    shop.check()


def test_undelete_never_replaces_another_snapshot(shop: Shop) -> None:
    names = three(shop)
    shop.prune("--keep", "last 1")
    other = shop.path / "here/snapshots" / f"{names[0]}.json"
    shutil.copy(shop.path / "here/snapshots" / f"{names[2]}.json", other)
    before = other.read_bytes()
    said = shop.run("undelete", "here", names[0], code=4)
    assert f"here has another snapshot {names[0]}" in said
    assert other.read_bytes() == before and names[0] in shop.trash()


def test_removal_that_was_interrupted(shop: Shop) -> None:
    """A snapshot that stands in the trash and among the others is there, and can be removed again."""
    names = three(shop)
    shop.prune("--keep", "last 1")
    (trashed,) = (shop.path / "here/trash").glob(f"{names[0]}~*")
    os.link(trashed, shop.path / "here/snapshots" / f"{names[0]}.json")
    shop.now += HOUR
    shop.prune("--keep", "last 1")
    assert shop.names() == names[2:]
    shop.run("undelete", "here", "--all")
    assert shop.names() == names and shop.trash() == []
    shop.check()


def test_trash_is_listed(shop: Shop) -> None:
    names = three(shop)
    assert shop.run("list", "here", "--trash").split() == ["SNAPSHOT", "GRADE", "FILES", "SIZE", "REMOVED"]
    shop.prune("--keep", "last 1")
    rows = json.loads(shop.run("list", "here", "--trash", "--json"))
    assert [row["SNAPSHOT"] for row in rows] == names[:2]
    assert [row["REMOVED"] for row in rows] == [z.format_time(shop.now)] * 2
    assert [row["SNAPSHOT"] for row in json.loads(shop.run("list", "here", "--json"))] == names[2:]


# ---- what is refused, held, or not known ----


def test_refused_rules_change_no_node(shop: Shop) -> None:
    """`last 0` keeps none; that one node has nothing good does not save the others."""
    shop.save({"a": b"bad"}, node="bad", grade="torn")
    names = [shop.save({"a": b"one"}, node="good"), shop.save({"a": b"two"}, node="good")]
    before = tree(shop.path)
    said = shop.prune("--keep", "last 0", "--grace", "0", code=2)
    assert "--keep would remove all 2 snapshots of good; nothing is removed" in said
    assert shop.names("good") == names
    assert tree(shop.path) == before


def test_each_node_is_counted_on_its_own(shop: Shop) -> None:
    early = [shop.save({"a": b"early %d" % n}, node="early") for n in range(3)]
    late = [shop.save({"a": b"late %d" % n}, node="late") for n in range(3)]
    shop.prune("--keep", "last 2")
    assert (shop.names("early"), shop.names("late")) == (early[1:], late[1:])


def test_absent_node_loses_nothing_however_old(shop: Shop) -> None:
    gone = [shop.save({"a": noise(5000, n)}, node="gone", started=T0 - 4000 * DAY + n * DAY) for n in range(3)]
    shop.save({"a": b"here"})
    for _ in range(3):
        shop.now += 400 * DAY
        shop.save({"a": b"here %d" % shop.now})
        shop.prune("--keep", "last 2, daily 7, monthly 2")
        assert shop.names("gone") == gone
    shop.check()


def test_last_good_one_stays_under_bad_ones(shop: Shop) -> None:
    good = shop.save({"a": b"good"})
    bad = [shop.save({"a": b"bad %d" % n}, grade="torn") for n in range(5)]
    shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.names() == [good, *bad]
    newer = shop.save({"a": b"newer"})
    shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.names() == [newer]


def test_snapshot_that_latest_shows_stays(shop: Shop) -> None:
    names = three(shop)
    with shop.open() as store:
        folder = store.node("here")
        folder.save_latest(z.LatestState(names[0], next=names[1]))
        shop.prune("--keep", "last 1", "--lock-wait", "0", code=4)  # in use by this very process
    (shop.path / "here/latest").mkdir()
    said = shop.prune("--keep", "last 1")
    assert shop.names() == names and said.count("shown by latest") == 2
    (shop.path / "here/latest").rmdir()  # the user does without it
    shop.prune("--keep", "last 1")
    assert shop.names() == names[2:]


def test_harmed_snapshot_does_not_count_after_repair(shop: Shop) -> None:
    names = three(shop)
    with shop.open() as store:
        store.save_lost(z.Lost(frozenset(), {"here": (names[2],)}))
    shop.prune("--keep", "last 1")
    assert shop.names() == names[1:]


def test_held_snapshots_stay_until_release(shop: Shop) -> None:
    names = [shop.save({"a": noise(1000, n)}, alarm="it has 1 files" if n == 2 else "") for n in range(5)]
    said = shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.names() == [*names[:3], names[4]]
    assert said.count(f"held by the alarm of {names[2]}, until `release here`") == 3
    said = shop.run("release", "here")
    assert said == f"here: the alarm of {names[2]} (it has 1 files) is answered; older snapshots may go again\n"
    assert shop.run("release", "here") == "here has no alarm\n"
    shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.names() == names[4:]
    again = shop.save({"a": b""}, alarm="it has 0 files")
    shop.prune("--keep", "last 1")
    assert shop.names() == [names[4], again]  # the next alarm is another one


def test_release_of_one_node_leaves_the_others_held(shop: Shop) -> None:
    for node in ("one", "two"):
        shop.save({"a": b"full"}, node=node)
        shop.save({}, node=node, alarm="it has 0 files")
        shop.save({}, node=node)
    shop.run("release", "one")
    shop.prune("--keep", "last 1")
    assert (len(shop.names("one")), len(shop.names("two"))) == (1, 3)


def test_release_of_a_node_that_is_not_there(shop: Shop) -> None:
    three(shop)
    assert "the store has no node there" in shop.run("release", "there", code=2)


def test_release_while_the_node_is_copied(shop: Shop) -> None:
    """The copy writes node.json, too; the answer must not be lost."""
    shop.save({}, alarm="it has 0 files")
    with held(shop.path / "here/lock", "exclusive"):
        assert "another run is copying here" in shop.run("release", "here", code=4)
    assert "is answered" in shop.run("release", "here")


@pytest.mark.parametrize("left", [b"", b"{]"])
def test_release_of_a_node_whose_node_json_is_lost(shop: Shop, left: bytes) -> None:
    """Else its snapshots would be held until the node is back, which may be never."""
    three(shop)
    shop.save({}, alarm="it has 0 files")
    path = shop.path / "here/node.json"
    path.unlink()
    if left:
        path.write_bytes(left)
    z.main(["release", "--store", str(shop.path), "here"])
    with shop.open() as store:
        assert z.load_history(store, "here").alarm is None


def test_alarm_is_listed(shop: Shop) -> None:
    three(shop)
    shop.save({}, alarm="it has 0 files")
    assert [row["NOTE"] for row in json.loads(shop.run("list", "here", "--json"))] == [
        *("", "", ""),
        "alarm: it has 0 files",
    ]


# ---- the dry run, JSON, locks ----


def crowded(shop: Shop) -> list[str]:
    """Make a store in which a prune has everything to do; returns the snapshots of `here`."""
    gone = [shop.save({"a": noise(100_000, f"gone {n}")}) for n in range(2)]
    shop.prune("--keep", "last 1")
    shop.now += 10 * DAY  # so that gone[0] is purged, and with it its pack is dead
    names = [gone[1]]
    names.append(shop.save({"a": noise(300_000, "half"), "b": noise(100_000, "kept")}))
    names += [shop.save({"b": noise(100_000, "kept"), "c": b"c" * n}) for n in (1, 2)]
    return names


def test_dry_run_changes_nothing_at_all(shop: Shop) -> None:
    names = crowded(shop)
    before = tree(shop.path)
    said = shop.prune("--keep", "last 2", "--dry-run", "--grace", "0")
    assert tree(shop.path) == before
    for name, what in zip(names, ["remove", "remove", "keep", "keep"]):
        assert re.search(rf"{name} +stable +{what} +\S", said)
    assert "purge from the trash: here/" in said
    assert re.search(r"drop 2 packs \([\d.]+ KiB\)\n", said)
    assert re.search(r"rewrite 1 packs \([\d.]+ KiB, of which [\d.]+ KiB are in use\)\n", said)
    assert said.endswith("prune: this was a dry run, nothing is changed\n")
    assert "freed" not in said
    done = shop.prune("--keep", "last 2", "--grace", "0")
    assert done.splitlines()[:-1] == said.splitlines()[:-1]  # it did what the dry run said
    assert "2 snapshots removed, 1 purged from the trash, 2 packs dropped, 1 rewritten" in done
    shop.check()


def test_prune_as_json(shop: Shop) -> None:
    names = crowded(shop)
    packs = shop.packs()
    for flags in (["--dry-run"], []):
        said = json.loads(shop.prune("--keep", "last 2", "--grace", "0", "--json", *flags))
        assert [row["snapshot"] for row in said["nodes"]["here"]] == names
        assert [row["keep"] for row in said["nodes"]["here"]] == [False, False, True, True]
        assert said["nodes"]["here"][0]["reason"] == "no rule keeps it"
        assert [row[0] for row in said["expired"]] == ["here"]
        assert len(said["dead"]) == 2 and all(packs[name] == size for name, size in said["dead"].items())
        ((name, (size, live)),) = said["sparse"].items()
        assert packs[name] == size and 95_000 < live < 130_000
        assert said["problem"] == ""
    assert (said["removed"], said["purged"], said["dropped"], said["rewritten"]) == (2, 1, 2, 1)
    assert said["freed"] == sum(packs.values()) - shop.size()


def test_quiet_prune_says_nothing(shop: Shop) -> None:
    crowded(shop)
    assert shop.prune("--keep", "last 1", "--quiet") == ""


def test_prune_of_a_folder_that_is_no_store(shop: Shop, tmp_path: Path) -> None:
    assert z.main(["prune", "--store", str(tmp_path / "none")]) == 4
    assert "is not a zbackup store" in shop.capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_prune_of_an_empty_store(shop: Shop) -> None:
    assert "0 snapshots removed" in shop.prune("--keep", "last 1")


@pytest.mark.parametrize("how", ["shared", "exclusive"])
def test_store_that_another_run_has(shop: Shop, how: str) -> None:
    three(shop)
    before = tree(shop.path)
    with held(shop.path / "lock", how):
        said = shop.prune("--keep", "last 1", "--lock-wait", "0", code=4)
        assert "not pruned: " in said and "in use by another run" in said
        shop.prune("--keep", "last 1", "--dry-run", "--lock-wait", "0", code=0 if how == "shared" else 4)
        undeleted = shop.run("undelete", "here", "--all", "--lock-wait", "0", code=0 if how == "shared" else 4)
        assert ("locked by another run that deletes" in undeleted) == (how == "exclusive")
    assert tree(shop.path) == before


def test_lock_wait_waits(shop: Shop) -> None:
    names = three(shop)
    with held(shop.path / "lock", "shared") as other:
        shop.on_sleep = lambda: other.kill() if shop.slept == 5 else other.wait(20) if shop.slept == 6 else None
        shop.prune("--keep", "last 1", "--lock-wait", "1m")
    assert shop.slept >= 5 and shop.names() == names[2:]
    shop.slept = 0
    shop.on_sleep = lambda: None
    with held(shop.path / "lock", "shared"):
        shop.prune("--lock-wait", "30s", code=4)
    assert shop.slept == 30


# ---- space ----


def test_dead_packs_are_dropped_and_shared_chunks_stay(shop: Shop) -> None:
    """What another node or a later snapshot names stays, whoever brought it."""
    shared = noise(300_000, "shared")
    shop.save({"a": shared, "b": noise(200_000, "old")}, node="one")
    shop.save({"a": shared}, node="two")
    for n in range(2):
        shop.save({"c": noise(200_000, n)}, node="one")
    before = shop.size()
    shop.prune("--keep", "last 1", "--grace", "0")
    assert 390_000 < before - shop.size() < 420_000
    shop.check()


def test_pack_above_the_limit_is_not_rewritten(shop: Shop) -> None:
    """Below 60 % alive a pack is rewritten, above it is left."""
    many = {f"{n}": noise(50_000, n) for n in range(10)}
    shop.save(many)
    before = shop.packs()
    shop.save({name: many[name] for name in list(many)[:7]})
    shop.prune("--keep", "last 1", "--grace", "0")
    assert before.keys() <= shop.packs().keys()
    shop.save({name: many[name] for name in list(many)[:5]})
    said = shop.prune("--keep", "last 1", "--grace", "0")
    assert not before.keys() & shop.packs().keys() and ", 1 rewritten" in said
    assert 250_000 < shop.size() < 262_000
    shop.check()


def halves(shop: Shop, count: int, size: int = 100_000) -> None:
    """Make packs of which a bit more than half is dead, after a prune that keeps the last two snapshots only.

    The emptier a pack is, the earlier it was made.
    """
    parts = {}
    for n in range(count):
        live = noise(size * (count + n) // (3 * count), f"live {n}")
        shop.save({"dead": noise(size - len(live), f"dead {n}"), "live": live})
        parts[f"live {n}"] = live
    shop.save(parts)
    shop.save({**parts, "more": b"more"})


def test_repack_keeps_every_byte_and_frees_the_rest(shop: Shop) -> None:
    halves(shop, 3)
    before = shop.packs()
    said = shop.prune("--keep", "last 2", "--grace", "0")
    assert "0 packs dropped, 3 rewritten" in said
    assert len(before.keys() - shop.packs().keys()) == 3
    assert 165_000 < sum(before.values()) - shop.size() < 185_000
    shop.check()
    after = tree(shop.path)
    assert "0 packs dropped, 0 rewritten, 0 B freed" in shop.prune("--keep", "last 2", "--grace", "0")
    assert {name: found[2] for name, found in tree(shop.path).items() if "index" not in name} == {
        name: found[2] for name, found in after.items() if "index" not in name
    }


def test_max_repack_bounds_each_run(shop: Shop) -> None:
    """Each run rewrites as much as it may, the emptiest pack first."""
    halves(shop, 3)
    packs = shop.packs()
    assert len(packs) == 5
    assert ", 0 rewritten" in shop.prune("--keep", "last 2", "--grace", "0", "--max-repack", "0")
    assert shop.packs().keys() == packs.keys()
    for left in (2, 1, 0):
        assert ", 1 rewritten" in shop.prune("--max-repack", "150K")
        assert len(packs.keys() & shop.packs().keys()) == left + 2
        shop.check()
    assert ", 0 rewritten" in shop.prune("--max-repack", "150K")


def test_emptiest_pack_is_rewritten_first(shop: Shop) -> None:
    halves(shop, 3)
    said = json.loads(shop.prune("--keep", "last 2", "--grace", "0", "--max-repack", "150K", "--dry-run", "--json"))
    ((_, (size, live)),) = said["sparse"].items()
    assert live / size < 0.36
    assert len(json.loads(shop.prune("--keep", "last 2", "--dry-run", "--json", "--grace", "0"))["sparse"]) == 3


def test_pack_larger_than_the_limit_does_not_keep_others_from_being_rewritten(shop: Shop) -> None:
    live = {name: noise(30_000, name) for name in ("large", "small")}
    shop.save({"dead": noise(400_000, "dead large"), "live": live["large"]})
    shop.save({"dead": noise(60_000, "dead small"), "live": live["small"]})
    shop.save(live)
    said = shop.prune("--keep", "last 1", "--grace", "0", "--max-repack", "200K")
    assert ", 1 rewritten" in said
    shop.check()


def test_index_that_is_gone_is_made_again_first(shop: Shop) -> None:
    halves(shop, 2)
    for path in shop.path.glob("index.sqlite*"):
        path.unlink()
    assert ", 2 rewritten" in shop.prune("--keep", "last 2", "--grace", "0")
    shop.check()


def test_index_that_knows_nothing_of_a_new_pack(shop: Shop) -> None:
    """What the packs say counts (I4), whatever state the index is in."""
    halves(shop, 2)
    with contextlib.closing(sqlite3.connect(shop.path / "index.sqlite")) as index:
        index.execute("DELETE FROM chunks WHERE pack = 3")
        index.execute("DELETE FROM packs WHERE id = 3")
        index.commit()
    shop.prune("--keep", "last 2", "--grace", "0")
    shop.check()


# ---- patches, lists, duplicates ----


def put_patched(shop: Shop, base: bytes, changed: bytes, at: int) -> tuple[z.Content, bytes]:
    """Put a pack that has a chunk as a patch of `base`; returns the file and its bytes."""
    data = base[:at] + changed + base[at + len(changed) :]
    digest = z.digest_pages(z.hash_pages(data))
    source = z.digest_pages(z.hash_pages(base))
    with shop.writing() as writer:
        end = at + len(changed)
        new = writer.put_chunk(changed)
        runs = [z.Run(source, 0, at), z.Run(new, 0, len(changed)), z.Run(source, end, len(base) - end)]
        writer.put_patch(digest, runs)
    return z.Content(len(data), (digest,), (), "stable"), data


def test_source_of_a_patch_outlives_its_own_snapshot(shop: Shop) -> None:
    """Only the patch needs the chunk still; all else of its pack goes."""
    base = noise(100_000, "base")
    shop.save({"a": base, "b": noise(400_000, "dead")})
    content, data = put_patched(shop, base, noise(4096, "changed"), 8192)
    name = shop.save({"a": content})
    shop.wanted["here", name]["a"] = data
    before = shop.size()
    said = shop.prune("--keep", "last 1", "--grace", "0")
    assert ", 1 rewritten" in said and before - shop.size() > 390_000
    shop.check()
    again = shop.save({"b": b""})
    assert "packs dropped" in shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.names() == [again] and shop.size() < 2000  # no patch needs it any more


def test_patches_are_rewritten_as_patches(shop: Shop) -> None:
    base = noise(100_000, "base")
    shop.save({"a": base})
    contents = [put_patched(shop, base, noise(4096, n), 8192 * n) for n in range(3)]
    first = shop.save({f"{n}": content for n, (content, _) in enumerate(contents)})
    with shop.writing() as writer:
        writer.put_chunk(noise(20_000, "dead"))  # which no snapshot ever names
    last = shop.save({"a": base, "1": contents[1][0]})
    shop.wanted["here", last]["1"] = contents[1][1]
    shop.wanted["here", first] = {f"{n}": data for n, (_, data) in enumerate(contents)}
    said = shop.prune("--keep", "last 1", "--grace", "0")
    assert re.search(r"[3-9] packs dropped", said)
    assert 104_000 < shop.size() < 108_000
    shop.check()


@pytest.mark.parametrize("harm", ["none", "the whole chunk", "the patch"])
@pytest.mark.parametrize("whole_first", [True, False])
def test_chunk_that_stands_in_two_packs(shop: Shop, harm: str, whole_first: bool) -> None:
    """A sound one stays: whole before patch, for other patches draw from it."""
    base = noise(50_000, "base")
    shop.save({"base": base})
    source = z.digest_pages(z.hash_pages(base))
    data = base[:40_000]
    digest = z.digest_pages(z.hash_pages(data))

    def put_whole() -> None:
        with shop.writing() as writer:
            writer.distrusted = {digest}
            writer.put_chunk(data)

    def put_patch() -> None:
        run = z.Run(source, 4096 if harm == "the patch" else 0, 40_000)
        with shop.writing() as writer:
            writer.distrusted = {digest}
            writer.put_patch(digest, [run])

    names = []
    for put in (put_whole, put_patch) if whole_first else (put_patch, put_whole):
        before = shop.packs()
        put()
        names += new_packs(shop, before)
    whole, patch = names if whole_first else names[::-1]
    name = shop.save({"a": z.Content(len(data), (digest,), (), "stable")})
    shop.wanted["here", name]["a"] = data
    if harm == "the whole chunk":
        damage_pack(shop, whole, 0.5)
    said = shop.prune("--keep", "last 1", "--grace", "0", code=0)
    assert "rewritten" in said
    left = shop.packs()
    assert (whole in left) == (harm != "the whole chunk")
    assert (patch in left) == (harm == "the whole chunk")
    shop.check()


def test_frames_of_two_packs_with_the_same_chunks(shop: Shop) -> None:
    """Pulls side by side may bring one chunk twice; a prune leaves it once."""
    data = noise(200_000, "twice")
    digest = z.digest_pages(z.hash_pages(data))
    shop.save({"a": data})
    with shop.writing() as writer:
        writer.distrusted = {digest}
        writer.put_chunk(data)
        writer.put_chunk(noise(1000, "so that it is another pack"))
    assert shop.size() > 400_000
    shop.prune()
    assert shop.size() < 205_000
    shop.check()


def make_listed(shop: Shop, monkeypatch: pytest.MonkeyPatch, data: bytes) -> tuple[z.Content, bytes]:
    """Put a file of several lists; returns its content and the bytes of its first list."""
    monkeypatch.setattr(z, "LIST_SPAN", 3)
    with shop.writing() as writer:
        lists = z.ListWriter(writer)
        for at in range(0, len(data), 10_000):
            lists.put(writer.put_chunk(data[at : at + 10_000]))
        lists.put_zeros(2)
        content = lists.content(len(data) + 2 * z.CHUNK, "stable")
    with shop.open() as store, contextlib.closing(store.reader()) as reader:
        return content, reader.get(content.lists[0])


def test_chunks_that_only_lists_name(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    data = noise(75_000, "long")
    content, _ = make_listed(shop, monkeypatch, data)
    assert len(content.lists) == 4 and content.chunks == ()
    name = shop.save({"long": content})
    shop.wanted["here", name]["long"] = data + bytes(2 * z.CHUNK)
    shop.save({"other": noise(100_000, "dead")})
    shop.save({"long": content})
    shop.prune("--keep", "last 1", "--grace", "0")
    assert shop.size() < 80_000
    (left,) = shop.names()
    shop.wanted["here", left]["long"] = data + bytes(2 * z.CHUNK)
    shop.check()


def test_file_that_has_the_bytes_of_another_files_list(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """One digest, two meanings: a chunk of one file and the list of another."""
    data = noise(75_000, "long")
    content, first_list = make_listed(shop, monkeypatch, data)
    name = shop.save({"a": first_list, "b": content})
    shop.wanted["here", name]["b"] = data + bytes(2 * z.CHUNK)
    shop.prune("--grace", "0")
    shop.check()


def test_file_that_has_the_bytes_of_a_snapshots_block(shop: Shop) -> None:
    """A node knows what its entries look like, so it can serve a file like them; nothing may be lost by it."""
    victim = shop.save({"a": noise(50_000, "precious")}, node="victim")
    with shop.open() as store, contextlib.closing(store.reader()) as reader:
        (block,) = store.node("victim").load_snapshot(victim).blocks
        data = reader.get(block)
    shop.save({"a": data}, node="attacker")  # which comes before it, by name
    shop.prune("--grace", "0")
    shop.check()


def test_large_sparse_file_of_a_real_node(world: World) -> None:
    """Beyond 1 GiB its chunks stand in lists; the node's older content goes."""
    big = world.files / "big"
    with open(big, "wb") as file:
        file.write(noise(300_000, "start"))
        file.truncate((1 << 30) + 5 * MIB)
        file.seek((1 << 30) + 4 * MIB)
        file.write(noise(300_000, "end"))
    (world.files / "small").write_bytes(noise(4_000_000, 1))
    world.node("--margin", "0s")
    world.sweep("--no-latest")
    (world.files / "small").write_bytes(noise(4_000_000, 2))
    world.sweep("--no-latest")
    before = sum(path.stat().st_size for path in world.store.glob("packs/??/*.pack"))
    do(world, "prune", "--keep", "last 1", "--grace", "0")
    after = sum(path.stat().st_size for path in world.store.glob("packs/??/*.pack"))
    assert 3_990_000 < before - after < 4_100_000
    do(world, "verify")
    back = world.restore() / "files/big"
    with open(big, "rb") as one, open(back, "rb") as two:
        assert big.stat().st_size == back.stat().st_size
        for at in (0, (1 << 30) + 4 * MIB):
            one.seek(at)
            two.seek(at)
            assert one.read(400_000) == two.read(400_000)


# ---- a pull that was cut off ----


def test_what_an_unfinished_pull_has_stays(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, lines after them, and the file that was being read: none of it is in a snapshot yet."""
    shop.save({"a": b"a"})
    tail, current = noise(20_000, "tail"), noise(60_000, "current")
    with shop.writing() as writer:
        blocks = z.BlockWriter(writer)
        entries = []
        for name, data in (("b", noise(30_000, "block")), ("c", tail)):
            content = z.Content(len(data), (writer.put_chunk(data),), (), "stable")
            stat = z.Stat(name.encode(), "file", size=len(data))
            entries.append(z.Entry(z.encode_stat(stat), z.encode_content(content)))
        blocks.put(entries[0])
        closed = blocks.close()
        writer.put_chunk(noise(100_000, "dead"))
    content, _ = make_listed(shop, monkeypatch, current)
    reading = z.Entry(z.encode_stat(z.Stat(b"d", "file", size=content.size)), z.encode_content(content))
    with shop.open() as store:
        store.node("here").save_progress(z.Progress(closed, (entries[1].encode(),), reading))
    before = shop.size()
    shop.prune()
    assert before - shop.size() > 95_000
    with shop.open() as store, contextlib.closing(store.reader()) as reader:
        progress = store.node("here").load_progress()
        assert progress.current is not None
        found = [*z.list_entries(reader, progress.blocks), z.Entry.decode(progress.tail[0]), progress.current]
        chunks = [c for entry in found for c in z.list_chunks(reader, entry.content) if isinstance(c, bytes)]
        assert [entry.stat.path for entry in found] == [b"b", b"c", b"d"]
        assert sum(len(reader.get(chunk)) for chunk in chunks) == 110_000


def test_pull_goes_on_after_a_prune(world: World) -> None:
    for number in range(60):
        (world.files / f"{number:02}").write_bytes(noise(200_000, number))
    world.node("--margin", "0s")
    server = world.server("--pack-size", "3MiB", "--window", "1MiB")
    wait_until((world.store / FOLDER / "progress.json").exists, what="progress")
    server.kill()
    sealed = sum(path.stat().st_size for path in world.store.glob("packs/??/*.pack"))
    do(world, "prune", "--keep", "last 1", "--grace", "0")
    assert sum(path.stat().st_size for path in world.store.glob("packs/??/*.pack")) == sealed
    snapshot = world.sweep("--no-latest")["nodes"][0]["snapshot"]
    assert (snapshot["grade"], snapshot["files"]) == ("stable", 60)
    assert snapshot["sent"] < 12_000_000 - sealed + 3 * MIB
    do(world, "verify")


def test_damaged_progress_does_not_stop_a_prune(shop: Shop) -> None:
    shop.save({"a": b"a"})
    (shop.path / "here/progress.json").write_text("{]")
    shop.prune()
    with shop.open() as store:
        store.node("here").save_progress(z.Progress((bytes(32),), (b"no entry\n",)))
    shop.prune()
    shop.check()


# ---- damage: nothing is freed, and it is said ----


def harm_by_losing_a_pack(shop: Shop) -> None:
    name = min(shop.packs(), key=lambda name: shop.packs()[name])
    (shop.path / "packs" / name[:2] / f"{name}.pack").unlink()


def harm_a_footer(shop: Shop) -> None:
    """The index still knows what the pack holds; the pack does not say so any more."""
    damage_pack(shop, min(shop.packs()), 0.99)


def harm_a_block(shop: Shop) -> None:
    """What a snapshot names can no longer be told."""
    with shop.open() as store:
        digest = store.node("here").list_snapshots()[-1].blocks[0]
        place = store.index.find([digest])[digest]
        with open(shop.path / "packs" / place.pack[:2] / f"{place.pack}.pack", "r+b") as file:
            record = z.load_record(file.fileno(), place.record)
            inside = record.starts[place.place] + 10 if record.codec == 0 else record.stored // 2
            file.seek(record.data_offset + inside)
            file.write(b"\xff" * 8)


def harm_a_snapshot(shop: Shop) -> None:
    (shop.path / "here/snapshots" / f"{shop.names()[1]}.json").write_text("{]")


def harm_the_trash(shop: Shop) -> None:
    next((shop.path / "here/trash").iterdir()).write_text("{]")


def harm_a_name_in_the_trash(shop: Shop) -> None:
    path = next((shop.path / "here/trash").iterdir())
    path.rename(path.parent / "2026-01-01T00-00-00Z~soon.json")


@pytest.mark.parametrize(
    "harm",
    [
        *(harm_by_losing_a_pack, harm_a_footer, harm_a_block),
        *(harm_a_snapshot, harm_the_trash, harm_a_name_in_the_trash),
    ],
)
def test_damaged_store_frees_no_space(shop: Shop, harm: Callable[[Shop], None]) -> None:
    shop.save({"a": noise(3000, "oldest")})
    shop.save({"a": noise(3000, "old")})
    shop.prune("--keep", "last 1")
    for n in range(3):
        shop.save({"a": noise(3000 + n, n)})
    harm(shop)
    left = shop.packs()
    for flags in (["--dry-run"], [], []):
        said = shop.prune(*flags, code=4)
        assert "nothing is removed while the store is damaged" in said and "`repair` it first" in said
        assert not re.search("drop [1-9]|rewrite [1-9]", said)
        assert shop.packs() == left
    assert "damaged" in json.loads(shop.prune("--json", code=4).splitlines()[0])["problem"]


def test_damaged_store_loses_no_snapshot_for_good(shop: Shop) -> None:
    """The newest one that seems good may be what is damaged: never the last good one."""
    names = [shop.save({"a": noise(3000, n)}) for n in range(3)]
    with shop.open() as store:
        digest = store.node("here").list_snapshots()[-1].blocks[0]
        store.note_damage(store.index.find([digest])[digest].pack, z.BAD_PACK)
    shop.prune("--keep", "last 1", "--grace", "0", code=4)
    assert sorted(shop.names() + shop.trash()) == names


def test_damage_that_a_repack_meets_is_told(shop: Shop) -> None:
    """The rest is done all the same, and the damaged pack stays as it is."""
    halves(shop, 2)
    with shop.open() as store:
        reader = store.reader()
        snapshot = store.node("here").list_snapshots()[-1]
        entry = next(e for e in z.list_entries(reader, snapshot.blocks) if e.stat.path == b"live 0")
        place = store.index.find([entry.content.chunks[0]])[entry.content.chunks[0]]
        reader.close()
    damage_pack(shop, place.pack, 0.75)  # what is in use lies behind what is not
    said = shop.prune("--keep", "last 2", "--grace", "0", code=4)
    assert f"pack {place.pack} is damaged" in said and "see `repair`" in said and ", 1 rewritten" in said
    assert place.pack in shop.packs()
    assert (shop.path / "damage" / f"{place.pack}.damaged").exists()
    assert "nothing is removed while the store is damaged" in shop.prune(code=4)


def test_disk_that_fails_while_packs_are_rewritten(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is the store's, and told in one sentence; it must not end a server."""
    halves(shop, 2)
    before = shop.packs()
    load = z.load_raw

    def fail(fd: int, record: z.Record) -> bytes:
        if record.raw >= 90_000:
            raise OSError(5, "Input/output error")
        return load(fd, record)

    monkeypatch.setattr(z, "load_raw", fail)
    monkeypatch.setattr(os, "dup2", lambda *arguments: pytest.fail("taken for a broken pipe"))
    said = shop.prune("--keep", "last 2", "--grace", "0", "--quiet", code=4)
    assert "Input/output error" in said and len(said.splitlines()) == 1
    assert before.keys() <= shop.packs().keys()
    monkeypatch.undo()


def test_prune_after_repair_works_again(shop: Shop) -> None:
    names = three(shop)
    harm_a_block(shop)
    shop.prune("--keep", "last 1", "--grace", "0", code=4)
    left = shop.names()
    shop.run("repair", "--reserve", "0")
    said = shop.prune("--keep", "last 1", "--grace", "0")
    assert "no space is freed" not in said
    good = [name for name in shop.names() if name != names[2]]
    assert names[2] in shop.names() and good == [name for name in left if name == names[1]]


# ---- interrupted, and run again ----


def prune_in_child(store: Path, now: int, number: int, how: int) -> int:
    """Prune in a child that gets a signal at its call `number` of those that change the disk.

    Returns its exit code, negative where the signal ended it.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), how)
            return call(*arguments, **options)

        return run

    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in ("unlink", "rename", "replace", "link", "mkdir", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        z.Index.remove_pack = counted(z.Index.remove_pack)  # type: ignore[method-assign]
        z.Index.put_pack = counted(z.Index.put_pack)  # type: ignore[method-assign]
        z.make_clock = lambda: z.Clock(lambda: now, lambda: 0.0, lambda seconds: None)
        code = z.main(["prune", "--store", str(store), "--keep", "last 2", "--reserve", "64K"])
    finally:
        os._exit(code)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_prune_interrupted_at_any_point_and_run_again(shop: Shop, how: int) -> None:
    """Whatever it was doing: all that stays can be restored, and the next run ends where it would have."""
    crowded(shop)
    halves(shop, 2, size=20_000)
    (expired,) = shop.trash()
    names = shop.names()
    template = shop.path
    shutil.copytree(template, template.with_name("whole"))
    assert prune_in_child(template.with_name("whole"), shop.now, 0, how) == 0
    ends = sorted(path.stat().st_size for path in template.with_name("whole").glob("packs/??/*.pack"))
    for number in range(1, 200) if how == signal.SIGKILL else range(2, 200, 3):
        shop.path = template.with_name(f"copy {number}")
        shutil.copytree(template, shop.path)
        code = prune_in_child(shop.path, shop.now, number, how)
        if code == 0:
            break
        assert code == (-how if how == signal.SIGKILL else 130)
        assert {*shop.names(), *shop.trash()} - {expired} == {*names}
        if number % 5 == 0:
            shop.check()
        assert prune_in_child(shop.path, shop.now + SECOND, 0, how) == 0
        assert (shop.names(), {*shop.trash()}) == (names[-2:], {*names[:-2]})
        assert not list(shop.path.rglob("incoming-*")) and not list(shop.path.rglob(f"{z.TEMPORARY}*"))
        assert sorted(shop.packs().values()) == ends
        shop.check()
        shutil.rmtree(shop.path)
    assert number > 25, "the signal found few places to strike"


def test_prune_interrupted_while_it_waits_for_the_lock(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node()
    world.sweep()
    with held(world.store / "lock", "shared"):
        prune = Process(["prune", "--lock-wait", "1h"], world.path, uncovered(world.env))
        world.nodes.append(prune)
        wait_until(lambda: "prune" in Path(f"/proc/{prune.pid}/cmdline").read_text(), what="a start")
        wait_until(lambda: is_polling(prune, world.store / "lock"), what="waiting")
        assert prune.stop(signal.SIGINT) == 130
    assert prune.output == "zbackup: interrupted\n"


def is_polling(process: Process, lock: Path) -> bool:
    """Tell whether a process sleeps in Python's time.sleep, as one does that waits for a lock."""
    with contextlib.suppress(OSError):
        return "nanosleep" in Path(f"/proc/{process.pid}/wchan").read_text()
    return False


def test_removal_interrupted_and_run_again_within_the_same_second(shop: Shop) -> None:
    """The name in the trash is taken then, by the very same snapshot."""
    names = three(shop)
    shop.prune("--keep", "last 1")
    (trashed,) = (shop.path / "here/trash").glob(f"{names[0]}~*")
    os.link(trashed, shop.path / "here/snapshots" / f"{names[0]}.json")
    shop.prune("--keep", "last 1")
    assert (shop.names(), shop.trash()) == (names[2:], names[:2])


def test_removal_interrupted_and_run_again_later(shop: Shop) -> None:
    """It is one snapshot, not two, for whoever looks into the trash."""
    names = three(shop)
    shop.prune("--keep", "last 1")
    (trashed,) = (shop.path / "here/trash").glob(f"{names[0]}~*")
    os.link(trashed, shop.path / "here/snapshots" / f"{names[0]}.json")
    shop.now += HOUR
    shop.prune("--keep", "last 1")
    assert shop.run("undelete", "here", "--all").count(f"here/{names[0]} is back") == 1


# ---- a full disk ----


def mount(kind: Sequence[str], folder: Path) -> None:
    folder.mkdir()
    done = subprocess.run(["mount", *kind, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small filesystem can be mounted here: {done.stderr}")


@pytest.fixture(params=["tmpfs", "ext4"])
def full_shop(shop: Shop, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """A store on a filesystem of 8 MiB."""
    disk = tmp_path / "disk"
    if request.param == "tmpfs":
        mount(["-t", "tmpfs", "-o", "size=8m", "none"], disk)
    else:
        with open(tmp_path / "image", "wb") as image:
            image.truncate(8 << 20)
        made = subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", tmp_path / "image"])
        if made.returncode:
            pytest.skip("no ext4 can be made here")
        mount(["-o", "loop", str(tmp_path / "image")], disk)
    shutil.move(shop.path, disk / "backups")
    shop.path = disk / "backups"
    yield shop
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(shop: Shop) -> Path:
    """Fill the disk to its last byte."""
    ballast = shop.path.parent / f"ballast{len(list(shop.path.parent.iterdir()))}"
    with open(ballast, "wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    assert z.count_free(str(shop.path)) < 4096
    return ballast


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("grace", ["7d", "0"])
def test_prune_on_a_full_disk(full_shop: Shop, reserve: bool, grace: str) -> None:
    """With nothing left at all, dead packs make the room that the rest needs."""
    shop = full_shop
    for number in range(2):
        shop.save({"a": noise(700_000, f"dead {number}")})
    halves(shop, 3, size=300_000)
    names = shop.names()
    if reserve:
        with shop.open() as store:
            assert store.save_reserve(64 * KIB)
    ballast = fill(shop)
    before = shop.size()
    said = shop.prune("--keep", "last 2", "--grace", grace)
    ballast.unlink()
    assert "5 snapshots removed" in said
    assert shop.names() == names[-2:]
    assert shop.trash() == (names[:-2] if grace == "7d" else [])
    if grace == "0":
        assert "2 packs dropped, 3 rewritten" in said
        assert before - shop.size() > 1_800_000
    shop.check()


def test_rewriting_on_a_full_disk_uses_the_room_it_makes(full_shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pack that went makes room for the next, which only files that are really closed do."""
    shop = full_shop
    for number in range(6):
        shop.save({"live": noise(300_000, number)}, unnamed=noise(600_000, f"dead {number}"))
    with open(shop.path.parent / "room", "wb") as room:
        room.write(bytes(500_000))
        os.fsync(room.fileno())
    fill(shop)
    (shop.path.parent / "room").unlink()
    execute = z.execute_prune
    monkeypatch.setattr(z, "execute_prune", lambda mark, plan, now: execute(mark, plan, now, pack_size=200_000))
    said = shop.prune()
    assert ", 6 rewritten" in said
    shop.check()


def test_disk_without_room_for_any_rewriting(full_shop: Shop) -> None:
    """What cannot be done is told, nothing is lost by it, and it is done when there is room."""
    shop = full_shop
    halves(shop, 2, size=900_000)
    names = shop.names()
    ballast = fill(shop)
    said = shop.prune("--keep", "last 2", "--grace", "0", code=4)
    assert "not all packs could be rewritten" in said and ", 0 rewritten" in said
    assert shop.names() == names[-2:]
    ballast.unlink()
    shop.check()
    assert ", 2 rewritten" in shop.prune()
    shop.check()


def test_store_on_a_full_disk_can_be_read(full_shop: Shop, tmp_path: Path) -> None:
    """A restore to another disk needs no room on this one; nor does a look at what there is."""
    shop = full_shop
    names = three(shop)
    fill(shop)
    assert [row["SNAPSHOT"] for row in json.loads(shop.run("list", "here", "--json"))] == names
    shop.run("restore", "here", "--to", str(tmp_path / "back"))
    assert (tmp_path / "back/a").read_bytes() == noise(200_000, 2)
    shop.prune("--dry-run", "--keep", "last 1")


# ---- the alarm: what looks scrambled ----


def test_what_looks_encrypted() -> None:
    text = b"".join(b"line %d of a text\n" % n for n in range(100_000))
    for size in (512, 600, 3000, 5000, 12_288, 16_384, 20_000, MIB):
        assert z.looks_scrambled(noise(size, size)), size
        assert not z.looks_scrambled(text[:size]), size
        assert not z.looks_scrambled(bytes(size)), size
        assert z.looks_scrambled(memoryview(noise(size, size)))
    assert not z.looks_scrambled(b"")
    assert not z.looks_scrambled(noise(511, 1))  # too few bytes to tell
    head = noise(4096, "head")
    assert not z.looks_scrambled(head + text[:50_000])  # a picture in front of a text
    assert not z.looks_scrambled(text[:50_000] + head)
    assert not z.looks_scrambled(noise(MIB, "hex").hex().encode()[:MIB])


@pytest.mark.parametrize("size", [12_289, 13_000, 15_000])
def test_what_looks_encrypted_where_the_samples_overlap(size: int) -> None:
    assert z.looks_scrambled(noise(size, size))


def alarm_of(before: Mapping[str, int], counts: Mapping[str, int], **receiver: int) -> str:
    """Return what a pull with these counts says of a last good one with those."""
    good = make(1, T0, totals=z.Totals(**before))
    tally = SimpleNamespace(counts={**vars(z.Totals()), **counts}, grades={"stable"})
    fields = SimpleNamespace(**{"scrambled": 0, "opaque": 0, **receiver})
    return z.find_alarm(SimpleNamespace(tally=tally, receiver=fields), good)  # type: ignore[arg-type]


def test_alarm_of_more_than_half() -> None:
    ten = {"files": 10, "size": 1000}
    assert alarm_of(ten, ten) == ""
    assert alarm_of(ten, {"files": 5, "size": 500, "deleted": 5}) == ""
    assert "it has 4 files, where" in alarm_of(ten, {"files": 4, "size": 1000, "deleted": 6})
    assert "its files have 499 B, where" in alarm_of(ten, {"files": 10, "size": 499})
    assert alarm_of(ten, ten, scrambled=5) == ""
    assert "6 of 10 files became bytes that do not compress" in alarm_of(ten, ten, scrambled=6)
    assert alarm_of(ten, {**ten, "files": 16}, opaque=6) == ""  # new pictures beside what was there
    assert "6 of 10 files" in alarm_of(ten, {**ten, "deleted": 6}, opaque=6)
    assert "6 of 10 files" in alarm_of(ten, {**ten, "deleted": 6}, opaque=3, scrambled=3)
    assert alarm_of({"files": 0, "size": 0}, {"files": 0, "size": 0}) == ""
    assert z.find_alarm(None, None) == ""  # type: ignore[arg-type]


@pytest.fixture
def office(world: World) -> World:
    """A node with documents, copied once."""
    for number in range(12):
        (world.files / f"{number}.txt").write_text(f"document {number}, and what it says\n" * (20 + 800 * number))
    (world.files / "sub").mkdir()
    (world.files / "sub/empty").write_bytes(b"")
    world.node("--margin", "0s")
    assert alarm(world) == ""
    return world


def alarm(world: World, *flags: str, code: int = 0) -> str:
    """Make a sweep; returns the alarm of its snapshot."""
    return str(world.sweep("--no-latest", *flags, code=code)["nodes"][0]["snapshot"]["alarm"])


def documents(world: World) -> list[Path]:
    return sorted(world.files.glob("*.txt"))


def empty_folder(world: World) -> None:
    shutil.rmtree(world.files)
    world.files.mkdir()  # as a disk that is not mounted looks


def shrink_files(world: World) -> None:
    for path in documents(world):
        os.truncate(path, path.stat().st_size // 3)


def empty_files(world: World) -> None:
    for path in documents(world):
        path.write_bytes(b"")


def encrypt(world: World) -> None:
    for path in documents(world):
        path.write_bytes(noise(path.stat().st_size, path))


def encrypt_and_rename(world: World) -> None:
    for path in documents(world):
        path.with_name(path.name + ".locked").write_bytes(noise(path.stat().st_size + 256, path))
        path.unlink()


def encrypt_into_other_names(world: World) -> None:
    for number, path in enumerate(documents(world)):
        (world.files / noise(8, number).hex()).write_bytes(noise(path.stat().st_size, path))
        path.unlink()
    (world.files / "RANSOM.txt").write_text("pay")


def encrypt_and_keep_times(world: World) -> None:
    for path in documents(world):
        stat = path.stat()
        path.write_bytes(noise(stat.st_size, path))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (empty_folder, "it has 0 files, where"),
        (shrink_files, "its files have "),
        (empty_files, "its files have 0 B"),
        (encrypt, "12 of 13 files became bytes that do not compress"),
        (encrypt_and_rename, "12 of 13 files became"),
        (encrypt_into_other_names, "12 of 13 files became"),
        (encrypt_and_keep_times, "12 of 13 files became"),
    ],
)
def test_alarm_when_data_seem_lost(office: World, harm: Callable[[World], None], words: str) -> None:
    """The report says so, `list` shows it, and what was before it stays until the release."""
    (first,) = names_of(office)
    harm(office)
    said = office.run(*office.server_flags("--no-latest"), code=1).stderr
    (flagged,) = names_of(office)[1:]
    assert "this looks as if data were lost: " in said and words in said
    assert f"the snapshots before it are kept until `release {FOLDER}`" in said
    note = json.loads(do(office, "list", FOLDER, "--json"))[-1]["NOTE"]
    assert note.startswith("alarm: ") and words in note
    assert alarm(office) == ""  # told once
    do(office, "prune", "--keep", "last 1", "--grace", "0")
    names = names_of(office)
    assert names[:2] == [first, flagged] and len(names) == 3
    do(office, "restore", FOLDER, "--at", first, "--to", str(office.path / "restored"))
    texts = sorted((office.path / "restored/files").glob("*.txt"))
    assert len(texts) == 12
    assert all(path.read_text().startswith(f"document {path.stem}, and") for path in texts)
    do(office, "release", FOLDER)
    do(office, "prune", "--keep", "last 1", "--grace", "0")
    assert names_of(office) == names[2:]


def test_alarm_after_the_released_one_was_damaged(office: World) -> None:
    """It is another one, whatever the number of the last snapshot that can be read."""
    (first,) = names_of(office)
    empty_folder(office)
    assert alarm(office, code=1)
    do(office, "release", FOLDER)
    flagged = names_of(office)[1]
    (office.store / FOLDER / "snapshots" / f"{flagged}.json").write_bytes(b"damaged")
    assert alarm(office, code=4)
    office.run("repair", code=None)
    do(office, "prune", "--keep", "last 1", "--grace", "0")
    assert first in names_of(office)


def test_alarm_is_in_the_report_as_json(office: World) -> None:
    empty_folder(office)
    (node,) = office.sweep(code=1)["nodes"]
    assert node["snapshot"]["alarm"].startswith("it has 0 files")


def test_no_alarm_on_ordinary_days(office: World) -> None:
    files = office.files
    for path in documents(office)[:4]:
        path.write_text("another text\n" * 200)
    assert alarm(office) == ""
    for number in range(40):  # pictures, which do not compress, beside the documents
        (files / f"{number}.jpg").write_bytes(noise(5000 + number, number))
    assert alarm(office) == ""
    for path in documents(office):  # the documents in another folder
        path.rename(files / "sub" / path.name)
    assert alarm(office) == ""
    (files / "sub").rename(files / "renamed")
    assert alarm(office) == ""
    for path in sorted(files.glob("*.jpg"))[:20]:  # other pictures under new names
        path.unlink()
    for number in range(20):
        (files / f"new {number}.jpg").write_bytes(noise(6000 + number, f"new {number}"))
    assert alarm(office) == ""
    for path in sorted(files.glob("*.jpg")):  # all pictures edited
        path.write_bytes(noise(7000, f"edited {path}"))
    assert alarm(office) == ""
    for path in sorted((files / "renamed").glob("*.txt"))[:5]:
        path.write_bytes(noise(20_000, path))
    assert alarm(office) == ""
    for path in sorted(files.glob("*.jpg"))[:10]:
        path.unlink()
    assert alarm(office) == ""


def test_no_alarm_for_a_first_copy_however_it_looks(world: World) -> None:
    for number in range(10):
        (world.files / f"{number}.gpg").write_bytes(noise(5000, number))
    world.node()
    assert alarm(world) == ""


def test_no_alarm_for_a_database_of_random_blobs(world: World) -> None:
    """A database grows, changes some pages and is vacuumed; its rows never compressed."""
    connection = make_database(world.files / "bd", rows=3000)
    world.node("--margin", "0s")
    assert alarm(world) == ""
    for number in range(3):
        connection.execute("UPDATE t SET b = ? WHERE a % 100 = ?", (noise(100, number), number))
        connection.execute("INSERT INTO t VALUES (?, ?)", (10_000 + number, noise(50_000, number)))
        connection.commit()
        assert alarm(world) == ""
    connection.execute("UPDATE t SET b = randomblob(100)")
    connection.commit()
    connection.execute("VACUUM")
    assert alarm(world) == ""
    connection.close()


def test_alarm_for_a_database_that_is_encrypted(world: World) -> None:
    """The one file that most nodes have."""
    with contextlib.closing(sqlite3.connect(world.files / "bd")) as connection:
        connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", ((n, f"the row {n} of a table") for n in range(60_000)))
        connection.commit()
    world.node("--margin", "0s")
    assert alarm(world) == ""
    size = (world.files / "bd").stat().st_size
    assert size > MIB
    (world.files / "bd").write_bytes(noise(size, "key"))
    assert "1 of 1 files became bytes that do not compress" in alarm(world, code=1)


def test_no_alarm_where_the_root_is_missing(office: World) -> None:
    """That is told as it is, and the copy is no good one, so nothing else goes for it."""
    office.files.rename(office.path / "elsewhere")
    (node,) = office.sweep("--no-latest", code=1)["nodes"]
    assert (node["snapshot"]["alarm"], node["snapshot"]["grade"]) == ("", "partial")
    do(office, "prune", "--keep", "last 1", "--grace", "0")
    assert len(names_of(office)) == 2
    (office.path / "elsewhere").rename(office.files)
    assert alarm(office) == ""


def test_files_that_come_back_after_an_alarm(office: World) -> None:
    empty_folder(office)
    alarm(office, code=1)
    for number in range(12):
        (office.files / f"{number}.txt").write_text("restored\n" * 200)
    assert alarm(office) == ""


# ---- `server --keep` ----


def test_server_prunes_after_each_sweep(world: World) -> None:
    (world.files / "a").write_text("0")
    world.node("--margin", "0s")
    flags = [f for f in world.server_flags("--every", "1s", "--keep", "last 2", "--grace", "0") if f != "--once"]
    server = Process(flags, world.path, world.env)
    world.nodes.append(server)
    wait_until(lambda: server.output.count("prune: ") >= 4, what="four sweeps, each with a prune")
    assert server.stop() == 0
    lines = [line for line in server.output.splitlines() if line.startswith(("sweep of", "prune: "))]
    assert [line[:5] for line in lines[:8]] == ["sweep", "prune"] * 4
    assert [line[:28] for line in lines[1:8:2]] == [
        *("prune: 0 snapshots removed, ", "prune: 0 snapshots removed, "),
        *("prune: 1 snapshots removed, ", "prune: 1 snapshots removed, "),
    ]
    assert 2 <= len(names_of(world)) <= 3
    do(world, "verify")


def test_server_once_with_keep(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node("--margin", "0s")
    for count in (1, 2, 2):
        said = world.run(*world.server_flags("--keep", "last 2"))
        assert len(names_of(world)) == count
    assert re.search(r" stable +remove +no rule keeps it", said.stdout)
    assert "prune: 1 snapshots removed" in said.stdout
    assert len(json.loads(do(world, "list", FOLDER, "--trash", "--json"))) == 1
    report = world.sweep("--keep", "last 2")  # still one JSON object on standard output
    assert report["nodes"][0]["snapshot"]["grade"] == "stable"
    assert len(json.loads(do(world, "list", FOLDER, "--trash", "--json"))) == 2
    assert world.run(*world.server_flags("--keep", "last 2", "--quiet")).stdout == ""


def test_server_whose_rules_are_refused(world: World) -> None:
    (world.files / "a").write_text("a")
    world.node()
    said = world.run(*world.server_flags("--keep", "last 0"), code=2)
    assert "--keep would remove all 1 snapshots of 127.0.0.9; nothing is removed" in said.stderr
    assert len(names_of(world)) == 1


def test_server_beside_another_run_prunes_next_time(world: World) -> None:
    """Others may read or write at the same time; that is no error of the sweep."""
    (world.files / "a").write_text("a")
    world.node("--margin", "0s")
    world.sweep()
    with held(world.store / "lock", "shared"):
        said = world.run(*world.server_flags("--keep", "last 1", "--lock-wait", "0"))
        assert "not pruned this time: " in said.stdout
        assert len(names_of(world)) == 2
    world.run(*world.server_flags("--keep", "last 1"))
    assert len(names_of(world)) == 1


def test_server_keeps_what_an_absent_node_had(world: World) -> None:
    (world.files / "a").write_text("a")
    gone = world.node(address="127.0.0.10")
    world.node("--state", str(world.path / "other"))
    world.sweep("--range", "9-10")
    world.sweep("--range", "9-10")
    gone.stop()
    for _ in range(3):
        world.sweep("--range", "9-10", "--keep", "last 2, daily 1")
    assert len(names_of(world, "127.0.0.10")) == 2
    assert len(names_of(world)) == 2


def test_prune_between_real_sweeps_restores_bit_for_bit(world: World) -> None:
    """A database that changes a little each time: patches of patches' sources, pruned again and again."""
    connection = make_database(world.files / "bd", rows=4000)
    (world.files / "noise").write_bytes(noise(2 * MIB + 5, "noise"))
    world.node("--margin", "0s")
    chance = random.Random(7)
    wanted: dict[str, dict[str, bytes]] = {}
    for number in range(6):
        connection.execute("UPDATE t SET b = ? WHERE a % 50 = ?", (noise(90, number), number))
        connection.commit()
        with open(world.files / "noise", "r+b") as file:
            file.seek(chance.randrange(2 * MIB))
            file.write(noise(10_000, f"change {number}"))
        world.sweep("--no-latest")
        name = names_of(world)[-1]
        do(world, "restore", FOLDER, "--to", str(world.path / f"before {number}"))
        wanted.pop(name, None)  # a second may see several, and the name of one that was pruned is free again
        wanted[name] = {path.name: path.read_bytes() for path in (world.path / f"before {number}/files").iterdir()}
        assert wanted[name]["noise"] == (world.files / "noise").read_bytes()
        do(world, "prune", "--keep", "last 2", "--grace", "0")
    connection.close()
    assert names_of(world) == list(wanted)[-2:]
    for name in names_of(world):
        back = world.path / f"after {name}"
        do(world, "restore", FOLDER, "--at", name, "--to", str(back))
        assert {path.name: path.read_bytes() for path in (back / "files").iterdir()} == wanted[name]
    do(world, "verify")


def test_loose_patch_of_content_that_came_back_is_no_damage(world: World) -> None:
    """A pack keeps a patch whose other half went; the chunk was stored anew elsewhere, and the pack is rewritten."""
    world.node("--margin", "0")
    flags = ("--no-latest", "--reserve", "0")
    mib = 1 << 20
    older, large = noise(mib, "older"), noise(4 * mib, "large")
    (world.files / "a").write_bytes(older)
    world.sweep(*flags)
    back = b"two" + older[3:]
    (world.files / "a").write_bytes(back)
    (world.files / "b").write_bytes(large)  # so that the pack of the patch stays
    world.sweep(*flags)
    (world.files / "a").write_bytes(noise(mib, "other"))
    world.sweep(*flags)
    world.run("prune", "--keep", "last 1", "--grace", "0s", "--reserve", "0")
    (world.files / "a").write_bytes(back)
    (world.files / "b").write_bytes(large[:mib] + noise(3 * mib, "new"))
    world.sweep(*flags)
    done = world.run("prune", "--keep", "last 1", "--grace", "0s", "--reserve", "0")
    assert re.search("[1-9] rewritten", done.stdout)
    world.run("verify")
    restored = world.restore() / "files"
    assert (restored / "a").read_bytes() == back
    assert (restored / "b").read_bytes() == (world.files / "b").read_bytes()


# ---- the alarm of a pull that was cut off ----


def encrypt(world: World) -> None:
    """Do to all files what ransomware does."""
    for path in list(world.files.iterdir()):
        path.with_name(path.name + ".locked").write_bytes(os.urandom(640_000))
        path.unlink()


@pytest.mark.parametrize("renamed", [True, False])
def test_alarm_is_that_of_a_pull_that_was_not_cut_off(world: World, renamed: bool) -> None:
    """What was counted before is not forgotten, nor counted twice."""
    for number in range(40):
        (world.files / f"d{number:02}.txt").write_text(f"line of text {number}\n" * 40_000)
    world.node()
    world.sweep("--pack-size", "2MiB")
    encrypt(world)
    if not renamed:
        for path in world.files.iterdir():
            path.rename(path.with_suffix(""))
    for _ in range(2):
        report = world.sweep("--pack-size", "2MiB", "--most-bytes", f"{9 << 20}", code=1)
        assert "--most-bytes" in report["nodes"][0]["error"]
    report = world.sweep("--pack-size", "2MiB", "--keep", "last 1", "--grace", "0s", code=1)
    last = report["nodes"][0]["snapshot"]
    assert "40 of 40 files became bytes that do not compress" in last["alarm"]
    assert (last["scrambled"], last["deleted"]) == (40, 40 if renamed else 0)
    assert [row["GRADE"] for row in world.listed(FOLDER)].count("stable") == 2


# ---- what cannot be read for a moment ----


def find_block(store: z.Store, node: str) -> tuple[Path, int]:
    """Return the pack of the first block of a node's newest snapshot, and the middle of its record."""
    block = store.node(node).list_snapshots()[-1].blocks[0]
    place = store.index.find([block])[block]
    pack = Path(store.packs, place.pack[:2], f"{place.pack}.pack")
    with open(pack, "rb") as file:
        record = z.load_record(file.fileno(), place.record)
    return pack, record.data_offset + record.stored // 2


def flip(where: tuple[Path, int]) -> None:
    """Damage a byte, or mend it."""
    pack, at = where
    data = bytearray(pack.read_bytes())
    data[at] ^= 0xFF
    pack.write_bytes(data)


@pytest.fixture
def large(world: World) -> World:
    """Nodes at two addresses with the same three files, copied once."""
    for number in range(3):
        (world.files / f"big{number}").write_bytes(os.urandom(MIB))
        os.utime(world.files / f"big{number}", (1, 1))
    world.node("--margin", "0s")
    world.node("--margin", "0s", address="127.0.0.10")
    world.sweep("--range", "9-10", "--no-latest", "--pack-size", "1M")
    return world


def test_prune_reads_what_was_lost_and_is_back(large: World) -> None:
    """Until the next verify it still counts as lost: that it cannot be read must end the prune all the same."""
    with contextlib.closing(z.open_store(str(large.store))) as store:
        flip(find_block(store, FOLDER))
    large.run("repair")
    large.sweep("--range", "9-10", "--no-latest", "--pack-size", "1M", code=None)
    with contextlib.closing(z.open_store(str(large.store))) as store:
        assert store.lost.digests
        where = find_block(store, FOLDER)
    flip(where)
    assert "nothing is removed while the store is damaged" in large.run("prune", "--grace", "0s", code=4).stderr
    flip(where)
    large.run("verify")
    assert len(list(large.restore().rglob("big*"))) == 3


def test_progress_of_one_node_hides_nothing_of_another(large: World) -> None:
    """It may be passed over where it cannot be read; a snapshot that names the same block may not."""
    with contextlib.closing(z.open_store(str(large.store))) as store:
        first, second = (store.node(name).list_snapshots()[-1] for name in ("127.0.0.10", FOLDER))
        assert first.blocks == second.blocks
        store.node(first.folder).save_progress(z.Progress(blocks=first.blocks))
        (large.store / first.folder / "snapshots" / f"{first.name}.json").unlink()
        where = find_block(store, FOLDER)
    flip(where)
    assert "nothing is removed while the store is damaged" in large.run("prune", "--grace", "0s", code=4).stderr
    flip(where)
    large.run("verify")


def test_leftovers_that_are_gone_or_of_another_user(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.save({"a": b"a"})
    gone, kept = (shop.path / "packs" / f"{z.INCOMING}{number}" for number in range(2))
    gone.touch()
    kept.touch()
    real = z.lock_file

    def lock(path: str, *arguments: Any, **options: Any) -> int:
        gone.unlink(missing_ok=True)  # sealed just now
        return real(path, *arguments, **options)

    monkeypatch.setattr(z, "lock_file", lock)
    with shop.open() as store:
        trash = store.node("here").trash
        os.makedirs(trash)
        monkeypatch.setattr(os, "access", lambda path, mode: path != trash)
        monkeypatch.setattr(os, "scandir", guard(os.scandir, trash))
        assert z.plan_leftovers(store).paths == (str(kept),)
    assert not gone.exists()


def guard(real: Callable[..., Any], closed: str) -> Callable[..., Any]:
    """Return a call that may not list one folder."""

    def scan(path: Any) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    return scan

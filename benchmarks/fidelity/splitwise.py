"""Compatibility mode: splitwise-sim's rules on our virtual clock, compared request by request.

What Splitwise's simulator (Patel et al., ISCA 2024; Mutinifni/splitwise-sim) assumes of a machine
and of a cluster, stated as rules and written from them; nothing of its code is here:

* An iteration holds whole prompts and one token of each decoding request, at most 2,048 tokens and
  512 tasks; prompts come first, then requests that were displaced, then those that decode. Its
  time is looked up by its tokens alone: the median of what was measured, straight lines between,
  a tenth longer where prompts and tokens mix. Iterations without prompts repeat until one ends.
* Whoever was left out four times goes first. KV memory is taken for the whole answer at its start.
* Unified: the machine with the fewest pending tokens. Apart ("mixed pool"): prompts by pending
  tokens, answers by memory; a pool that is full borrows a machine of the other one, which returns
  when it has run empty. Caches are shipped after the prompt at 200 GiB/s, over endless links.
"""

from __future__ import annotations

import csv
import gzip
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from tandem_operator.simulate.clock import VirtualClock

MAX_TOKENS, MAX_TASKS, MAX_DISPLACED = 2048, 512, 4
MACHINE_BYTES = 8 * 85899345920  # eight H100 of 80 GiB
WEIGHT_BYTES = 329_000_000_000  # BLOOM-176B in 16 bits
KV_BYTES_PER_TOKEN = 2 * 14336 * 70 * 2
LINK_BYTES_PER_S = 200 * 1024**3
LONG_PROMPT_QUEUE = 8192
PERCENTILES = (50, 90, 99)
METRICS = ("ttft", "tbt", "e2e")


class IterationTimes:
    """Seconds of an iteration by its tokens, from measured rows of one model on one machine."""

    def __init__(self, table: Path, *, model: str, hardware: str, tensor_parallel: int) -> None:
        prompt: dict[int, list[float]] = defaultdict(list)
        token: dict[int, list[float]] = defaultdict(list)
        with table.open(newline="") as f:
            for row in csv.DictReader(f):
                if (row["model"], row["hardware"], int(row["tensor_parallel"])) == (
                    model, hardware, tensor_parallel,
                ):  # fmt: skip
                    tokens = int(row["prompt_size"]) * int(row["batch_size"])
                    prompt[tokens].append(float(row["prompt_time"]) / 1e3)
                    token[tokens].append(float(row["token_time"]) / 1e3)
        self._lines = {
            "prompt": (sorted(prompt), [median(prompt[t]) for t in sorted(prompt)]),
            "token": (sorted(token), [median(token[t]) for t in sorted(token)]),
        }
        self._known: dict[tuple[str, int], float] = {}

    def __call__(self, num_prompts: int, num_tasks: int, num_tokens: int) -> float:
        kind = "prompt" if num_prompts else "token"
        seconds = self._known.get((kind, num_tokens))
        if seconds is None:
            seconds = self._known[kind, num_tokens] = _line(*self._lines[kind], num_tokens)
        return seconds * 1.1 if 0 < num_prompts < num_tasks else seconds


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """On the straight line between the neighbours, or the outermost line prolonged."""
    i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


@dataclass(eq=False, slots=True)
class Request:
    """One request, and where its memory is."""

    arrived_s: float
    prompt: Task = field(init=False)
    answer: Task = field(init=False)
    machines: tuple[Machine, Machine] = field(init=False)
    bytes_held: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0


@dataclass(eq=False, slots=True)
class Task:
    """The prompt of a request, or its tokens after the first."""

    request: Request
    is_prompt: bool
    size: int
    kv_bytes: int
    done: int = 0
    num_displaced: int = 0
    has_run: bool = False

    @property
    def iteration_tokens(self) -> int:
        return self.size if self.is_prompt else 1


class Machine:
    """One engine: iterations of a batch, new at each change of who is in it."""

    def __init__(
        self, clock: VirtualClock, times: IterationTimes, cluster: Cluster, role: str
    ) -> None:
        self._clock, self._times, self._cluster = clock, times, cluster
        self.role = role
        self.borrowed = False
        self.bytes_used = self.bytes_planned = WEIGHT_BYTES
        self.tokens_planned = 0
        self._batch: list[Task] = []
        self._batch_tokens = 0
        # In order of (times left out, arrival) as they were when the task came.
        self.pending: list[Task] = []
        self._pending_prompts: list[Task] = []
        self._displaced: list[Task] = []
        self._requests: list[Request] = []  # by arrival
        self._tasks: dict[Request, list[Task]] = {}
        self._begun_s = self._iteration_s = 0.0
        self._iterations = 0
        self._is_cut = False
        self._event = 0

    # -- arrivals --------------------------------------------------------------------------------

    def arrive(self, task: Task) -> None:
        request = task.request
        if request not in self._tasks:
            insort(self._requests, request, key=lambda r: r.arrived_s)
            self._tasks[request] = []
        self._tasks[request].append(task)
        self._wait(task)
        if not self._batch:
            if self.bytes_used + task.kv_bytes <= MACHINE_BYTES:
                self._begin()
        elif len(self._batch) < MAX_TASKS and (
            self._batch_tokens + task.iteration_tokens <= MAX_TOKENS
        ):
            self._cut()
        elif task.is_prompt:
            num_prompts = sum(t.is_prompt for t in self._batch)
            prompt_tokens = self._batch_tokens - (len(self._batch) - num_prompts)
            if num_prompts < len(self._batch) and prompt_tokens + task.size <= MAX_TOKENS:
                self._cut()

    def room_made(self) -> None:
        """A cache has left: what waited for memory may begin."""
        if not self.pending:
            return
        if not self._batch:
            if self.bytes_used + self.pending[0].kv_bytes <= MACHINE_BYTES:
                self._begin()
        elif len(self._batch) < MAX_TASKS and self._batch_tokens < MAX_TOKENS:
            self._cut()

    def _wait(self, task: Task) -> None:
        insort(self.pending, task, key=lambda t: (t.num_displaced, t.request.arrived_s))
        if task.is_prompt:
            self._pending_prompts.append(task)

    # -- iterations ------------------------------------------------------------------------------

    def _begin(self) -> None:
        chosen = self._choose()
        for task in [t for t in self._batch if t not in chosen]:
            self._batch.remove(task)
            self._wait(task)
            self._displaced.append(task)
        for task in [t for t in chosen if t not in self._batch]:
            self.pending.remove(task)
            if task in self._displaced:
                self._displaced.remove(task)
            if task.is_prompt:
                self._pending_prompts.remove(task)
            self._batch.append(task)
        for request in self._requests:
            task = self._tasks[request][0]
            if task not in self._batch:
                task.num_displaced += 1
        if not self._batch:
            if not self._requests:
                self._cluster.is_free(self)
            return
        num_prompts = tokens = 0
        for task in self._batch:
            num_prompts += task.is_prompt
            tokens += task.iteration_tokens
        self._iteration_s = self._times(num_prompts, len(self._batch), tokens)
        self._iterations = 1 if num_prompts else min(t.size - t.done for t in self._batch)
        for task in self._batch:
            if not task.has_run:
                task.has_run = True
                self.bytes_used += task.kv_bytes
                task.request.bytes_held += task.kv_bytes
        self._begun_s = self._clock.now
        self._end_at(self._iteration_s * self._iterations)

    def _end_at(self, delay_s: float) -> None:
        self._event += 1
        if delay_s == 0.0:
            self._end(self._event)
        else:
            self._clock.after(delay_s, self._end, self._event)

    def _cut(self) -> None:
        """Somebody may join: the iteration under way is the last one of this batch."""
        if self._is_cut or any(task.is_prompt for task in self._batch):
            return
        self._is_cut = True
        elapsed = self._clock.now - self._begun_s
        self._iterations = int(elapsed // self._iteration_s) + 1
        self._end_at(self._iteration_s * self._iterations - elapsed)

    def _end(self, event: int) -> None:
        if event != self._event:
            return
        finished = []
        for task in self._batch:
            task.done += 1 if task.is_prompt else self._iterations
            if task.done == (1 if task.is_prompt else task.size):
                finished.append(task)
        for task in finished:
            self._finish(task)
        self._is_cut = False
        self._begin()

    def _finish(self, task: Task) -> None:
        request = task.request
        if task.is_prompt:
            self.tokens_planned -= task.size
            request.ttft_s = self._clock.now - request.arrived_s
        else:
            self.tokens_planned -= 1
            self.free(request)
        self._batch.remove(task)
        tasks = self._tasks[request]
        tasks.remove(task)
        if not tasks:
            self._requests.remove(request)
            del self._tasks[request]
        self._cluster.finished(task)

    def free(self, request: Request) -> None:
        """Give back what a request holds here."""
        self.bytes_used -= request.bytes_held
        self.bytes_planned -= request.bytes_held

    def _choose(self) -> list[Task]:
        """Who is in the next iteration."""
        chosen: list[Task] = []
        requests: set[Request] = set()
        tokens, used = 0, self.bytes_used

        def has_room(task: Task) -> bool:
            return len(chosen) < MAX_TASKS and (
                not chosen or tokens + task.iteration_tokens <= MAX_TOKENS
            )

        left_out = [t for t in self.pending if t.num_displaced >= MAX_DISPLACED]
        # Only as far as the queue's order reaches: a task that waits may have been passed since.
        front = next(
            (i for i, t in enumerate(self.pending) if t.num_displaced < MAX_DISPLACED),
            len(self.pending),
        )
        first_tasks = [self._tasks[request][0] for request in self._requests]
        rows: tuple[tuple[Sequence[Task], bool], ...] = (
            (left_out[:front], False),
            (self._pending_prompts, True),
            (self._displaced, True),
            (self._batch, True),
            (first_tasks, True),
        )
        for tasks, stops_at_memory in rows:
            for task in tasks:
                if task.request in requests:
                    if len(chosen) == MAX_TASKS:
                        break
                    continue
                if not has_room(task):
                    break
                if not task.has_run:
                    if used + task.kv_bytes > MACHINE_BYTES:
                        if stops_at_memory:
                            break
                        continue
                    used += task.kv_bytes
                chosen.append(task)
                requests.add(task.request)
                tokens += task.iteration_tokens
        self._batch_tokens = tokens
        return chosen


class Cluster:
    """Where requests go: one pool, or prompts and answers apart with borrowing between."""

    def __init__(self, times: IterationTimes, roles: Mapping[str, int]) -> None:
        self.clock = VirtualClock()
        self._pools: dict[str, list[Machine]] = {"prompt": [], "mixed": [], "token": []}
        for role, count in roles.items():
            pool = "mixed" if role == "unified" else role
            for _ in range(count):
                self._pools[pool].append(Machine(self.clock, times, self, role))
        self._unified = set(roles) == {"unified"}

    def submit(self, request: Request) -> None:
        if self._unified:
            machine = min(self._pools["mixed"], key=lambda m: m.tokens_planned)
            first = second = machine
        else:
            first, second = self._apart(request)
        first.tokens_planned += request.prompt.size
        second.tokens_planned += 1
        request.machines = first, second
        if not self._unified:
            if first is not second:
                first.bytes_planned += request.prompt.kv_bytes
            second.bytes_planned += request.prompt.kv_bytes + request.answer.kv_bytes
        first.arrive(request.prompt)
        if first is second:
            first.arrive(request.answer)

    def _apart(self, request: Request) -> tuple[Machine, Machine]:
        pools = self._pools
        prompt, answer = request.prompt, request.answer
        first = second = None
        for name in ("prompt", "mixed"):
            best = min(pools[name], key=lambda m: m.tokens_planned, default=None)
            if best is not None and not (
                best.pending and best.tokens_planned + prompt.size > LONG_PROMPT_QUEUE
            ):
                first = best
                break
        wanted = prompt.kv_bytes + answer.kv_bytes
        for name in ("token", "mixed"):
            best = min(pools[name], key=lambda m: m.bytes_planned, default=None)
            if best is not None and best.bytes_planned + wanted < MACHINE_BYTES:
                second = best
                break
        if first is None and pools["token"]:
            first = self._borrow(min(pools["token"], key=lambda m: m.tokens_planned), "token")
        if second is None and pools["prompt"]:
            second = self._borrow(min(pools["prompt"], key=lambda m: m.bytes_planned), "prompt")
        if first is None or second is None:
            every = [*pools["prompt"], *pools["mixed"], *pools["token"]]
            first = second = min(every, key=lambda m: m.tokens_planned)
        return first, second

    def _borrow(self, machine: Machine, pool: str) -> Machine:
        self._pools[pool].remove(machine)
        self._pools["mixed"].append(machine)
        machine.borrowed = True
        return machine

    def is_free(self, machine: Machine) -> None:
        """A borrowed machine that has run empty goes home."""
        if machine.borrowed:
            machine.borrowed = False
            self._pools["mixed"].remove(machine)
            self._pools[machine.role].append(machine)

    def finished(self, task: Task) -> None:
        request = task.request
        if not task.is_prompt:
            request.e2e_s = self.clock.now - request.arrived_s
        elif request.machines[0] is not request.machines[1]:
            self._ship(request, *request.machines)

    def _ship(self, request: Request, source: Machine, target: Machine) -> None:
        if target.bytes_used + request.bytes_held > MACHINE_BYTES:
            self.clock.after(1.0, self._ship, request, source, target)
            return
        target.bytes_used += request.bytes_held
        seconds = request.prompt.size * KV_BYTES_PER_TOKEN / LINK_BYTES_PER_S
        self.clock.after(seconds, self._shipped, request, source, target)

    def _shipped(self, request: Request, source: Machine, target: Machine) -> None:
        source.free(request)
        target.arrive(request.answer)
        source.room_made()


def read_requests(path: Path) -> list[Request]:
    """The requests of a trace as splitwise-sim's generator writes it."""
    found = []
    with gzip.open(path, "rt", newline="") as f:
        for row in csv.DictReader(f):
            request = Request(float(row["arrival_timestamp"]))
            prompt, answer = int(row["prompt_size"]), int(row["token_size"]) - 1
            request.prompt = Task(request, True, prompt, KV_BYTES_PER_TOKEN * (prompt + 1))
            request.answer = Task(request, False, answer, KV_BYTES_PER_TOKEN * answer)
            found.append(request)
    return found


def replay(times: IterationTimes, trace: Path, roles: Mapping[str, int]) -> dict[str, list[float]]:
    """TTFT, time between tokens and end-to-end time of every request, seconds."""
    cluster = Cluster(times, roles)
    requests = read_requests(trace)
    for request in requests:
        cluster.clock.at(request.arrived_s, cluster.submit, request)
    cluster.clock.run()
    return {
        "ttft": [r.ttft_s for r in requests],
        "tbt": [(r.e2e_s - r.ttft_s) / (r.answer.size + 1) for r in requests],
        "e2e": [r.e2e_s for r in requests],
    }


def published(path: Path) -> dict[str, list[float]]:
    """The same columns of a run of splitwise-sim."""
    columns = {"ttft": "ttft_times", "tbt": "tbt_times", "e2e": "response_times"}
    with gzip.open(path, "rt", newline="") as f:
        rows = list(csv.DictReader(f))
    return {name: [float(row[column]) for row in rows] for name, column in columns.items()}


RUNS: dict[str, dict[str, int]] = {
    "conv_baseH4_6": {"unified": 4},
    "conv_HH3-1_6": {"prompt": 3, "token": 1},
    "conv_baseH40_70": {"unified": 40},
    "conv_HH25-15_70": {"prompt": 25, "token": 15},
    "code_baseH40_70": {"unified": 40},
    "code_HH35-5_70": {"prompt": 35, "token": 5},
}


def iteration_times(data: Path) -> IterationTimes:
    """Of the model and machine that all six runs are of."""
    return IterationTimes(
        data / "perf" / "splitwise-sim" / "perf_model.csv",
        model="bloom-176b", hardware="h100-80gb", tensor_parallel=8,
    )  # fmt: skip


def trace_of(data: Path, run: str) -> Path:
    """The requests of a run."""
    kind, _, rate = run.split("_")
    return data / "splitwise_ref" / f"rr_{kind}_{rate}_2min.csv.gz"


def compare(data: Path, run: str) -> dict[str, dict[str, float]]:
    """Ours over splitwise-sim's, minus one, at p50, p90 and p99 of each metric."""
    ours = replay(iteration_times(data), trace_of(data, run), RUNS[run])
    theirs = published(data / "splitwise_ref" / f"out_{run}.csv.gz")
    assert len(ours["ttft"]) == len(theirs["ttft"])
    return {
        metric: {
            f"p{p}": float(np.percentile(ours[metric], p) / np.percentile(theirs[metric], p) - 1.0)
            for p in PERCENTILES
        }
        for metric in METRICS
    }

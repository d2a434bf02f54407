"""One model over several processes of a pod: each rank computes its heads, its part of the MLP.

Rank 0 is the worker: it schedules, draws tokens and answers. It writes each step's packed batch to
the other ranks' standard input and all of them run the same forward pass, in which two sums per
layer (gloo, over loopback) join the parts. The others hold no state but weights and KV blocks, and
end when their input does, so none outlives the worker; one that dies or hangs breaks the sums,
which is the end of the worker. The batch travels by pipe and not by a collective, because a
collective gives up after a time and a pipe waits for the next request as long as it takes. The KV
blocks of all ranks are memory that rank 0 maps, and so it transfers them
(`transfer.sharded_memory`).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from tandem_worker.config import WorkerConfig
from tandem_worker.engine.drawn import Drawn
from tandem_worker.engine.requests import Work
from tandem_worker.engine.runner import ModelRunner
from tandem_worker.errors import ConfigError, WorkerError
from tandem_worker.models.kv_cache import Pair
from tandem_worker.models.sharding import Shard
from tandem_worker.models.transformer import Batch, Decodes, Prefills

SUM_TIMEOUT_S = 60.0
"""How long a rank waits for another inside a step."""
END_S = 15.0
_PARTS = ("token_ids", "positions", "slot_mapping")

logger = logging.getLogger(__name__)


class TensorParallelRunner(ModelRunner):
    """Rank 0 of ``config.tensor_parallel``, and the processes of the others.

    Raises:
        ConfigError: the model cannot be cut so, or the settings do not go together.
        WorkerError: a rank did not start.
    """

    def __init__(self, config: WorkerConfig, weights_dir: Path) -> None:
        size = config.tensor_parallel
        self.ranks: list[subprocess.Popen[bytes]] = []
        self._closing = False
        self._scratch = tempfile.TemporaryDirectory(prefix="tandem-ranks-")
        try:
            super().__init__(config, weights_dir, shard=Shard(0, size), reduce=self._sum)
            if self.device.type != "cpu":
                raise ConfigError(
                    f"tensor_parallel={size} runs on CPUs only so far; set device to cpu, or use "
                    "engine VLLM for several GPUs"
                )
            meeting = Path(self._scratch.name) / "meeting"
            settings = config.model_copy(
                update={"num_kv_blocks": self.num_blocks, "kv_cache_bytes": None}
            )
            self._kv_parts = [self.kv_caches]
            for rank in range(1, size):
                with self._shared_kv() as memory:
                    self._kv_parts.append(self._allocate(_path(memory)))
                    self.ranks.append(start_rank(settings, weights_dir, meeting, rank, memory))
            for rank, process in enumerate(self.ranks, 1):
                if not _stdout(process).readline():
                    raise WorkerError(f"rank {rank} of {size} ended while it loaded; see its log")
            self._group = _meet(meeting, 0, size)
        except BaseException:
            self.close()
            raise
        for rank, process in enumerate(self.ranks, 1):
            name = f"rank-{rank}-watch"
            threading.Thread(
                target=self._watch, args=(rank, process), name=name, daemon=True
            ).start()

    @property
    def kv_parts(self) -> list[list[Pair]]:
        """See :attr:`ModelRunner.kv_parts`; those of other processes are mapped here."""
        return self._kv_parts

    @contextlib.contextmanager
    def _shared_kv(self) -> Iterator[int]:
        """A file without a name that holds one rank's KV blocks, for as long as it is mapped."""
        memory = os.memfd_create("tandem-kv")
        try:
            os.ftruncate(memory, self.num_blocks * self.block_bytes)
            yield memory
        finally:
            os.close(memory)

    def execute(
        self,
        work: Sequence[Work],
        num_decodes: int,
        on_layer: Callable[[int], None] | None = None,
    ) -> list[Drawn]:
        """See :class:`tandem_worker.engine.requests.Runner`."""
        if self.failure is not None:
            raise WorkerError(self.failure)
        try:
            return super().execute(work, num_decodes, on_layer)
        except Exception as error:
            # The ranks are no longer in step: a sum of the next one would join unequal steps.
            self.failure = self.failure or f"a step over {len(self.ranks) + 1} ranks failed"
            raise WorkerError(f"{self.failure}: {error}") from error

    def close(self) -> None:
        """End the other ranks."""
        self._closing = True
        for process in self.ranks:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for process in self.ranks:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _stdout(process).close()
        self._scratch.cleanup()

    @contextlib.contextmanager
    def exact_kv(self, num_blocks: int) -> Iterator[None]:
        """See :meth:`ModelRunner.exact_kv`; on every rank."""
        with super().exact_kv(num_blocks):
            self._tell(json.dumps({"exact_blocks": num_blocks}).encode() + b"\n")
            try:
                yield
            finally:
                self._tell(json.dumps({"exact_blocks": 0}).encode() + b"\n")

    def _announce(self, batch: Batch) -> None:
        self._tell(encode_batch(batch))

    def _tell(self, data: bytes) -> None:
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write(data)
            process.stdin.flush()

    def _sum(self, part: torch.Tensor) -> torch.Tensor:
        self._group.allreduce([part]).wait()
        return part

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._closing:
            self.failure = f"rank {rank} has ended (status {status})"
            logger.critical("%s; this worker has to be restarted", self.failure)


def encode_batch(batch: Batch) -> bytes:
    """A line of JSON with the shapes, then the bytes of the tensors in its order."""
    tensors: dict[str, torch.Tensor] = {name: getattr(batch, name) for name in _PARTS}
    if batch.decodes is not None:
        tensors["decode_tables"] = batch.decodes.block_tables
        tensors["decode_lens"] = batch.decodes.seq_lens
    if batch.prefills is not None:
        tensors["prefill_tables"] = batch.prefills.block_tables
        tensors["query_start"] = batch.prefills.query_start
        tensors["prefill_lens"] = batch.prefills.seq_lens
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    head = {
        "num_decodes": batch.num_decodes,
        "tensors": {name: [array.dtype.name, *array.shape] for name, array in arrays.items()},
    }
    return b"".join(
        [json.dumps(head).encode() + b"\n", *(array.tobytes() for array in arrays.values())]
    )


def decode_batch(stream: IO[bytes]) -> Batch | int | None:
    """The inverse; None at the end of the stream.

    A number instead of a batch: use so many exact KV blocks from now on, 0 for the rank's own.
    """
    line = stream.readline()
    if not line:
        return None
    head: dict[str, Any] = json.loads(line)
    if "exact_blocks" in head:
        return int(head["exact_blocks"])
    tensors = {}
    for name, (dtype, *shape) in head["tensors"].items():
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = stream.read(num_bytes)
        if len(raw) != num_bytes:
            return None
        tensors[name] = torch.from_numpy(np.frombuffer(bytearray(raw), dtype).reshape(shape))
    return _batch(head["num_decodes"], tensors)


def _batch(num_decodes: int, tensors: Mapping[str, torch.Tensor]) -> Batch:
    decodes = prefills = None
    if "decode_lens" in tensors:
        decodes = Decodes(tensors["decode_tables"], tensors["decode_lens"])
    if "prefill_lens" in tensors:
        prefills = Prefills(
            tensors["prefill_tables"], tensors["query_start"], tensors["prefill_lens"]
        )
    return Batch(
        token_ids=tensors["token_ids"],
        positions=tensors["positions"],
        slot_mapping=tensors["slot_mapping"],
        num_decodes=num_decodes,
        decodes=decodes,
        prefills=prefills,
    )


def _meet(meeting: Path, rank: int, size: int) -> Any:
    """The process group, once all ranks have come; loopback only."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = datetime.timedelta(seconds=SUM_TIMEOUT_S)
    store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _path(memory: int) -> str:
    return f"/proc/self/fd/{memory}"


def start_rank(
    config: WorkerConfig, weights_dir: Path, meeting: Path, rank: int, memory: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tandem_worker.engine.tensor_parallel"),
            *(config.model_dump_json(), str(weights_dir), str(meeting), str(rank), str(memory)),
        ],
        pass_fds=(memory,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _stdout(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def main(arguments: Sequence[str]) -> int:
    """One of the other ranks: load, meet, and run what comes until the input ends."""
    config = WorkerConfig.model_validate_json(arguments[0])
    weights_dir, meeting, rank = Path(arguments[1]), Path(arguments[2]), int(arguments[3])
    shard = Shard(rank, config.tensor_parallel)
    group: Any = None

    def add(part: torch.Tensor) -> torch.Tensor:
        group.allreduce([part]).wait()
        return part

    try:
        runner = ModelRunner(
            config, weights_dir, shard=shard, reduce=add, kv_file=_path(int(arguments[4]))
        )
        sys.stdout.buffer.write(b"loaded\n")
        sys.stdout.buffer.flush()
        group = _meet(meeting, rank, shard.size)
        with contextlib.ExitStack() as exact:
            while (told := decode_batch(sys.stdin.buffer)) is not None:
                if isinstance(told, int):
                    exact.close()
                    if told:
                        exact.enter_context(runner.exact_kv(told))
                    continue
                with torch.inference_mode():
                    runner.model.forward(told, runner.kv_caches)
    except (WorkerError, RuntimeError) as error:  # gloo's way to say that another rank is gone
        sys.stderr.write(f"tandem-worker: rank {rank}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

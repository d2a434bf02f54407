"""What splitwise-sim itself costs: a checkout of it, run in an interpreter of its own."""

from __future__ import annotations

import gzip
import resource
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fidelity import splitwise


@dataclass(frozen=True)
class Checkout:
    """A checkout of Mutinifni/splitwise-sim.

    Args:
        folder: Its root. What it writes goes into a copy.
        python: An interpreter with hydra-core, networkx, numpy, pandas and scipy.
    """

    folder: Path
    python: Path | None

    def cpu_ms_per_request(self, data: Path, run: str) -> float:
        """Of one run; what a short one takes, for starting and reading, is taken off."""
        whole_s, count = self._run(data, run, 1.0)
        short_s, few = self._run(data, run, 0.05)
        return 1e3 * (whole_s - short_s) / (count - few)

    def _run(self, data: Path, run: str, part: float) -> tuple[float, int]:
        """CPU seconds and requests of the first part of a run's trace."""
        roles = splitwise.RUNS[run]
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "splitwise-sim"
            shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns(".git", "results"))
            config = copy / "configs" / "config.yaml"
            text = config.read_text()
            # Its launcher starts processes on other machines; one run needs none.
            text = text.replace("  - override hydra/launcher: ray\n", "")
            config.write_text(text[: text.find("  launcher:\n")] if "launcher:" in text else text)
            (copy / "traces").mkdir(exist_ok=True)
            with gzip.open(splitwise.trace_of(data, run), "rt") as f:
                lines = f.read().splitlines(keepends=True)
            count = max(1, int(part * (len(lines) - 1)))
            (copy / "traces" / "one.csv").write_text("".join(lines[: count + 1]))
            command = [
                str(self.python or "python3"), "run.py", "applications.0.scheduler=token_jsq",
                "cluster=half_half", "cluster.servers.0.count=0",
                f"cluster.servers.1.count={roles['unified']}", "start_state=baseline",
                "performance_model=db", "trace.filename=one", "debug=False", "seed=0",
            ]  # fmt: skip
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            subprocess.run(command, cwd=copy, check=True, capture_output=True)
            return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, count

"""What decoding from lists reads, on vLLM's own `/metrics` and, offline, from `lite_attention.stats()`.

vLLM computes in worker processes and answers `/metrics` in others. Every worker keeps a file of counters in the format
of prometheus_client's multiprocess mode, brought up to date every other second by a thread of its own. With several
API servers vLLM itself is in that mode, and reads the file with its own from PROMETHEUS_MULTIPROC_DIR. Otherwise the
process that starts the engine makes a directory, whose name its workers inherit, and adds it to what it answers.

Workers on other machines have a directory of their own there, which no API server reads.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from vllm_plugin.tally import Tally

DIRECTORY = "LITE_ATTENTION_METRICS_DIR"
VLLM_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
PERIOD = 2.0  # seconds between two updates of a worker's file
NAMESPACE = "lite_attention"

BY_GROUP = {
    "pages_read": "Pages of the KV cache read by decoding requests, counted for each KV head and layer.",
    "pages_visible": "Pages that dense attention would have read for them.",
    "left_out_mass": "Sum of the shares of softmax mass estimated to be left out, over decisions.",
    "decisions": "Decode steps of requests, counted for each query head and layer.",
}
FILE_BYTES = 1 << 16  # of a worker's file: some forty counters, of 200 bytes each
logger = logging.getLogger(f"vllm.{__name__}")  # below "vllm", whose handlers and level vLLM configures

ROWS = "Decode steps of requests, attended to densely or by lists."
SKETCH_BYTES = "Bytes of the KV cache that sketches take."


def announce() -> None:
    """Makes what the workers of this process count part of its metrics. Before they are started; more calls do no harm.

    A program has a directory of its own, which goes when it ends; the processes that it forks or spawns share it.
    """
    global _collector
    if os.environ.get(VLLM_DIRECTORY) or _collector is not None:
        return
    if not os.environ.get(DIRECTORY) or multiprocessing.parent_process() is None:
        directory = tempfile.TemporaryDirectory(prefix="lite_attention_metrics_")
        atexit.register(directory.cleanup)
        os.environ[DIRECTORY] = directory.name
    _collector = MultiProcessCollector(REGISTRY, path=os.environ[DIRECTORY])


_collector: MultiProcessCollector | None = None


class Publisher:
    """A worker's counters, in files that other processes read."""

    def __init__(self, counts_rows: bool) -> None:
        """`counts_rows`: of the workers that see the same requests, one counts them."""
        self.counts_rows = counts_rows
        self.tallies: dict[str, Tally] = {}  # by the first layer of a KV-cache group: vLLM may build a group twice
        directory = Path(os.environ.get(VLLM_DIRECTORY) or os.environ[DIRECTORY])
        name = f"{NAMESPACE}-{os.getpid()}.db"
        self._failed = False
        self._counters = _file(directory / f"counter_{name}")
        gauges = directory / f"gauge_livesum_{name}"
        self._gauges = _file(gauges)
        Finalize(None, gauges.unlink, kwargs={"missing_ok": True}, exitpriority=0)  # counters stay, gauges don't
        threading.Thread(target=self._run, name="lite_attention_metrics", daemon=True).start()

    def publish(self) -> None:
        """Writes what all tallies have counted so far."""
        from vllm_plugin.tally import GROUPS

        snapshots = [tally.snapshot() for tally in tuple(self.tallies.values())]
        for name, text in BY_GROUP.items():
            for at, group in enumerate(GROUPS):
                self._count(name, text, "layers", group, sum(each[name][at] for each in snapshots))
        if self.counts_rows and snapshots:  # every group of layers sees every row
            for kind in ("listed", "dense"):
                self._count("decode_rows", ROWS, "attention", kind, snapshots[0][f"rows_{kind}"])
        name = f"{NAMESPACE}:sketch_bytes"
        total = sum(each["sketch_bytes"] for each in snapshots)
        self._gauges.write_value(mmap_key(name, name, [], [], SKETCH_BYTES), total, 0.0)

    def _count(self, name: str, text: str, label: str, value: str, total: float) -> None:
        name = f"{NAMESPACE}:{name}"
        self._counters.write_value(mmap_key(name, f"{name}_total", [label], [value], text), total, 0.0)

    def _run(self) -> None:
        while True:
            time.sleep(PERIOD)
            self.try_to_publish()

    def try_to_publish(self) -> None:
        """Metrics that can't be written must not end the thread that writes them: the next time they may."""
        try:
            self.publish()
        except Exception as error:
            if not self._failed:
                logger.warning("Metrics of listed pages are not brought up to date: %s", error)
            self._failed = True


def _file(path: Path) -> MmapedDict:
    """Its room is reserved: to write to a mapped file that the disk then has no room for would end the process.

    It gets its name after that: other workers and servers read all files of the directory, and fail over an empty one.

    Raises:
        OSError: there is none.
    """
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    return MmapedDict(str(path))


_publisher: Publisher | None = None
_unpublished = False  # for want of a file


def publish(key: str, tally: Tally) -> None:
    """Has the tally of a KV-cache group of this worker published from now on, in place of the one before it.

    Without room for its file a worker serves all the same, and says once that it has no metrics.
    """
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    global _publisher, _unpublished
    if _unpublished:
        return
    if _publisher is None:
        try:
            announce()  # a worker that was started elsewhere
            _publisher = Publisher(get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank)
        except OSError as error:
            _unpublished = True
            logger.warning("No metrics of listed pages from this worker: %s", error)
            return
    _publisher.tallies[key] = tally


def warmed_up() -> None:
    """Tells the tallies of this worker that vLLM has warmed up."""
    for tally in tuple(_publisher.tallies.values()) if _publisher else ():
        tally.warmed_up()


@dataclass(frozen=True)
class DecodeStats:
    """What the engines of this process have decoded from lists so far.

    Attributes:
        read, visible: pages of the KV cache, counted for each KV head and layer: read, and what dense attention would
            have read.
        left_out: mean share of softmax mass left out, by estimate.
        rows_listed, rows_dense: decode steps of requests, by lists and densely.
        sketch_bytes: memory of the sketches.
        read_by_layers: read over visible in the first, middle and last third of the layers.
    """

    read: float
    visible: float
    left_out: float
    rows_listed: float
    rows_dense: float
    sketch_bytes: float
    read_by_layers: dict[str, float]


def stats() -> DecodeStats:
    """The counters of the vLLM engines that this process has started, at most two seconds old.

    Raises:
        RuntimeError: there are none that decode from lists.
    """
    directory = os.environ.get(VLLM_DIRECTORY) or os.environ.get(DIRECTORY)
    samples = [
        sample
        for metric in (MultiProcessCollector(None, path=directory).collect() if directory else ())
        if metric.name.startswith(f"{NAMESPACE}:")
        for sample in metric.samples
    ]
    if not samples:
        raise RuntimeError("stats(): this process has started no vLLM engine that decodes from listed pages")

    def total(name: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in samples
            if sample.name == f"{NAMESPACE}:{name}" and labels.items() <= sample.labels.items()
        )

    def share(**labels: str) -> float:
        return total("pages_read_total", **labels) / max(total("pages_visible_total", **labels), 1)

    return DecodeStats(
        read=total("pages_read_total"),
        visible=total("pages_visible_total"),
        left_out=total("left_out_mass_total") / max(total("decisions_total"), 1),
        rows_listed=total("decode_rows_total", attention="listed"),
        rows_dense=total("decode_rows_total", attention="dense"),
        sketch_bytes=total("sketch_bytes"),
        read_by_layers={group: share(layers=group) for group in ("first", "middle", "last")},
    )

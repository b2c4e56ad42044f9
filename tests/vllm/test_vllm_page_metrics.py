"""Metrics of listed pages: their files, and a worker that goes on where the disk is full, and says so once."""

from __future__ import annotations

import errno
import os

import pytest


class Tally:
    """As `tally.Tally`, with counts that a test sets."""

    def __init__(self) -> None:
        self.read = 0

    def snapshot(self) -> dict:
        groups = {name: [self.read, 0, 0] for name in ("pages_read", "pages_visible", "left_out_mass", "decisions")}
        return groups | {"rows_listed": 1, "rows_dense": 0, "sketch_bytes": 64}


@pytest.fixture
def metrics(monkeypatch, tmp_path):
    from vllm_plugin import metrics

    monkeypatch.setenv(metrics.DIRECTORY, str(tmp_path))
    monkeypatch.delenv(metrics.VLLM_DIRECTORY, raising=False)
    monkeypatch.setattr(metrics, "_publisher", None)
    monkeypatch.setattr(metrics, "_unpublished", False)
    monkeypatch.setattr(metrics, "announce", lambda: None)
    monkeypatch.setattr(metrics.threading.Thread, "start", lambda self: None)  # the test is the thread
    monkeypatch.setattr("vllm.distributed.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: type("Group", (), {"is_first_rank": True}))
    metrics.said = []
    monkeypatch.setattr(metrics.logger, "warning", lambda message, *values: metrics.said.append(message % values))
    return metrics


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_file_has_its_room_and_what_was_counted(metrics, tmp_path):
    tally = Tally()
    metrics.publish("layer", tally)
    tally.read = 5
    metrics._publisher.try_to_publish()
    assert metrics.stats().read == 5 and metrics.stats().sketch_bytes == 64 and metrics.said == []
    for path in tmp_path.iterdir():  # a mapped file without blocks would end the process where the disk has none
        assert path.stat().st_blocks * 512 >= path.stat().st_size == metrics.FILE_BYTES


def test_files_can_be_read_while_they_are_made(metrics, monkeypatch):
    """As by a worker of the same engine, which reads all there are when it starts."""
    others, reserve = Tally(), os.posix_fallocate
    others.read = 3
    metrics.publish("layer", others)
    metrics._publisher.publish()
    read = []

    def reserve_and_read(*args: int) -> None:
        read.append(metrics.stats().read)
        reserve(*args)
        read.append(metrics.stats().read)

    monkeypatch.setattr(metrics, "_publisher", None)
    monkeypatch.setattr(metrics.os, "getpid", lambda: 1)
    monkeypatch.setattr(metrics.os, "posix_fallocate", reserve_and_read)
    metrics.publish("layer", Tally())
    metrics._publisher.publish()
    assert read == [3, 3, 3, 3] and metrics.stats().read == 3


def test_what_can_not_be_written_is_told_once_and_tried_again(metrics, monkeypatch):
    tally = Tally()
    metrics.publish("layer", tally)
    publisher = metrics._publisher
    with monkeypatch.context() as disk:
        disk.setattr(type(publisher._counters), "write_value", full)
        for _ in range(3):
            publisher.try_to_publish()
    assert len(metrics.said) == 1 and "No space left on device" in metrics.said[0]
    tally.read = 7
    publisher.try_to_publish()
    assert metrics.stats().read == 7 and len(metrics.said) == 1


def test_a_worker_without_room_for_its_file_serves_without_metrics(metrics, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "posix_fallocate", full)
    for layer in ("first", "second"):
        metrics.publish(layer, Tally())
    metrics.warmed_up()
    assert len(metrics.said) == 1 and "No metrics of listed pages from this worker" in metrics.said[0]
    assert list(tmp_path.iterdir()) == []  # an empty file would fail who reads

"""One row: inputs, checks, times."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lite_attention.bench.check import LOOSENED, against_peer, against_reference, compare, samples
from lite_attention.bench.contenders import Call, Contender, Ours, OwnContiguous, WithLists
from lite_attention.bench.inputs import Inputs, make_inputs, rows
from lite_attention.bench.results import RowResult
from lite_attention.bench.rows import Row
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_fixed import FixedLists
from lite_attention.bench.skip_work import SkipWork, tile_samples
from lite_attention.bench.targets import OURS, OWN_CONTIGUOUS, OWN_DENSE
from lite_attention.bench.timing import GRAPH_BELOW, Clock, Time, calls_in_graph, graph_of, interleaved

L2_TIMES = 4  # the inputs of a row together are to be this many times the L2 cache
MOST_INPUTS = 16
PROBES = 3  # calls of each contender before it is timed


class Measurement:
    """Measures rows on one device. `tell` hears what is being done."""

    def __init__(
        self,
        device: torch.device,
        peers: Sequence[Contender],
        repetitions: int,
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        self.device = device
        self.peers = peers
        self.repetitions = repetitions
        self.clock = clock
        self.tell = tell

    def measure(self, row: Row, shape: Shape) -> RowResult:
        """The result of a row at `shape`. What raises ends up in it."""
        result = RowResult(row, shape)
        try:
            self._measure(result)
        except NotImplementedError as error:
            result.status, result.reason = "not built", first_line(error)
        except Exception as error:  # whatever it is, the other rows are still to be measured
            result.status, result.reason = "failed", f"{type(error).__name__}: {first_line(error)}"
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # what the next row needs comes in other sizes
        if result.status != "measured":
            result.times = {}
        return result

    def lost(self) -> str | None:
        """What the device says where an error has made it unusable; None where it goes on."""
        try:
            self._wait()
        except RuntimeError as error:
            return first_line(error)
        return None

    def _measure(self, result: RowResult) -> None:
        row = result.row
        self.tell(f"{row.name}: data")
        inputs, work = self._inputs(row, result.shape)
        dense = OURS if work is None else OWN_DENSE
        calls = {dense: [Ours().prepare(one) for one in inputs]}
        out = calls[dense][0]()
        self._wait()

        self.tell(f"{row.name}: check")
        self._check(result, inputs, out, calls)
        if work is not None:  # what is checked so far is what the ideal comes from
            calls, out, result.visited = {OURS: [work]} | calls, work.out, work.visited
            result.agreements += work.check()
            if isinstance(work, FixedLists):
                self._check_lists(result, work, calls)
        if self._mismatch(result):
            return

        self.tell(f"{row.name}: time")
        checked = out.clone()
        out.fill_(math.nan)
        self._time(result, calls, 1 if work is None else work.steps)
        # Counters, plans and lists are used again and again meanwhile: the last result must still be the first.
        result.agreements.append(compare("itself before timing", rows(out), rows(checked), 0.0))
        if work is not None:
            result.agreements.append(work.check_list())
        self._mismatch(result)

    def _check(self, result: RowResult, inputs: list[Inputs], out: Tensor, calls: dict[str, list[Call]]) -> None:
        """Holds out, of the first inputs, against the reference and the peers, and adds the peers' calls."""
        row, expected = result.row, samples(inputs[0])
        result.agreements.append(against_reference(out, expected))
        own = [OwnContiguous()] if row.needs(OWN_CONTIGUOUS) else []
        for peer in (*self.peers, *own):
            if lack := peer.lacks(result.shape):
                result.absent[peer.name] = lack
                result.lacking.add(peer.name)
                continue
            try:
                theirs = [peer.prepare(one) for one in inputs]
                loosened = 1.0 if result.shape.fp8 == "none" else LOOSENED
                agreement = against_peer(peer.name, out, theirs[0](), expected, loosened)
                self._wait()
            except Exception as error:  # of a peer any error is a finding, and the row goes on without it
                if peer in own:
                    raise
                result.absent[peer.name] = f"raised {type(error).__name__}: {first_line(error)}"
                continue
            result.agreements.append(agreement)
            calls[peer.name] = theirs

    def _check_lists(self, result: RowResult, work: FixedLists, calls: dict[str, list[Call]]) -> None:
        """Adds the peers that have lists too. Theirs are of other tiles, so each is held against the reference."""
        for peer in self.peers:
            if not isinstance(peer, WithLists):
                continue
            name = peer.lists_name
            if lack := peer.lacks_lists(result.shape):
                result.absent[name] = lack
                result.lacking.add(name)
                continue
            try:
                visits = work.visits(peer.lists_tile).to(self.device)
                theirs = peer.prepare_lists(work.inputs, visits)
                agreement = against_reference(theirs(), tile_samples(work.inputs, visits, peer.lists_tile))
                self._wait()
            except Exception as error:  # of a peer any error is a finding, and the row goes on without it
                result.absent[name] = f"raised {type(error).__name__}: {first_line(error)}"
                continue
            if agreement.right:
                calls[name] = [theirs]
            else:
                result.absent[name] = f"wrong: {agreement}"

    def _inputs(self, row: Row, shape: Shape) -> tuple[list[Inputs], SkipWork | None]:
        """What dense contenders compute, and what is done with skip lists, in rows with them."""
        count = 1
        if self.device.type == "cuda" and row.skip is None:  # as many as L2 can't hold; lists belong to one
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = min(max(math.ceil(L2_TIMES * cache / shape.io_bytes), 1), MOST_INPUTS)
        seed = zlib.crc32(row.name.encode())  # the same with --only as without
        inputs = [make_inputs(shape, self.device, seed + i) for i in range(count)]
        if row.skip is None:
            return inputs, None
        work = row.skip.prepare(inputs[0], seed)
        return [work.inputs], work

    def _time(self, result: RowResult, calls: dict[str, list[Call]], steps: int) -> None:
        """A call of ours takes `steps` steps, a peer's one; times are of one."""
        probes = {name: Time.of(found).lowest for name, found in interleaved(calls, PROBES, self.clock).items()}
        fastest, count = min(probes.values()), 1
        result.method = "single calls"
        # Servers replay their decode steps, so those rows are replayed however long they take.
        if self.device.type == "cuda" and (result.shape.planned or fastest < GRAPH_BELOW):
            count = calls_in_graph(fastest, len(calls[OURS]))
            result.method = f"graphs of {count} calls, over {len(calls[OURS])} inputs"
            calls = self._graphs(result, calls, count)
            interleaved(calls, 2, self.clock)
        found = interleaved(calls, self.repetitions, self.clock)
        result.times = {name: Time.of(one, count * steps if name == OURS else count) for name, one in found.items()}

    def _graphs(self, result: RowResult, calls: dict[str, list[Call]], count: int) -> dict[str, list[Call]]:
        graphs = {OURS: [graph_of(calls[OURS], count)]}
        for name, theirs in calls.items():
            if name == OURS:
                continue
            try:
                graphs[name] = [graph_of(theirs, count)]
            except Exception as error:  # as above
                result.absent[name] = f"raised {type(error).__name__} in a graph: {first_line(error)}"
        return graphs

    def _mismatch(self, result: RowResult) -> bool:
        if wrong := [one for one in result.agreements if not one.right]:
            result.status, result.reason = "mismatch", "; ".join(map(str, wrong))
        return bool(wrong)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]

"""Bugs to plant in the kernels: one place in csrc/ each, and what stands there instead."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    file: str  # below csrc/
    old: str  # stands there once
    new: str
    tests: str = "dense"  # of check.py, that are to catch it
    late: str | None = None  # stands there once: where all blocks of a cluster but one are late, else none loses


# What shared memory holds before is garbage, which sends all blocks to another round: the one that is early has zeros.
LATE = """\
    if (rank_ != 0) {
      for (int i = 0; i < 10; ++i) __nanosleep(20000);
    } else if (threadIdx.x < blocks_) {
      search_.found[threadIdx.x] = 0;
    }
    __syncthreads();
"""

BUGS = [
    # The mask: one key too many or too few, in a tile on the diagonal, in the choice of such tiles, at a window's edge.
    Bug("mask-end-late", "sm90/mask.cuh", "end_key = end_seen(*lengths, diagonal, seqlen_k);",
        "end_key = end_seen(*lengths, diagonal, seqlen_k) + 1;"),
    Bug("mask-end-early", "sm90/mask.cuh", "end_key = end_seen(*lengths, diagonal, seqlen_k);",
        "end_key = end_seen(*lengths, diagonal, seqlen_k) - 1;"),
    Bug("mask-tile-taken-for-clean", "sm90/mask.cuh", "clean_end = seq.end_key(lengths, rows.first_token) / block_n;",
        "clean_end = seq.end_key(lengths, rows.first_token) / block_n + 1;"),
    Bug("mask-window-late", "sm90/mask.cuh", "first_key = first_seen(*lengths, diagonal),",
        "first_key = first_seen(*lengths, diagonal) + 1,"),
    Bug("unused-rows-of-v-left", "sm90/consumer.cuh",
        "if (int end = item.mask.seqlen_k - item.n * kBlockN; end < kBlockN && !zeros_follow()) {",
        "if (false) {\n        int end = 0;"),
    # Waits: a consumer that does not wait for what it reads, a producer that does not wait for what it overwrites.
    Bug("no-wait-for-q", "sm90/consumer.cuh", "      smem_.q_full[warpgroup_].wait(q_phase_);\n", ""),
    Bug("no-wait-for-first-k", "sm90/consumer.cuh",
        "      q_phase_ ^= 1;\n      await_keys();\n", "      q_phase_ ^= 1;\n"),
    Bug("no-wait-for-next-k", "sm90/consumer.cuh", "      if (!last) await_keys();\n", ""),
    Bug("no-wait-for-v", "sm90/consumer.cuh",
        "      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);\n      const auto first", "      const auto first"),
    Bug("no-wait-for-free-stage", "sm90/producer.cuh", "    loads.empty[ring.stage].wait(ring.phase ^ 1);\n", ""),
    Bug("no-wait-for-free-q", "sm90/producer.cuh",
        "      smem.q_empty[warpgroup].wait((phases_ >> warpgroup & 1) ^ 1);\n", ""),
    # Before PV is even issued: by the time that a step releases V, PV has long ended, waited for or not.
    Bug("v-released-before-pv", "sm90/consumer.cuh", "      bool passed = false;\n",
        "      bool passed = false;\n"
        "      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);\n"
        "      release(smem_.v_empty[ring_v_.stage]);\n"
        "      auto release_v = [&]() { ring_v_.advance(); };\n"),
    Bug("second-item-left-out", "sm90/scheduler.cuh", "    second_ = true;\n", ""),
    Bug("parts-not-counted-anew", "sm90/epilogue.cuh",
        "      if (last) *arrivals = 0;  // for the next launch under the same plan\n", ""),
    # Arithmetic between tiles, and between items.
    Bug("output-not-rescaled", "sm90/consumer.cuh", "        scale_output(rescale);\n",
        "        if (border) scale_output(rescale);\n"),
    Bug("item-before-left-unfinished", "sm90/consumer.cuh", "          finish_rows();\n          start_rows(item);\n",
        "          start_rows(item);\n"),
    Bug("item-before-left-in-the-output", "sm90/consumer.cuh",
        "          border = kUnsaved;\n          fresh = true;\n", "          border = kUnsaved;\n"),
    Bug("parts-joined-to-the-next-item", "sm90/consumer.cuh",
        "const bool whole = Traits::kSkip || item.work.parts == 1;", "const bool whole = true;"),
    # A kernel that begins before the one before it has ended.
    Bug("no-wait-for-kernels-before", "sm90/fwd.cuh", "  if (!in_step) wait_for_kernels_before();\n", ""),
    Bug("cut-does-not-wait-for-scores", "pages/cut.cu", "  if (params.scores) wait_for_kernels_before();\n", "",
        "pages"),
    # Skip lists: votes that are lost or that nobody may cast, a list brought up to date before the votes are in.
    Bug("votes-of-one-warp", "sm90/skip_list.cuh", "if (stays_ >= 0 && threadIdx.x % 32 == 0) or_shared(",
        "if (stays_ >= 0 && threadIdx.x % 128 == 0) or_shared(", "skip"),
    Bug("last-vote-not-cast", "sm90/consumer.cuh", "      item.ballot.cast();\n      lists_.leave();\n",
        "      lists_.leave();\n", "skip"),
    Bug("first-tile-dropped", "sm90/skip_list.cuh",
        "      if (item.first / 32 == w) voted |= 1u << (item.first % 32);", "", "skip"),
    Bug("unused-rows-vote", "sm90/skip_list.cuh", "if (thread_rows.row(i) >= rows.used) softmax.exclude(i);",
        "", "skip"),
    Bug("votes-counted-early", "sm90/skip_list.cuh", "    lists_.left[buffer].wait(ring_.phase ^ 1);\n", "", "skip"),
    Bug("forced-tiles-forgotten", "sm90/skip_list.cuh",
        "if (list_.must_do) bits |= list_.must_do[int64_t{work.batch} * list_.words + w];", "", "skip"),
    # Page lists: pages left out that must not be, a sketch that is off, a list that attention does not follow.
    Bug("list-cut-off-by-a-page", "pages/cut.cu", "params_.counts[list_] = total;",
        "params_.counts[list_] = max(total - 1, 0);", "pages"),
    Bug("newest-pages-forgotten", "pages/cut.cu", "return page == 0 || page >= first_new;", "return page == 0;",
        "pages"),
    Bug("first-page-forgotten", "pages/cut.cu", "return page == 0 || page >= first_new;", "return page >= first_new;",
        "pages"),
    Bug("budget-passed-by-a-page", "pages/cut.cu", "if (sum > budget) atomicMin(&search_.cut, rank);",
        "if (sum > budget) atomicMin(&search_.cut, rank + 1);", "pages"),
    Bug("one-head-decides", "pages/cut.cu", "if (lane_ == 0) atomicMin(&search_.over, over);",
        "if (lane_ == 0 && head == 0) atomicMin(&search_.over, over);", "pages"),
    Bug("budget-of-one-block", "pages/cut.cu", "for (int other = 1; other < blocks_; ++other) {",
        "for (int other = 1; other < 1; ++other) {", "pages"),
    Bug("sums-of-others-not-waited-for", "pages/cut.cu", "    parts_.wait();\n", "", "pages"),
    Bug("pages-of-other-blocks-not-waited-for", "pages/cut.cu", "    found_.wait();\n", "", "pages",
        late="    const int sent = found_here <= room ? found_here : 0;\n"),
    Bug("mean-of-all-keys", "pages/sketch.cu", "(sum[round][i] - key[round][i]) * (1.f / kOthers);",
        "sum[round][i] * (1.f / kPage);", "pages"),
    Bug("some-key-apart", "pages/sketch.cu", "__ballot_sync(~0u, square == most)", "__ballot_sync(~0u, square != most)",
        "pages"),
    Bug("deviation-around-the-mean-of-all", "pages/sketch.cu", " - most * (1.f / kOthers);", ";", "pages"),
    Bug("bias-of-means-kept", "pages/score.cu", "(scales.x - kMeanBias * scales.y) * query.offset",
        "scales.x * query.offset", "pages"),
    Bug("bias-of-differences-kept", "pages/score.cu", "(kBias + kNoDifference) * query.offset", "kBias * query.offset",
        "pages"),
    Bug("window-a-tile-late", "sm90/producer.cuh", "if (used == kTiles) {", "if (used == kTiles + 1) {", "pages"),
    Bug("window-twice", "sm90/producer.cuh", "listed_ = loader_.listed(place(1));",
        "listed_ = loader_.listed(place(0));", "pages"),
    Bug("list-not-followed", "sm90/producer.cuh", "if (list_ && box.outer >= 0) box.outer = __ldcg(list_ + box.outer);",
        "", "pages"),
    # A decode step in one call: lists that workers deal among themselves, kernels that begin before their turn, steps
    # without lists.
    Bug("run-a-tile-late", "sm90/page_scheduler.cuh", "    work.n_begin = tile_;\n",
        "    work.n_begin = tile_ + (tile_ > 0);\n", "decode"),
    Bug("parts-without-the-last", "sm90/page_scheduler.cuh",
        "work.parts = int(unsigned(item + weight - 1) / unsigned(run_)) - work.first_run + 1;",
        "work.parts = max(1, int(unsigned(item + weight - 1) / unsigned(run_)) - work.first_run);", "decode"),
    Bug("last-page-taken-for-full", "sm90/page_scheduler.cuh", "count > 0 ? count * kPage - missing : 0",
        "count * kPage", "decode"),
    Bug("rows-without-keys-left-out", "sm90/page_scheduler.cuh",
        "max(1, tiles_of(count_of(list)))", "tiles_of(count_of(list))", "decode"),
    Bug("groups-of-many-lists-taken-for-one", "sm90/page_scheduler.cuh", "first = found * groups_of_lane * 32;",
        "first = found * 32;", "decode"),
    Bug("dense-step-walks-lists", "sm90/page_scheduler.cuh",
        "(params.step_lists.indices && *Plan::listed(params.plan))", "params.step_lists.indices", "decode"),
    Bug("lists-walked-for-an-eps-of-0", "ops.cu", "if (pages::may_leave_out(select)) params.step_lists = lists;",
        "params.step_lists = lists;", "decode"),
    Bug("lists-not-waited-for", "sm90/page_scheduler.cuh", "if (take == 1) wait_for_kernels_before();", "", "decode"),
    Bug("score-does-not-wait-for-sketches", "pages/score.cu", "    if (waits_) wait_for_kernels_before();\n", "",
        "decode"),
    Bug("every-step-without-lists", "pages/whole.cuh", "return params.listed && !*params.listed;",
        "return params.listed;", "decode"),
    Bug("sequences-without-queries-counted", "pages/whole.cuh", "scope.q_len > 0 ? scope.pages : 0", "scope.pages",
        "decode"),
    Bug("left-out-of-some-heads-kept", "pages/whole.cuh", "i < lists * params.group;", "i < lists;", "decode"),
    Bug("marks-forgotten-by-the-plan", "sm90/plan.cu",
        "(keys >= whole.min_context && !(whole.marked && whole.marked[b]))", "keys >= whole.min_context", "decode"),
    Bug("plan-has-the-least-context-short", "sm90/plan.cu", "(keys >= whole.min_context &&",
        "(keys > whole.min_context &&", "decode"),
    Bug("first-sequence-decides-for-the-step", "sm90/plan.cu", "return __syncthreads_or(any);", "return any;",
        "decode"),
    # FP8 queries, keys and values: factors, the converter's waits, its order of elements.
    Bug("fp8-queries-unscaled", "sm90/descale.cuh", "scores_ *= load(params.q_descale, work.batch, kv_head);", "{}",
        "fp8"),
    Bug("fp8-values-scaled-as-the-first-head", "sm90/descale.cuh",
        "values_ = load(params.v_descale, work.batch, kv_head);", "values_ = load(params.v_descale, work.batch, 0);",
        "fp8"),
    Bug("fp8-no-wait-for-loaded", "sm90/converter.cuh",
        "    loads.full[rings.from.stage].wait(rings.from.phase);\n", "", "fp8"),
    Bug("fp8-no-wait-for-free", "sm90/converter.cuh", "    empty[rings.to.stage].wait(rings.to.phase ^ 1);\n", "",
        "fp8"),
    Bug("fp8-halves-swapped", "sm90/converter.cuh", "* kThreads, pairs[2], pairs[3]);",
        "* kThreads, pairs[3], pairs[2]);", "fp8"),
]  # fmt: skip


def plant(bug: Bug, csrc: Path) -> None:
    """Changes the copy of csrc/ at `csrc`.

    Raises:
        ValueError: a text of the bug does not stand there once: the source has moved on, and the bug must follow.
    """
    path = csrc / bug.file
    text = path.read_text()
    for old, new in [(bug.old, bug.new)] + ([(bug.late, LATE + bug.late)] if bug.late else []):
        if (count := text.count(old)) != 1:
            raise ValueError(f"{bug.name}: its text stands {count} times in csrc/{bug.file}; needs to stand there once")
        text = text.replace(old, new)
    path.write_text(text)

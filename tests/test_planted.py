"""The planted bugs still fit the kernels; building and running them needs nvcc and a Hopper GPU (tests/gpu/planted)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "gpu" / "planted"))

import bugs
import check

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.name)
def test_a_bug_has_one_place_in_the_source(bug, tmp_path):
    before = (ROOT / "csrc" / bug.file).read_text()
    (tmp_path / bug.file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "csrc" / bug.file, tmp_path / bug.file)
    bugs.plant(bug, tmp_path)
    after = (tmp_path / bug.file).read_text()
    late = len(bugs.LATE) if bug.late else 0
    assert after != before and len(after) == len(before) - len(bug.old) + len(bug.new) + late
    with pytest.raises(ValueError, match=f"{bug.name}: its text stands 0 times"):
        (tmp_path / bug.file).write_text(before.replace(bug.old, ""))
        bugs.plant(bug, tmp_path)


def test_names_are_of_one_bug_each_and_every_bug_has_its_tests():
    names = [bug.name for bug in bugs.BUGS]
    assert len(set(names)) == len(names) and check.SOUND not in names
    assert {bug.tests for bug in bugs.BUGS} == set(check.TESTS) == set(check.tests_of(check.SOUND))
    for files, _ in check.TESTS.values():
        assert all((ROOT / file).is_file() for file in files)


def test_what_is_missed():
    found = {name: {"outcome": "passes"} for name in ("sound/dense", "mask-end-late")}
    found |= {name: {"outcome": "fails"} for name in ("sound/fp8", "mask-end-early")}
    found["no-wait-for-q"] = {"outcome": "hangs"}
    assert check.missed(found) == ["mask-end-late", "sound/fp8"]

"""The runner of the GPU suite: shares of tests, what is put together of them, and several GPUs at once."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu_fleet
import gpu_suite
import shard

BENCHMARKS = Path(shard.__file__).parent


def test_shards_share_all_tests(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(7))\ndef test_one(i): pass\n"
    )
    found = []
    for i in range(1, 4):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "shard", f"--shard={i}/3", "."]
        environment = {"PYTHONPATH": str(BENCHMARKS), "PATH": ""}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        of_run = [line for line in done.stdout.splitlines() if "::" in line]
        assert len(of_run) in (2, 3), done.stdout + done.stderr
        found += of_run
    assert sorted(found) == [f"test_some.py::test_one[{i}]" for i in range(7)]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "/2", "1/", "a/b", "-1/2"])
def test_a_shard_that_can_not_be_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="needs I/N"):
        shard.part_of(text)


def written(out, name, outcomes, **more):
    result = {"gpu": "H100", "driver": "1", "commit": "abc", "date": "today", "part": name.split("-")[0], "exit": 0}
    (out / f"{name}.json").write_text(json.dumps(result | {"seconds": 2.5, "outcomes": outcomes} | more))


def test_shards_are_put_together(tmp_path):
    written(tmp_path, "memcheck-1-of-2", {"a": "passed"}, sanitizer=["ERROR SUMMARY: 0 errors"])
    written(tmp_path, "memcheck-2-of-2", {"b": "failure"}, sanitizer=["ERROR SUMMARY: 0 errors"], exit=1)
    written(tmp_path, "errors", {"c": "passed"})
    written(tmp_path, "kernels-2-of-3", {"d": "passed"}, measured={"d": {"x": 1.0}}, exit=-9)
    assert sorted(path.name for path in gpu_suite.merge(tmp_path)) == ["kernels.json", "memcheck.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.json", "kernels.json", "memcheck.json"]
    memcheck, kernels = (json.loads((tmp_path / f"{part}.json").read_text()) for part in ("memcheck", "kernels"))
    assert memcheck["outcomes"] == {"a": "passed", "b": "failure"} and memcheck["exit"] == 1
    assert memcheck["seconds"] == 5.0 and memcheck["runs"] == 2 and "missing" not in memcheck
    assert kernels["missing"] == ["1/3", "3/3"] and kernels["measured"] == {"d": {"x": 1.0}} and kernels["exit"] == -9
    table = gpu_suite.table([tmp_path / "memcheck.json", tmp_path / "kernels.json"])
    assert "| b | 0 | 1 | 0 |" in table and "`ERROR SUMMARY: 0 errors` (2 times)" in table
    assert "in 2 runs together, exit status 1" in table and "in 1 runs together, without 1/3, 3/3" in table


def test_what_a_sanitizer_sums_up_is_kept(capsys):
    code = "print('========= ERROR SUMMARY: 3 errors'); print('= RACECHECK SUMMARY: 1 hazard displayed'); exit(3)"
    printed, status = gpu_suite.followed([sys.executable, "-c", code], {})
    assert status == 3 and capsys.readouterr().out == printed
    assert gpu_suite.SUMMARY.findall(printed) == ["ERROR SUMMARY: 3 errors", "RACECHECK SUMMARY: 1 hazard displayed"]


def python(name, code, **more):
    return gpu_fleet.Job(name, (sys.executable, "-c", code), **more)


def test_jobs_run_on_every_gpu_until_they_are_done(tmp_path):
    late = tmp_path / "late"
    jobs = [
        python("one", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"),
        python("two", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])", gpus=2),
        python("fails", "exit(7)"),
        python("hangs", "import time; print('began', flush=True); time.sleep(60)"),
        python("after", "pass", after=late),
        python("never", "pass", after=tmp_path / "nothing"),
    ]
    began = time.monotonic()
    threading.Timer(1.0, late.touch).start()
    said = []
    fleet = gpu_fleet.Fleet(["4", "6"], 1, tmp_path / "logs", said.append)
    status = fleet.run(jobs, 30, 3, lambda: time.monotonic() < began + 2)
    assert status == {
        "one": 0, "two": 0, "fails": 7, "hangs": "ran out of time", "after": 0, "never": "not run"
    }  # fmt: skip
    assert len(said) == 5
    logs = {path.stem: path.read_text().strip() for path in (tmp_path / "logs").iterdir()}
    assert logs["one"] in ("4", "6") and logs["two"] in ("4,6", "6,4") and logs["hangs"] == "began"


def test_all_jobs_end_with_the_time(tmp_path):
    jobs = [python(f"long-{i}", "import time; time.sleep(60)") for i in range(3)]
    status = gpu_fleet.Fleet(["0"], 2, tmp_path, lambda text: None).run(jobs, 1, 50, lambda: False)
    assert sorted(status.values()) == ["not run", "ran out of time", "ran out of time"]


def test_jobs_of_the_suite_cover_each_part_once(tmp_path):
    jobs = gpu_fleet.suite_jobs(["kernels", "racecheck", "errors"], 2, "abc", tmp_path, ["-x"])
    commands = [" ".join(job.command[2:]) for job in jobs]
    assert len(jobs) == 6 + 2 + 1 and len({job.name for job in jobs}) == 9
    assert commands[0] == f"run racecheck --commit abc --out {tmp_path} -x --shard 1/6"
    assert commands[-1] == f"run errors --commit abc --out {tmp_path} -x -n {gpu_fleet.KERNEL_WORKERS}"


def test_jobs_of_planted_bugs_wait_for_their_libraries(tmp_path):
    jobs = gpu_fleet.planted_jobs(tmp_path, tmp_path, ["mask-end-late", "list-not-followed"])
    assert [job.name.partition("-")[2] for job in jobs] == [
        *(f"sound-{tests}" for tests in gpu_fleet.check.TESTS), "mask-end-late-dense", "list-not-followed-pages"
    ]  # fmt: skip
    assert jobs[-1].after == tmp_path / "list-not-followed.so" and jobs[-1].command[-1] == "pages"
    (tmp_path / "planted-a.json").write_text('{"a": {"outcome": "fails"}}')
    (tmp_path / "planted-b.json").write_text('{"sound/fp8": {"outcome": "passes"}}')
    assert gpu_fleet.merge_planted(tmp_path) == json.loads((tmp_path / "planted.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["planted.json"]

"""/opt/venv/bin/python collect.py ARCHIVE... INTO: unpacks the results, puts together what belongs together, prints tables.

ARCHIVE: serve.tar.xz or serve-partial.tar.xz; of several machines one each, the last one's files win. Pieces .aa, .ab of
one archive are to be put together with cat first. INTO gets vllm-code.json, vllm-lists.json, vllm-lists-tp2.json,
vllm.json (tests), memcheck.json and such, planted.json, soak-*.json, quality-*.json and all as it came in raw/.
"""
import collections
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path("/work/main/benchmarks")))
import gpu_suite
import vllm_code
import vllm_profile

*archives, into = map(Path, sys.argv[1:])
raw = into / "raw"
raw.mkdir(parents=True, exist_ok=True)
for archive in archives:
    subprocess.run(["tar", "-C", str(raw), "-xJf", str(archive)], check=True)


def load(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"MISSING {path.relative_to(raw)}: {type(error).__name__}")
        return {}


def keep(name, value):
    if value:
        (into / name).write_text(json.dumps(value, indent=1))


print((raw / "driver.log").read_text()[-4000:])
code, outputs = {}, {}
for name in ("code-lite", "code-flash", "code-lite-hnd"):
    more = " HND" if name.endswith("hnd") else ""
    code |= {key + more: value for key, value in load(raw / name / "code.json").items()}
    if (file := raw / name / "code.outputs.json").exists():
        outputs |= {key + more: value for key, value in vllm_code.read([file]).items()}
if vllm_code.PEER in outputs:
    vllm_code.compare({name: each for name, each in code.items() if name in outputs}, outputs)
keep("vllm-code.json", code)
if code:
    print("\n== vllm_code\n" + vllm_code.table(code))
if (raw / "gen").exists() and (gen := load(raw / "gen/gen.json")):
    keep("vllm-generation.json", gen)
    if (file := raw / "gen/gen.differences.md").exists():
        (into / "vllm-generation.md").write_text(file.read_text())
    print("\n== vllm_code, generation\n" + vllm_code.table(gen))
for title, names, file in (
    ("one GPU", ("lists-lite", "lists-flash"), "vllm-lists.json"),
    ("24 requests, two GPUs", ("tp2-lite", "tp2-flash"), "vllm-lists-tp2.json"),
):
    lists = {}
    for name in names:
        lists |= load(raw / name / "lists.json")
    keep(file, lists)
    print(f"\n== vllm_lists, {title}")
    for name, each in lists.items():
        print(each["gpu"], each["requests"], "requests")
        low, _, high = each["ms_quartiles"]
        print(f"{name}: {each['ms_per_token']:.2f} ms a token, {low:.2f} to {high:.2f}, prefill {each['prefill_s']:.1f} s, "
              f"compile {each['torch_compile']}, pages read {each.get('pages_read')}")
    if len(lists) == 2:
        print(f"FLASH_ATTN / LITE_ATTENTION: {lists['FLASH_ATTN']['ms_per_token'] / lists['LITE_ATTENTION']['ms_per_token']:.3f}")
    kernels = {f"{title} {name}": each["kernels"] for name, each in lists.items() if each.get("kernels")}
    print(vllm_profile.table(kernels))
kernels = {f"Qwen {name}": each["kernels"] for name, each in code.items() if each.get("kernels")}
print(vllm_profile.table(kernels))

tests = {}
for folder in sorted(raw.glob("test-*")):
    found = load(folder / "vllm.json")
    if found:
        tests = tests or {**found, "outcomes": {}, "seconds": 0, "exit": 0}
        tests["outcomes"] |= found["outcomes"]
        tests["seconds"] = max(tests["seconds"], found["seconds"])
        tests["exit"] = tests["exit"] or found["exit"]
        print(folder.name, found["exit"], found["seconds"], "s", {k: v for k, v in found["outcomes"].items() if v != "passed"})
keep("vllm.json", tests)
for name in ("memcheck", "racecheck", "synccheck", "errors", "two_gpus"):
    folder = raw / name
    if any(folder.glob("*-of-*.json")):  # it was cut off
        gpu_suite.merge(folder)
    found = load(folder / f"{name}.json")
    keep(f"{name}.json", found)
    if found:
        counts = collections.Counter(found["outcomes"].values())
        print(name, found["exit"], found["seconds"], "s", dict(counts), "missing", found.get("missing"))
        print(collections.Counter(found.get("sanitizer", ())))
        print([test for test, each in found["outcomes"].items() if each not in ("passed", "skipped")][:20])
folder = raw / "planted-check"
planted = load(folder / "planted.json")
for file in sorted(folder.glob("planted-*.json")):  # it was cut off
    planted |= json.loads(file.read_text())
keep("planted.json", planted)
if planted:
    sys.path.insert(0, "/work/main/tests/gpu/planted")
    import bugs, check

    print(f"planted: {len(planted)} results, not caught, or sound kernels that failed: {check.missed(planted)}")
    print("hang", [name for name, each in planted.items() if each["outcome"] == "hangs"])
    print("not run", [bug.name for bug in bugs.BUGS if bug.name not in planted])
for name in ("suite", "pages"):
    folder = raw / name
    if any(folder.glob("*-of-*.json")):
        gpu_suite.merge(folder)
    if folder.exists() and (found := load(folder / "kernels.json")):
        keep("kernels.json" if name == "suite" else "kernels-pages.json", found)
        counts = collections.Counter(found["outcomes"].values())
        print(name, found["exit"], found["seconds"], "s", dict(counts), "missing", found.get("missing"))
        print([test for test, each in found["outcomes"].items() if each not in ("passed", "skipped")][:20])
for name in ("decode", "further"):
    table = raw / "bench" / name / "README.md"
    if table.exists():
        print(f"\n== bench {name}\n" + "\n".join(line for line in table.read_text().splitlines() if line.startswith("|")))
for folder in sorted(raw.glob("soak-*")):
    found = load(folder / "soak.json")
    keep(f"{folder.name}.json", found)
    if found:
        print(f"\n== {folder.name}: {found['seconds']:.0f} s, {found['requests']}, ends {found['ends']}, canaries {found['canaries']}")
        print({k: round(v, 3) for k, v in found["counted"].items()})
        print("drift MiB", found["host_drift_mib"], found["gpu_drift_mib"], "to end", found["seconds_to_end"])
        print("FAULTS", found["faults"])
    else:
        print((raw / "logs" / f"{folder.name}.log").read_text()[-1500:])
for folder in sorted(each for name in raw.glob("q-*") for each in (name, name / "known", name / "held")):
    if not (folder / "results.json").exists() and (folder.name in ("known", "held") or (folder / "known").exists()):
        continue  # of two parts, or one that has not come
    label = str(folder.relative_to(raw)).replace("/", "-").removeprefix("q-")
    keep(f"quality-{label}.json", load(folder / "results.json"))
    if (folder.parent / "own.toml").exists():
        (into / f"quality-{label}.toml").write_text((folder.parent / "own.toml").read_text())
    if (folder / "README.md").exists():
        print(f"\n== {label}\n" + (folder / "README.md").read_text()[:6000])

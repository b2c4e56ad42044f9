"""collect.py serve.tar.xz INTO: unpacks the campaign's results, puts together what belongs together, prints the tables.

INTO gets vllm-code.json, vllm-lists.json, vllm-lists-tp2.json, vllm.json (tests), soak-*.json, quality-*.json and all
as it came in raw/.
"""
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path("/work/wt/serve/benchmarks")))
import vllm_code
import vllm_profile

archive, into = map(Path, sys.argv[1:])
raw = into / "raw"
raw.mkdir(parents=True, exist_ok=True)
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
for name in ("code-lite", "code-flash", "code-lite-002"):
    code |= load(raw / name / "code.json")
    outputs |= load(raw / name / "code.outputs.json")
if vllm_code.PEER in outputs:
    for name in code.keys() & outputs.keys() - {vllm_code.PEER}:
        code[name]["agreement"] = vllm_code.agreement(outputs[name], outputs[vllm_code.PEER])
keep("vllm-code.json", code)
if code:
    print("\n== vllm_code\n" + vllm_code.table(code))
for title, names, file in (
    ("12 requests, one GPU", ("lists-lite", "lists-flash"), "vllm-lists.json"),
    ("24 requests, two GPUs", ("tp2-lite", "tp2-flash"), "vllm-lists-tp2.json"),
):
    lists = {}
    for name in names:
        lists |= load(raw / name / "lists.json")
    keep(file, lists)
    print(f"\n== vllm_lists, {title}")
    for name, each in lists.items():
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
for folder in sorted(raw.glob("q-*")):
    found = load(folder / "results.json")
    keep(f"quality-{folder.name.removeprefix('q-')}.json", found)
    if (folder / "README.md").exists():
        print(f"\n== {folder.name}\n" + (folder / "README.md").read_text()[:6000])

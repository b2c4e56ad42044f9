"""compare.py CASE_REGEX name=dir[:LA_EXP] ... : interleaved over processes. Reports us and share of ideal/FA3."""
import json, os, re, subprocess, sys
from statistics import median
rounds, per = int(os.environ.get("ROUNDS", 5)), int(os.environ.get("PER", 4))
here = os.path.dirname(os.path.abspath(__file__))
workers = {}
for spec in sys.argv[2:]:
    name, rest = spec.split("=")
    d, _, exp = rest.partition(":")
    env = dict(os.environ, PYTHONPATH=d, LA_EXP=exp or "0x24")
    workers[name] = subprocess.Popen([sys.executable, here + "/worker.py", "fa3" if name == "FA3" else "own"], cwd="/tmp", env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
def tell(name, line):
    w = workers[name]; w.stdin.write(line + "\n"); w.stdin.flush()
def hear(name): return json.loads(workers[name].stdout.readline())
def ask(name, line):
    tell(name, line)
    return hear(name)
for w in workers.values(): assert w.stdout.readline().strip() == "ready"
sys.path.insert(0, here)
order = [f"dense {m} {s}" for m in ("full","causal") for s in ("8x2k","2x8k","32k")] + [f"skip {m} {p:.1f}" for m in ("full","causal") for p in (0.0,0.5,0.8,0.9)]
dense = {}
for case in [c for c in order if re.search(sys.argv[1], c)]:
    names = [n for n in workers if not (n == "FA3" and case.startswith("skip")) and not (n.endswith("!") and case.startswith("dense"))]
    vis = 1.0
    ok = []
    for n in names: tell(n, f"prepare|{case}|0")
    for n in names:
        r = hear(n)
        if "error" in r: print("ERR", n, case, r["error"]); continue
        vis = r["visited"]; ok.append(n)
    t = {n: [] for n in ok}
    for r in range(rounds):
        for n in ok[r % len(ok):] + ok[:r % len(ok)]:
            a = ask(n, f"time|{case}|{per * 8 if '2k' in case else per}")
            if isinstance(a, dict): print("ERR", n, case, a); continue
            t[n] += a
    med = {n: median(x) for n, x in t.items() if x}
    m = "full" if "full" in case else "causal"
    if case.startswith("dense"):
        ref = med.get("FA3")
        if case.endswith("32k"): dense[m] = min(med.values())
        print(f"{case:20s}", "  ".join(f"{n} {us:8.1f} us" + (f" {ref/us:5.3f}" if ref else "") for n, us in med.items()), flush=True)
    else:
        ideal = dense.get(m, 0) * vis
        print(f"{case:20s} kept {vis:.4f} ideal {ideal:8.1f}", "  ".join(f"{n} {us:8.1f} us {ideal/us:5.3f}" for n, us in med.items()), flush=True)
for w in workers.values(): w.stdin.close()

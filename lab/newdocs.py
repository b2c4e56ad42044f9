"""newdocs.py INTO [--to QUALITY] [--tables-only]: copies results of a batch to the names of quality/, prints all tables.

QUALITY: default benchmarks/results/2026-11-27-h200/quality of /work/main. q-qwen-12 is taken from q-loss-16k.
Prints first a check of what is in place: commits, texts as before or others (dense perplexity), pictures' test of 9.
"""
import argparse, json, math, re, shutil, statistics, sys
from pathlib import Path

NAMES = {  # folder in INTO: name below QUALITY; PNG only where there was one
    "q-loss-16k": "loss-16k", "q-loss-32k": "loss-32k", "q-retrieval": "retrieval", "q-generation": "generation",
    "q-smol": "smol", "q-layer-0.1": "smol-by-layer-0.1", "q-layer-0.02": "smol-by-layer-0.02",
    "q-0.1/known": "held-out/0.1-known", "q-0.1/held": "held-out/0.1-held",
    "q-0.02/known": "held-out/0.02-known", "q-0.02/held": "held-out/0.02-held",
    "q-0.02-half/known": "held-out/0.02-kl-0.001-known", "q-0.02-half/held": "held-out/0.02-kl-0.001-held",
    "q-qwen-12": "sketch-bits/qwen-12", "q-qwen-8": "sketch-bits/qwen-8",
    "q-smol-12": "sketch-bits/smol-12", "q-smol-8": "sketch-bits/smol-8",
}
TOML = {"q-layer-0.1": "smol-0.1", "q-layer-0.02": "smol-0.02", "q-0.1": "held-out/0.1", "q-0.02": "held-out/0.02",
        "q-0.02-half": "held-out/0.02-kl-0.001"}
KIND = {"code": "Python source", "docs": "documentation", "essays": "essays"}
GROUPS = {"0-2": range(0, 3), "3-10": range(3, 11), "11-19": range(11, 20), "20-29": range(20, 30), "11-29": range(11, 30)}


def source(into, folder):
    if folder == "q-qwen-12" and not (into / folder).exists():
        folder = "q-loss-16k"
    return into / folder


def copy(into, to):
    for folder, name in NAMES.items():
        at, new = source(into, folder), to / name
        if not (at / "results.json").exists():
            print(f"MISSING {at}"); continue
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(at / "results.json", f"{new}.json")
        text = (at / "README.md").read_text().replace("[results.json](results.json)", f"[{new.name}.json]({new.name}.json)")
        if (at / "loss.png").exists() and "/" not in name:
            shutil.copyfile(at / "loss.png", f"{new}.png")
            text = text.replace("(loss.png)", f"({new.name}.png)")
        else:
            text = text.replace("![Loss against bytes read](loss.png)\n\n", "")
        assert "results.json" not in text and "loss.png" not in text, folder
        Path(f"{new}.md").write_text(text)
    for folder, name in TOML.items():
        if (into / folder / "own.toml").exists():
            shutil.copyfile(into / folder / "own.toml", to / f"{name}.toml")
        else:
            print(f"MISSING {into / folder}/own.toml")


kind = lambda loss: loss["text"].split(".")[0].split("-")[0]
by_layer = lambda loss: bool(loss["setting"].get("layer_eps"))
pct = lambda x, s="+": f"{100 * x:{s}.2f}%"
change = lambda loss: f"{pct(loss['change'])} ± {100 * loss['change_error']:.2f}"
span = lambda xs, f: f"{f(min(xs))} to {f(max(xs))}"
three = lambda x: f"{x:.3f}"
four = lambda x: f"{x:.4f}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("into", type=Path)
    parser.add_argument("--to", type=Path, default=Path("/work/main/benchmarks/results/2026-11-27-h200/quality"))
    parser.add_argument("--root", type=Path, default=Path("/work/main"))
    parser.add_argument("--tables-only", action="store_true", help="of what is in --to")
    a = parser.parse_args()
    Q = a.to
    before = {}
    read = lambda name: json.loads((Q / f"{name}.json").read_text())
    dense = lambda d: {(l["text"], l["context"], l["positions"]): round(l["perplexity"] / (1 + l["change"]), 3) for l in d["loss"]}
    for name in NAMES.values():
        if (Q / f"{name}.json").exists():
            before[name] = dense(read(name)), read(name)["environment"]["commit"]
    if not a.tables_only:
        copy(a.into, Q)
    D = {name: read(name) for name in NAMES.values() if (Q / f"{name}.json").exists()}
    L = {name: d["loss"] for name, d in D.items()}

    print("\n## Check: commit, GPU, sketch_bits; texts as before?")
    for name, d in D.items():
        old, commit = before.get(name, ({}, None))
        print(f"{name:32} {d['environment']['commit']} (before {commit}) {d['environment']['GPU']} bits {d.get('sketch_bits')}",
              "same texts" if dense(d) == old else "OTHER TEXTS" if d["loss"] else "",
              "" if dense(d) == old else [f"{k[0]} {old.get(k)} -> {v}" for k, v in dense(d).items()][:3])

    print("\n## Guide, text by text: Qwen (loss-16k, loss-32k), then SmolLM2 (smol)\n")
    head = ("| text | context | eps | bytes read | perplexity | change | KL, nats a token | same token | left out, estimate | left out |\n"
            + "|---" * 10 + "|")
    def rows(losses):
        for l in losses:
            r = l["read"]
            print(f"| {KIND[kind(l)]} | {l['context']} | {l['setting']['eps']:g} | {r['bytes']:.3f} | {l['perplexity']:.3f} | {change(l)} "
                  f"| {l['divergence']:.4f} | {100 * l['same_first']:.1f}% | {r['left_out_estimate']:.4f} | {r['left_out']:.4f} |")
    print(head)
    rows(sorted(L["loss-16k"] + L["loss-32k"], key=lambda l: (list(KIND).index(kind(l)), l["context"], l["setting"]["eps"])))
    print(); print(head); rows(L["smol"])
    print("positions:", {n: sorted({l["positions"] for l in L[n]}) for n in L if L[n]})

    print("\n## README quality table\n\n| model, context | text | eps 0.02: bytes read, change | eps 0.1: bytes read, change |\n|---|---|---|---|")
    for label, name in (("Qwen2.5-Coder-0.5B, 16k", "loss-16k"), ("32k", "loss-32k"), ("SmolLM2-135M, 8k", "smol")):
        for k in KIND:
            cells = [f"{l['read']['bytes']:.3f}, {change(l)}" for e in (0.02, 0.1) for l in L[name] if kind(l) == k and l["setting"]["eps"] == e]
            print(f"| {label if k == 'code' else ''} | {KIND[k].replace('Python source', 'code')} | " + " | ".join(cells) + " |")

    print("\n## Ranges quoted, one eps (A rule 2; text by text)")
    for label, names in (("Qwen", ("loss-16k", "loss-32k")), ("SmolLM2", ("smol",))):
        for e in (0.02, 0.1):
            ls = [l for n in names for l in L[n] if l["setting"]["eps"] == e]
            print(f"{label} {e}: read {span([l['read']['bytes'] for l in ls], three)}; change {span([l['change'] for l in ls], pct)}; "
                  f"KL {span([l['divergence'] for l in ls], four)}; left out {span([l['read']['left_out'] for l in ls], four)}, "
                  f"over estimate {span([l['read']['left_out'] / l['read']['left_out_estimate'] for l in ls], lambda x: f'{x:.2f}')}")
            l0 = [l["layers"]["0"] for l in ls]
            print(f"   layer 0: estimate {span([x['left_out_estimate'] for x in l0], four)}, left out {span([x['left_out'] for x in l0], four)}, pages {span([x['pages'] for x in l0], three)}")
            if label == "SmolLM2":
                for g, layers in GROUPS.items():
                    xs = [(kind(l), l["layers"][str(i)]) for l in ls for i in layers]
                    print(f"   layers {g}: estimate {span([x['left_out_estimate'] for _, x in xs], three)}, left out {span([x['left_out'] for _, x in xs], three)}; "
                          + "; ".join(f"{k} {span([x['left_out'] for c, x in xs if c == k], three)}" for k in KIND))

    print("\n## An eps for each layer (smol-by-layer-*): guide, then README\n\n| text | `eps` | bytes read, change of perplexity, KL | by layer |\n|---|---|---|---|")
    pick = lambda name, k, own: next(l for l in L[name] if kind(l) == k and by_layer(l) == own)
    full = lambda l: f"{l['read']['bytes']:.3f}, {change(l)}, {l['divergence']:.4f}"
    short = lambda l: f"{l['read']['bytes']:.3f}, {change(l)}"
    for k in KIND:
        for e in ("0.02", "0.1"):
            print(f"| {KIND[k]} | {e} | {full(pick(f'smol-by-layer-{e}', k, False))} | {full(pick(f'smol-by-layer-{e}', k, True))} |")
    print("\n| SmolLM2-135M, 8k | eps 0.02, all layers | by layer | eps 0.1, all layers | by layer |\n|---|---|---|---|---|")
    for k in KIND:
        print(f"| {KIND[k].replace('Python source', 'code')} | " + " | ".join(short(pick(f"smol-by-layer-{e}", k, own)) for e in ("0.02", "0.1") for own in (False, True)) + " |")

    print("\n## Layers at the target (calibrations): KL alone per text, the largest 6; eps below target")
    for name in [n for n in D if D[n].get("calibration")]:
        c = D[name]["calibration"]
        top = sorted(c["at_target"].items(), key=lambda x: -max(x[1]["divergence"]))[:6]
        print(name, f"target {c['found']['target']} budget {c['budget']:.4f}", "eps:", {i: e for i, e in c["found"]["eps"].items() if e < c["found"]["target"]})
        for i, x in top:
            print(f"   layer {i}: KL " + ", ".join(f"{v:.4f} ± {s:.4f}" for v, s in zip(x["divergence"], x["error"])), f"left out {x['left_out']:.3f}")
        md = (Q / f"{name}.md").read_text()
        print("\n".join("   " + x for x in md[md.index("| text | read at the target"):].split("\n\n")[0].splitlines()))

    print("\n## Example calibration file of the guide (smol-0.1.toml, its head and layers 17, 18)")
    toml = (Q / "smol-0.1.toml").read_text()
    print("\n".join(x for x in toml.splitlines() if not re.match(r"\d+ = ", x) or re.match(r"1[78] = ", x)))

    print("\n## Held-out: table of guide and README (guide_pictures.py)\n")
    sys.path.insert(0, str(a.root / "benchmarks"))
    try:
        import guide_pictures
        guide_pictures.RESULTS = Q.parent
        print(guide_pictures.table())
        found = [p.setting for p in guide_pictures.points(("held-out/0.02-held", "held-out/0.02-kl-0.001-held"))]
        print("test's counts, 9 each:", {s: found.count(s) for s in found})
        every = [p for names in guide_pictures.PANELS.values() for p in guide_pictures.points(names)]
        print("panels: read", span([p.read for p in every], three), "(axis 0.1 to 0.65); change", span([p.change for p in every], pct))
    except ImportError as error:
        print("no matplotlib here:", error)
    names = {"0.1": False, "0.1 by layer": True, "0.02": False, "0.02 by layer": True, "0.02-kl-0.001 by layer": True}
    for s, own in names.items():
        n = s.split()[0]
        ls = [l for l in L[f"held-out/{n}-held"] if by_layer(l) == own]
        known = [l for l in L[f"held-out/{n}-known"] if by_layer(l) == own]
        means = {k: statistics.mean(l["change"] for l in ls if kind(l) == k) for k in KIND}
        reads = {k: statistics.mean(l["read"]["bytes"] for l in ls if kind(l) == k) for k in KIND}
        kls = {k: statistics.mean(l["divergence"] for l in ls if kind(l) == k) for k in KIND}
        errors = [math.hypot(*(l["change_error"] for l in ls if kind(l) == k)) / 3 for k in KIND]
        worst = max(ls, key=lambda l: l["change"])
        print(f"{s}: read by kind {span(reads.values(), three)}; change by kind {span(means.values(), pct)} (errors {span(errors, lambda x: f'{100 * x:.2f}')}); "
              f"KL by kind {span(kls.values(), four)}; texts {span([l['change'] for l in ls], pct)}, most {worst['text']} {change(worst)}")
        for k in KIND:
            print(f"   {k}: texts {span([l['change'] for l in ls if kind(l) == k], pct)}")
        print("   known: " + ", ".join(f"{kind(l)} {change(l)} read {l['read']['bytes']:.3f}" for l in known)
              + "; held less known, points: " + ", ".join(f"{k} {100 * (means[k] - l['change']):+.2f}" for k in KIND for l in known if kind(l) == k))
    print("\n| text | setting | read | change | KL | left out, estimate | left out |\n|---|---|---|---|---|---|---|")
    for n in ("0.1", "0.02", "0.02-kl-0.001"):
        for l in L[f"held-out/{n}-held"]:
            r = l["read"]
            if n == "0.02-kl-0.001" and not by_layer(l): continue
            print(f"| {l['text']} | {n}{', by layer' * by_layer(l)} | {r['bytes']:.3f} | {change(l)} | {l['divergence']:.4f} | {r['left_out_estimate']:.4f} | {r['left_out']:.4f} |")

    print("\n## Smaller sketches\n\n| model | `eps` | bits | bytes read | KL, nats a token | left out |\n|---|---|---|---|---|---|")
    ratios = {}
    for label, m in (("Qwen2.5-Coder-0.5B, 16k", "qwen"), ("SmolLM2-135M, 8k", "smol")):
        for e in (0.02, 0.1):
            got = {}
            for bits in (12, 8):
                ls = [next(l for l in L[f"sketch-bits/{m}-{bits}"] if kind(l) == k and l["setting"]["eps"] == e) for k in KIND]
                assert D[f"sketch-bits/{m}-{bits}"].get("sketch_bits", 12) == bits
                got[bits] = ls
                first = label if (e, bits) == (0.02, 12) else ""
                print(f"| {first} | {e if bits == 12 else ''} | {bits} | " + ", ".join(f"{l['read']['bytes']:.3f}" for l in ls) + " | "
                      + ", ".join(f"{l['divergence']:.4f}" for l in ls) + " | " + ", ".join(f"{l['read']['left_out']:.3f}" for l in ls) + " |")
            ratios[m, e] = [(x["read"]["left_out"] / y["read"]["left_out"], x["divergence"] / y["divergence"], x["read"]["bytes"] - y["read"]["bytes"]) for x, y in zip(got[8], got[12])]
    for k, v in ratios.items():
        print(k, "8 bits over 12, code docs essays: left out, KL, read less:", ["%.2f %.2f %+.3f" % x for x in v])
    print("changes:", {n: [change(l) for l in L[n]] for n in L if n.startswith("sketch-bits")})

    print("\n## Retrieval (found by dense / 0.02 / 0.1 of cases) and generation: from the md")
    for name in ("retrieval", "generation"):
        md = (Q / f"{name}.md").read_text()
        table = [x for x in md.splitlines() if re.match(r"\| (passkey|multi-needle|eps [\d.]+ \| \d+ of)", x)]
        if name == "retrieval":
            cells = [[c.strip() for c in x.strip("|").split("|")] for x in table]
            for needle in ("passkey", "multi-needle"):
                for context in dict.fromkeys(c[1] for c in cells):
                    print(f"{needle} {context}: " + " / ".join(f"{c[2]} {c[3]}, lost {c[4]}" for c in cells if c[:2] == [needle, context]))
        else:
            print("\n".join(table))
    found = D["smol"]["retrieval"]
    print("SmolLM2 (smol.json):", [f"{r['kind']} {r['context']} eps {r['setting']['eps']}: {r['found']} of {r['cases']}" for r in found]
          or "NO RETRIEVAL: the guide's and README's 36/32/19, 20/16/11 lose their file")


main()

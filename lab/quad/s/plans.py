"""The jobs of the campaign on four GPUs, the most important first."""

import os
import shlex
from pathlib import Path

QUICK_SERVER = """--compilation-config '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}'"""
KV = "--gpu-memory-utilization 0.2 --kv-cache-memory-bytes 4000000000"
PLANTED_CORES = 36


def smallest_gpu(base) -> float:
    """MiB."""
    lines = [line.split(",") for line in (base / "gpus.csv").read_text().splitlines() if line.count(",") >= 2]
    return min((float(line[2]) for line in lines), default=0)


def orelse(command, more):
    """Without torch.compile where it fails with: a number is better than none."""
    return f"{command} || {{ echo FAILED, AGAIN; {command} {more}; }}"


def quad(base, commit, python):
    models = base / "models"
    qwen, smol = models / "Qwen2.5-Coder-0.5B-Instruct", models / "SmolLM2-135M-Instruct"
    warm, has_qwen, has_smol = base / "warm", qwen / "config.json", smol / "config.json"
    requests = 24 if smallest_gpu(base) > 100_000 else 12
    texts = f"{base}/texts/code.txt {base}/texts/docs.txt {base}/texts/essays.txt"
    lists = f"{python} benchmarks/vllm_lists.py --profile --commit {commit} --out $O/lists.json"
    code = f"{python} benchmarks/vllm_code.py {qwen} --profile --commit {commit} --out $O/code.json"
    quality = f"{python} -m lite_attention.quality"
    test = f"{python} benchmarks/gpu_suite.py run vllm --out $O --commit {commit} -vv -s"
    tests = {"LITE_ATTENTION_TEST_MODEL": str(smol)}
    count = os.cpu_count() or 64
    upper = f"{max(0, count - 24)}-{count - 1}"  # what runs beside times keeps to these
    building = f"{max(0, count - PLANTED_CORES - 4)}-{count - 1}"
    plain = {"PYTHONPATH": f"{base}/repo:{base}/build-site", "OMP_NUM_THREADS": "4"}
    libraries, built = base / "planted/libraries", base / "planted/ended"
    fleet = f"{python} benchmarks/gpu_fleet.py $O --commit {commit}"
    within = "--seconds $((LIMIT - 12)) --job-seconds $((LIMIT - 12))"

    timed = []

    def time_it(name, gpus, command, needs, **more):
        timed.append(name)
        return dict(name=name, gpus=gpus, alone=True, command=command, needs=needs, **more)

    def soak(name, gpus, seed, model, context, rate, more="", serve="", **environment):
        # Minutes: 5.1, or what is left but for start and end.
        command = (
            f"cd $O && M=$({python} -c \"print(max(1, min(5.1, ($LEFT - 125) / 60)))\") && echo minutes $M && "
            f"W=$({python} -c \"print($M * 0.45)\") && "  # servers beside it start for longer than a third
            f"{python} {base}/repo/benchmarks/vllm_soak.py --minutes $M --warm $W --seed {seed} --model {model} "
            f"--context {context} --rate {rate} --out soak.json --log server.log --start-timeout 240 {more} "
            f"-- {serve}"
        )
        needs = (warm, has_smol if model == smol else has_qwen)
        return dict(
            name=name, command=command, gpus=gpus, limit=560, expect=400, least=190, needs=needs,
            after=tuple(timed), env=environment,
        )  # fmt: skip

    def measure(name, model, options, **more):
        needs = (warm, has_smol if model == smol else has_qwen)
        command = f"{quality} {model} {texts} --commit {commit} --out $O {options}"
        return dict(name=name, gpus=(0,), command=command, needs=needs, least=60) | more | dict(
            after=("memcheck", *timed, *more.get("after", ()))
        )

    def testing(name, gpus, chosen, after, needs, **more):
        return dict(
            name=name, gpus=gpus, command=f"{test} -k '{chosen}'", env=tests, after=(*after, *timed), needs=(warm, *needs),
            limit=330, least=60, **more,
        )  # fmt: skip

    times = [
        time_it(
            "lists-lite", (0,), orelse(f"{lists} --requests {requests} --backends LITE_ATTENTION", "--quick"), (warm,),
            expect=100, limit=190,
        ),
        time_it(
            "lists-flash", (1,), orelse(f"{lists} --requests {requests} --backends FLASH_ATTN", "--quick"), (warm,),
            expect=100, limit=190,
        ),
        time_it("code-lite", (2,), orelse(f"{code} --only eps=0.1", "--quick"), (warm, has_qwen), expect=85, limit=170),
        time_it("code-flash", (3,), orelse(f"{code} --only FLASH_ATTN", "--quick"), (warm, has_qwen), expect=85, limit=170),
        time_it(
            "tp2-lite", (2, 3), f"{lists} --quick --requests 24 --tensor-parallel 2 --backends LITE_ATTENTION", (warm,),
            expect=60, limit=130,
        ),
        time_it(
            "tp2-flash", (2, 3), f"{lists} --quick --requests 24 --tensor-parallel 2 --backends FLASH_ATTN", (warm,),
            expect=56, limit=130,
        ),
        time_it(
            "code-lite-hnd", (1,), orelse(f"{code} --only eps=0.1", "--quick"), (warm, has_qwen), expect=85, limit=170,
            after=("lists-flash",), env={"VLLM_KV_CACHE_LAYOUT": "HND"},
        ),
    ]  # fmt: skip
    kernels = [
        # Eight shards of the cases at once: a sanitizer's time is the CPU's. Each in gpu_fleet.py's hands.
        dict(
            name="memcheck", gpus=(0,), alone=True, command=f"{fleet} --parts memcheck --gpus 0,0,0,0,0,0,0,0 --lanes 1 {within}",
            expect=110, limit=340, least=100, needs=(base / "kernels",), after=("lists-lite",), cores=upper, env=plain,
        ),
        dict(
            name="errors", gpus=(0,), command=f"{fleet} --parts errors --gpus 0 {within}", expect=30, limit=150, least=40,
            needs=(base / "prepared",), after=("memcheck", *timed),
            env=plain | {"LITE_ATTENTION_FA3": f"{base}/site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"},
        ),
        dict(
            name="racecheck", gpus=(0,), command=f"{fleet} --parts racecheck --gpus 0,0,0,0 --lanes 3 {within}", expect=280,
            limit=500, least=120, needs=(base / "kernels",), after=("memcheck",), cores=upper, env=plain,
        ),
        dict(
            name="synccheck", gpus=(0,), command=f"{fleet} --parts synccheck --gpus 0,0,0,0 --lanes 1 {within}", expect=120,
            limit=400, least=100, needs=(base / "kernels",), after=("memcheck",), cores=upper, env=plain,
        ),
        dict(
            name="planted-build", gpus=(), command=f"nice -n 19 {python} tests/gpu/planted/build.py {libraries}; touch {built}",
            expect=260, limit=500, least=200, needs=(base / "kernels",), after=tuple(timed), cores=building,
            env=plain | {"MAX_JOBS": str(PLANTED_CORES)},
        ),
    ]  # fmt: skip
    llama = testing("test-llama", (1,), "llama_8b", (), (), alone=True, expect=95)
    kernels += [
        dict(
            name="planted-check", gpus=(1,),
            command=f"{python} {base}/s/planted_check.py {libraries} $O {built} $((LIMIT - 12)) 1",
            expect=300, limit=520, least=60, give_up=700, needs=(libraries / "sound.so",), after=("test-llama",), env=plain,
        ),
        dict(
            name="two_gpus", gpus=(0, 1), command=f"{fleet} --parts two_gpus --gpus 0,1 {within}", expect=30, limit=150,
            least=40, needs=(base / "kernels",), after=("test-llama", "memcheck"), env=plain,
        ),
    ]  # fmt: skip
    soaks = [
        # Nothing else on these GPUs: what comes and goes there would be taken for a leak.
        soak("soak-tp2", (2, 3), 4, qwen, 32768, 6, "--in-flight 48", "--tensor-parallel-size 2 " + KV),
        soak("soak-smol", (2,), 1, smol, 8192, 20, "--in-flight 48", KV),
        soak("soak-qwen", (2,), 2, qwen, 32768, 3, "", f"{KV} {QUICK_SERVER}"),
        soak("soak-fp8", (2,), 3, qwen, 32768, 3, "", f"{KV} {QUICK_SERVER} --kv-cache-dtype fp8"),
        soak(
            "soak-v1", (3,), 5, qwen, 16384, 4, "--eps 0.02", f"{KV} {QUICK_SERVER}", VLLM_USE_V2_MODEL_RUNNER="0"
        ),
        soak("soak-eps002", (3,), 6, qwen, 32768, 3, "--eps 0.02 --min-context 4096", f"{KV} {QUICK_SERVER}"),
    ]
    vllm_tests = [
        llama,
        testing("test-fp8", (0,), "fp8_kv_cache", ("memcheck",), (), expect=85),
        testing("test-smollm2", (0,), "test_smollm2", ("memcheck", "test-fp8"), (has_smol,), expect=85),
        testing(
            "test-lists", (0,), "lists_of_all or graphs_decode", ("memcheck", "test-smollm2"), (has_smol,), expect=85
        ),
        testing("test-isolation", (0, 1), "isolation", ("memcheck", "test-llama"), (), expect=130),
    ]
    crowded = requests < 24  # 80 GB: not all of these at once
    qualities = [
        measure("q-retrieval", qwen, "--only retrieval --lengths 32768,16384,8192,4096 --cases 40", limit=460, expect=300),
        measure("q-generation", qwen, "--only generation --context 32768 --prompts 64 --tokens 128", limit=460, expect=250),
        measure(
            "q-loss-16k", qwen, "--only loss --context 16384 --positions 1024", limit=300, expect=90,
            after=("q-generation",) if crowded else (),
        ),
        measure(
            "q-loss-32k", qwen, "--only loss --context 32768 --positions 1024", limit=300, expect=120, after=("q-loss-16k",)
        ),
        measure(
            "q-smol", smol, "--only loss,retrieval --context 8192 --lengths 4096,8192 --cases 40", limit=300, expect=150,
            after=("q-loss-32k",) if crowded else (),
        ),
        measure(
            "q-loss0-16k", qwen, "--only loss --context 16384 --positions 1024 --dense-layers 0", limit=200, expect=90,
            after=("q-loss-32k",),
        ),
        measure(
            "q-loss0-32k", qwen, "--only loss --context 32768 --positions 1024 --dense-layers 0", limit=240, expect=120,
            after=("q-loss0-16k",),
        ),
    ]  # fmt: skip
    return times + kernels[:1] + soaks + [llama] + kernels[1:] + vllm_tests[1:] + qualities


def now(base, commit, python):
    """Timed first and alone; then the suite, planted bugs, racecheck of lists, vLLM's tests, quality by layer, soaks."""
    jobs = {job["name"]: job for job in quad(base, commit, python)}
    fa3 = f"{base}/site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
    plain = {"PYTHONPATH": f"{base}/repo:{base}/build-site", "OMP_NUM_THREADS": "4"}
    count = os.cpu_count() or 64
    timed = ("lists-lite", "lists-flash", "code-lite", "code-flash")
    picked = [jobs[name] for name in timed]
    picked.append(
        dict(
            name="suite", gpus=(0, 1, 2, 3), alone=True, needs=(base / "kernels",), env=plain, expect=60, limit=130, after=timed,
            command=f"{python} benchmarks/gpu_fleet.py $O --commit {commit} --parts kernels --gpus 0,1,2,3 --lanes 1 "
            "--seconds $((LIMIT - 6)) --job-seconds $((LIMIT - 6))",
        )  # fmt: skip
    )
    picked.append(jobs["planted-build"] | dict(after=timed))
    late = ("suite",)
    picked.append(jobs["two_gpus"] | dict(gpus=(0, 1), after=late))
    for name, gpus, after in (
        ("test-llama", (1,), ("two_gpus",)), ("planted-check", (2,), late), ("test-fp8", (3,), late),
        ("test-isolation", (0, 1), ("two_gpus", "test-llama")),
        ("test-smollm2", (3,), ("test-fp8",)), ("test-lists", (3,), ("test-smollm2",)),
    ):  # fmt: skip
        job = jobs[name] | dict(gpus=gpus, after=after)
        if name == "planted-check":  # its command names the GPU
            job["command"] = job["command"].removesuffix(" 1") + " 2"
        picked.append(job)
    smol = base / "models/SmolLM2-135M-Instruct"
    q = f"{python} -m lite_attention.quality {smol}"
    more = f"--commit {commit} --context 8192 --only loss"
    for name, eps, kl in (("q-0.1", "0.1", ""), ("q-0.02", "0.02", ""), ("q-0.02-half", "0.02", "--calibrate-kl 0.001")):
        picked.append(
            dict(
                name=name, gpus=(0,), needs=(base / "prepared", smol / "config.json"), after=late, expect=100, limit=240,
                command=f"{python} {base}/s/heldout.py {base}/texts $O/t; "
                f"{q} $O/t/known/*.txt {more} --positions 1024 --eps {eps} --calibrate $O/own.toml {kl} --out $O/known; "
                f"{q} $O/t/held/*.txt {more} --positions 2048 --eps {eps} --layer-eps $O/own.toml --out $O/held; rm -rf $O/t",
            )  # fmt: skip
        )
    picked.append(
        dict(
            name="racecheck-skip", gpus=(2,), needs=(base / "kernels",), env=plain, expect=120, limit=250, least=60,
            after=late, cores=f"{max(0, count - 26)}-{count - 1}",
            command=f"{python} benchmarks/gpu_fleet.py $O --commit {commit} --parts racecheck "
            "--gpus 2,2 --lanes 5 --seconds $((LIMIT - 8)) --job-seconds $((LIMIT - 8)) -k 'skip and not page'",
        )  # fmt: skip
    )
    return picked


def two(base, commit, python):
    """The same on two GPUs, without what was measured before."""
    jobs = {job["name"]: job for job in now(base, commit, python)}
    count = os.cpu_count() or 32
    timed = ("code-lite", "code-flash")
    picked = [jobs["code-lite"] | dict(gpus=(0,)), jobs["code-flash"] | dict(gpus=(1,))]
    suite = dict(jobs["suite"], gpus=(0, 1), after=timed, limit=220, expect=110)
    suite["command"] = suite["command"].replace("--gpus 0,1,2,3", "--gpus 0,1")
    picked.append(suite)
    late = ("suite",)
    build = dict(jobs["planted-build"], after=late, cores=f"4-{count - 1}", expect=160)
    build["env"] = dict(build["env"], MAX_JOBS=str(count - 4))
    picked.append(build)
    picked.append(jobs["two_gpus"] | dict(gpus=(0, 1), after=late))
    picked.append(jobs["test-isolation"] | dict(gpus=(0, 1), after=("two_gpus",)))
    test = jobs["test-llama"]["command"].split(" -k ")[0]
    models = dict(jobs["test-lists"], name="test-models", gpus=(0,), after=late)
    models["command"] = f"{test} -k '{os.environ.get('MODELS', 'gemma2 or gpt_oss or drafts')}'"
    picked.append(models)
    check = dict(jobs["planted-check"], gpus=(1,), after=late)
    check["command"] = check["command"].removesuffix(" 2") + " 1 6"
    picked.append(check)
    for name in ("q-0.1", "q-0.02", "q-0.02-half"):
        picked.append(jobs[name] | dict(gpus=(0,), after=late))
    picked.append(jobs["test-lists"] | dict(gpus=(1,), after=("test-models",)))
    return picked


def first(base, commit, python):
    """Four GPUs: what is timed first, then the suite, sanitizers, planted bugs, vLLM's tests, generation beside dense."""
    jobs = {job["name"]: job for job in quad(base, commit, python)}
    latest = {job["name"]: job for job in now(base, commit, python)}
    plain = {"PYTHONPATH": f"{base}/repo:{base}/build-site", "OMP_NUM_THREADS": "4"}
    qwen = base / "models/Qwen2.5-Coder-0.5B-Instruct"
    count = os.cpu_count() or 64
    lists, code = ("lists-lite", "lists-flash"), ("code-lite", "code-flash")
    picked = [jobs[name] | dict(after=()) for name in lists]
    picked += [jobs[name] | dict(after=lists, give_up=300) for name in code]
    picked.append(jobs["tp2-lite"] | dict(gpus=(0, 1), after=code))
    picked.append(jobs["tp2-flash"] | dict(gpus=(2, 3), after=code))
    timed = (*lists, *code, "tp2-lite", "tp2-flash")
    upper = f"{max(0, count - 24)}-{count - 1}"
    picked.append(
        jobs["planted-build"]
        | dict(after=timed, cores=f"0-{max(1, count - 25)}", expect=150, env=plain | {"MAX_JOBS": str(max(2, count - 24))})
    )
    picked.append(latest["suite"] | dict(after=timed))
    late = ("suite",)
    picked.append(
        dict(
            name="gen", gpus=(3,), alone=True, needs=(base / "warm", qwen / "config.json"), after=late, expect=260, limit=380,
            command=f"{python} benchmarks/vllm_code.py {qwen} --commit {commit} --out $O/gen.json --requests 64 "
            "--tokens 8192-32768 --steps 248 --only eps=0.1,FLASH_ATTN,eps=0.02,eps=0",
        )  # fmt: skip
    )
    check = jobs["planted-check"] | dict(gpus=(2,), after=late)
    check["command"] = check["command"].removesuffix(" 1") + " 2 9"
    picked.append(check)
    picked.append(jobs["memcheck"] | dict(after=late, alone=False))
    picked.append(jobs["test-llama"] | dict(gpus=(1,), after=late))
    fleet = f"{python} benchmarks/gpu_fleet.py $O --commit {commit}"
    picked.append(jobs["errors"] | dict(gpus=(0,), after=("memcheck",)))
    picked.append(
        dict(
            name="racecheck-skip", gpus=(0,), needs=(base / "kernels",), env=plain, expect=120, limit=330, least=60,
            after=("memcheck",), cores=upper,
            command=f"{fleet} --parts racecheck --gpus 0,0 --lanes 5 --seconds $((LIMIT - 8)) --job-seconds $((LIMIT - 8)) "
            "-k 'skip and not page'",
        )  # fmt: skip
    )
    picked.append(jobs["synccheck"] | dict(gpus=(0,), after=("memcheck",)))
    test = jobs["test-llama"]["command"].split(" -k ")[0]
    models = dict(jobs["test-lists"], name="test-models", gpus=(1,), after=("test-llama",))
    models["command"] = f"{test} -k 'gemma2 or gpt_oss or drafts'"
    picked.append(models)
    loads = dict(jobs["test-lists"], name="test-loads", gpus=(1,), after=("test-llama",))
    loads["command"] = f"{test} -k 'vllm_loads or loads or scratch'"
    picked.append(loads)
    picked.append(jobs["test-fp8"] | dict(gpus=(1,), after=("test-models",)))
    picked.append(jobs["test-smollm2"] | dict(gpus=(0,), after=("memcheck",)))
    picked.append(jobs["test-lists"] | dict(gpus=(1,), after=("test-loads",)))
    picked.append(jobs["test-isolation"] | dict(gpus=(1, 3), after=("test-lists", "gen")))
    return picked


def second(base, commit, python):
    """Four GPUs: the suite, soaks, what is left of vLLM's tests."""
    jobs = {job["name"]: job for job in now(base, commit, python)}
    more = {job["name"]: job for job in quad(base, commit, python)}
    picked = [dict(jobs["suite"], after=())]
    for name in ("soak-tp2", "soak-smol", "soak-qwen", "soak-fp8", "soak-v1", "soak-eps002"):
        picked.append(more[name] | dict(after=("suite",)))
    for name, gpus in (("test-fp8", (0,)), ("test-smollm2", (1,)), ("test-lists", (0,)), ("test-isolation", (0, 1))):
        picked.append(more[name] | dict(gpus=gpus, after=("suite",)))
    return picked


def solo(base, commit, python):
    """One GPU: the decode table, what 8 bits cost, bugs left, then servers under mixed load."""
    more = {job["name"]: job for job in quad(base, commit, python)}
    qwen, smol = base / "models/Qwen2.5-Coder-0.5B-Instruct", base / "models/SmolLM2-135M-Instruct"
    fa3 = f"{base}/site/vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
    plain = {"PYTHONPATH": f"{base}/repo:{base}/build-site", "OMP_NUM_THREADS": "4"}
    rows = " ".join(f"--only '{each}'" for each in ("decode-*", "pages-*", "fp8-*", "mixed-*", "varlen-*", "prefill-*"))
    further = " ".join(f"--only '{each}'" for each in ("pages-context-*", "pages-8bits-*", "pages-step-*"))
    bench = f"{python} -m lite_attention.bench --peers fa3 --fa3 {fa3} --repetitions 20 --commit {commit}"
    picked = [
        dict(
            name="bench", gpus=(0,), alone=True, needs=(base / "prepared",), env=plain, expect=70, limit=150,
            command=f"{bench} --out $O/decode {rows} > $O/decode.log 2>&1; {bench} --out $O/further {further} > $O/further.log 2>&1; "
            "grep -ahE '^[a-z0-9-]*: ([0-9]|failed)|wrong' $O/*.log | cut -c1-150",
        )  # fmt: skip
    ]
    for name in ("sound skip", "first-tile-dropped", "pages-of-other-blocks-not-waited-for"):
        first = name.split()[0]
        picked.append(
            dict(
                name=f"planted-{first}", gpus=(0,), needs=(base / "kernels",), env=plain, after=("bench",), expect=40, limit=120,
                command=f"mkdir -p $O/l && xz -dc {base}/s/planted/{first}.so.xz > $O/l/{first}.so && "
                f"{python} tests/gpu/planted/check.py $O/l $O/planted.json {name}; rm -rf $O/l",
            )  # fmt: skip
        )
    late = ["bench", "planted-sound", "planted-first-tile-dropped", "planted-pages-of-other-blocks-not-waited-for"]
    texts = f"{base}/texts/code.txt {base}/texts/docs.txt {base}/texts/essays.txt"
    for label, model, context in (("smol", smol, 8192), ("qwen", qwen, 16384)):
        for bits in (12, 8):
            picked.append(
                dict(
                    name=f"q-{label}-{bits}", gpus=(0,), needs=(base / "prepared", model / "config.json"), after=("bench",),
                    expect=90, limit=200,
                    command=f"{python} -m lite_attention.quality {model} {texts} --commit {commit} --only loss --positions 1024 "
                    f"--context {context} --eps 0.02,0.1 --sketch-bits {bits} --out $O",
                )  # fmt: skip
            )
            late.append(f"q-{label}-{bits}")
    for name, change in (
        ("soak-smol", lambda c: c), ("soak-qwen", lambda c: c.replace("--rate 3", "--rate 8")),
        ("soak-fp8", lambda c: c.replace("--rate 3", "--rate 3 --no-preemptions")), ("soak-v1", lambda c: c),
    ):  # fmt: skip
        job = more[name] | dict(gpus=(0,), after=tuple(late))
        job["command"] = change(job["command"])
        if name == "soak-v1":
            job["env"] = job["env"] | {"LITE_ATTENTION_SKETCH_BITS": "8"}
        picked.append(job)
    return picked


# One GPU of 16 cores.


def _shards(python, commit, part, count, more, tests=""):
    """Runs of a part side by side, each with a file of its own, put together at the end. Names of all tests, as they end."""
    run = f"{python} benchmarks/gpu_suite.py run {part} --commit {commit} --out $O --shard $i/{count} -vv {more}"
    return (
        f"mkdir -p $O/logs; pids=; for i in $(seq {count}); do timeout -k 5 $((LIMIT - 8)) {run} > $O/logs/{part}-$i.log 2>&1 & pids=\"$pids $!\"; done; "
        f"bad=0; for p in $pids; do wait $p || bad=1; done; {python} benchmarks/gpu_suite.py merge $O; "
        f"grep -haE '^(FAILED|ERROR)|(passed|failed|error).* in [0-9]' $O/logs/{part}-*.log | cut -c1-160 | tail -n 12; exit $bad"
    )


def _nice(command, by=10):
    return f"nice -n {by} bash -c {shlex.quote(command)}"


def apart1(base, commit, python):
    """Tests of pages while the models come, then what is timed, each alone: the tables beside FA3, Qwen with lists, Qwen with FLASH_ATTN."""
    jobs = {job["name"]: job for job in quad(base, commit, python)}
    bench = next(job for job in solo(base, commit, python) if job["name"] == "bench")
    plain = {"PYTHONPATH": f"{base}/repo:{base}/build-site", "OMP_NUM_THREADS": "2"}
    picked = [
        dict(
            name="pages", gpus=(0,), alone=True, needs=(base / "kernels",), env=plain, expect=60, limit=150, least=30,
            command=_shards(python, commit, "kernels", 8, "-k 'hopper_pages or hopper_page_decode'"),
        )  # fmt: skip
    ]
    bench = bench | dict(after=("pages",), needs=(base / "prepared", base / "warm"), limit=150, least=40)
    picked.append(bench)
    # The file of Qwen is whole with piece 8; piece 9 is not needed.
    picked.append(jobs["code-lite"] | dict(gpus=(0,), after=("bench",), limit=170, give_up=400, least=60))
    picked.append(jobs["code-flash"] | dict(gpus=(0,), after=("code-lite",), limit=170, give_up=600, least=60))
    return picked


def apart2(base, commit, python):
    """Two servers under mixed load to the end, at nice 0; beside them, at nice 10, the suite, then quality and vLLM's tests."""
    jobs = {job["name"]: job for job in quad(base, commit, python)}
    latest = {job["name"]: job for job in now(base, commit, python)}
    models = base / "models"
    qwen, smol = models / "Qwen2.5-Coder-0.5B-Instruct", models / "SmolLM2-135M-Instruct"
    warm, has_qwen, has_smol = base / "warm", qwen / "config.json", smol / "config.json"
    texts = f"{base}/texts/code.txt {base}/texts/docs.txt {base}/texts/essays.txt"
    plain = {"PYTHONPATH": f"{base}/repo:{base}/build-site", "OMP_NUM_THREADS": "2"}
    few = {"OMP_NUM_THREADS": "2"}
    minutes = os.environ.get("SOAK_MINUTES", "27")
    large = smallest_gpu(base) > 100_000
    count = os.cpu_count() or 16
    beside = f"5-{count - 1}" if count >= 12 else ""  # 0 to 4 are for the servers and their clients alone
    picked = []

    def soak(name, model, has, seed, context, rate, more, serve):
        command = (
            f"cd $O; (while sleep 15; do date +%s; nvidia-smi --query-compute-apps=pid,used_memory,process_name --format=csv,noheader; "
            f"done > apps.txt 2>&1) & apps=$!; "
            f"{python} {base}/s/soak.py 45 --minutes {minutes} --seed {seed} --model {model} --context {context} --rate {rate} "
            f"--out soak.json --log server.log --start-timeout 240 {more} -- {serve}; rc=$?; kill $apps; exit $rc"
        )
        picked.append(
            dict(name=name, gpus=(0,), command=command, needs=(warm, has), env=few, expect=1600, limit=1790, least=200, give_up=500)
        )

    soak("soak-qwen", qwen, has_qwen, 21, 32768, 6, "", f"{KV} {QUICK_SERVER}")
    soak("soak-smol", smol, has_smol, 22, 8192, 12, "--in-flight 48", KV)

    def job(name, command, after=(), needs=(), **more):
        picked.append(
            dict(name=name, gpus=(0,), command=_nice(command), after=after, needs=(warm, *needs)) | dict(env=few, least=60, give_up=700, cores=beside) | more
        )

    # In the first lane; it begins before the servers.
    job("suite", _shards(python, commit, "kernels", 6, ""), env=plain, expect=330, limit=800)
    picked[-1]["needs"] = (base / "kernels",)

    # The second: quality, one after the other.
    quality = f"{python} -m lite_attention.quality"
    lane = ()
    for name, eps in (("q-0.1", "0.1"), ("q-0.02", "0.02"), ("q-0.02-half", "0.02")):
        job(name, latest[name]["command"], after=lane, needs=(has_smol,), expect=150, limit=420)
        lane = (name,)
    for name, model, has, options, expect in (
        ("q-smol", smol, has_smol, "--context 8192", 50),
        ("q-loss-16k", qwen, has_qwen, "--context 16384 --positions 1024", 50),
        ("q-loss-32k", qwen, has_qwen, "--context 32768 --positions 1024", 120),
        ("q-layer-0.1", smol, has_smol, "--context 8192 --positions 1024 --eps 0.1 --calibrate $O/own.toml", 110),
        ("q-layer-0.02", smol, has_smol, "--context 8192 --positions 1024 --eps 0.02 --calibrate $O/own.toml", 110),
        ("q-smol-8", smol, has_smol, "--context 8192 --positions 1024 --sketch-bits 8", 50),
        ("q-qwen-8", qwen, has_qwen, "--context 16384 --positions 1024 --sketch-bits 8", 50),
        ("q-smol-12", smol, has_smol, "--context 8192 --positions 1024 --sketch-bits 12", 50),
    ):
        command = f"{quality} {model} {texts} --commit {commit} --only loss {'' if '--eps' in options else '--eps 0.02,0.1'} {options} --out $O"
        job(name, command, after=lane, needs=(has,), expect=expect, limit=420, least=50)
        lane = (name,)

    # The third and the fourth, when the suite has left its cores.
    job("q-retrieval", jobs["q-retrieval"]["command"] + " --eps 0,0.02,0.1", after=("suite",), needs=(has_qwen,), expect=450, limit=1000, least=150)
    job(
        "q-generation", jobs["q-generation"]["command"], after=("suite",) if large else ("suite", "q-retrieval"), needs=(has_qwen,),
        expect=400, limit=900, least=150,
    )  # fmt: skip

    # The first goes on with vLLM's tests, one after the other: each starts several engines at once.
    test = jobs["test-llama"]["command"].split(" -k ")[0]
    lane = ("suite",)
    for name, chosen, needs, expect in (
        ("test-lists", "lists_of_all or graphs_decode", (has_smol,), 90),
        ("test-isolation", "isolation", (), 140),
        ("test-models", "gemma2 or gpt_oss or drafts", (), 220),
        ("test-loads", "vllm_loads", (), 180),
        ("test-fp8", "fp8_kv_cache", (), 90),
        ("test-smollm2", "test_smollm2", (has_smol,), 130),
    ):
        environment = few | {"LITE_ATTENTION_TEST_MODEL": str(smol)}
        job(name, f"{test} -k '{chosen}'", after=lane, needs=needs, env=environment, expect=expect, limit=420, least=90)
        lane = (name,)
    job(
        "memcheck", f"{python} benchmarks/gpu_fleet.py $O --commit {commit} --parts memcheck --gpus 0,0,0,0 --lanes 1 "
        "--seconds $((LIMIT - 10)) --job-seconds $((LIMIT - 10)) -k 'page_lists or shared_plan'",
        after=lane, env=plain, expect=60, limit=300, least=70,
    )  # fmt: skip
    return picked


def apart3(base, commit, python):
    """Each alone: the tables beside FA3, four engines of Qwen, vLLM's Llama, lists and FLASH_ATTN; then planted bugs of pages, six at once."""
    jobs = {job["name"]: job for job in quad(base, commit, python)}
    bench = next(job for job in apart1(base, commit, python) if job["name"] == "bench")
    gen = next(job for job in first(base, commit, python) if job["name"] == "gen")
    plain = {"PYTHONPATH": f"{base}/repo:{base}/build-site", "OMP_NUM_THREADS": "2"}
    picked = [bench | dict(after=(), expect=50)]
    # Where Qwen is late (piece 8), Llama is first, which is not timed. vLLM takes no more than Qwen's 32768 positions, prompts
    # and the 512 tokens of outputs together.
    gen = gen | dict(gpus=(0,), after=("bench",), limit=420, give_up=400, least=90)
    gen["command"] = gen["command"].replace("8192-32768", "8192-32256")
    picked.append(gen)
    picked.append(jobs["test-llama"] | dict(gpus=(0,), after=("bench",), limit=240))
    picked.append(jobs["lists-lite"] | dict(gpus=(0,), after=("gen", "test-llama"), expect=80, least=60))
    picked.append(jobs["lists-flash"] | dict(gpus=(0,), after=("gen", "test-llama", "lists-lite"), expect=80, least=60))
    libraries = base / "planted/libraries"
    picked.append(
        dict(
            name="planted-check", gpus=(0,), alone=True, needs=(base / "kernels", base / "pl/whole"), env=plain, expect=150, limit=360,
            least=60, give_up=600, after=tuple(job["name"] for job in picked),
            command=f"rm -rf {libraries}; mkdir -p {libraries}; for f in {base}/pl/*.so.xz; do n=$(basename $f .xz); "
            f"xz -dc $f > {libraries}/$n.part && mv {libraries}/$n.part {libraries}/$n; done; ls {libraries} | wc -l; "
            f"{python} {base}/s/planted_check.py {libraries} $O {base}/pl/whole $((LIMIT - 12)) 0 6; rm -rf {libraries}",
        )  # fmt: skip
    )
    return picked


def apart4(base, commit, python):
    """The suite and quality at once, then what is timed, each alone, then planted bugs."""
    jobs = {job["name"]: job for job in apart2(base, commit, python)}
    timed = {job["name"]: job for job in apart3(base, commit, python)}
    code = {job["name"]: job for job in apart1(base, commit, python)}
    picked = [jobs["suite"] | dict(cores="")]
    lanes = (
        ("q-0.1", "q-0.02-half", "q-layer-0.02", "q-smol-8"),
        ("q-0.02", "q-layer-0.1", "q-smol", "q-smol-12"),
        ("q-loss-16k", "q-loss-32k", "q-qwen-8", "test-lists"),
        ("q-retrieval",),
        ("q-generation",),
    )
    for lane in lanes:
        before = ()
        for name in lane:
            picked.append(jobs[name] | dict(after=before, cores=""))
            before = (name,)
    late = tuple(lane[-1] for lane in lanes) + ("suite",)
    for name, job in (
        ("bench", timed["bench"]), ("code-lite", code["code-lite"]), ("code-flash", code["code-flash"]), ("gen", timed["gen"]),
        ("planted-check", timed["planted-check"]),
    ):  # fmt: skip
        picked.append(job | dict(after=late, give_up=2000))
        late = (name,)
    return picked

"""The jobs of the dry run (one GPU) and of the campaign (eight)."""

QUICK_SERVER = """--compilation-config '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}'"""
KV = "--gpu-memory-utilization 0.2 --kv-cache-memory-bytes 4000000000"


def when(model):
    """Waits for a model that is still being converted."""
    return f"until [ -e {model}/config.json ]; do sleep 0.3; done; "


def orelse(command, more, before=""):
    """Without torch.compile where it fails with: a number is better than none."""
    return f"{before}{command} || {{ echo FAILED, AGAIN; {command} {more}; }}"


def dry(base, commit, python):
    smol, texts = base / "models/smol-dummy", base / "texts"
    soak = f"cd $O && {python} {base}/repo/benchmarks/vllm_soak.py --out soak.json --log server.log --model {smol}"
    both = f"--profile --commit {commit}"
    return [
        dict(
            name="lists",
            command=f"{python} benchmarks/vllm_lists.py --requests 2 --context 8192 --quick --gpu-memory 0.45 {both} "
            "--steps 16 --out $O/lists.json && {python} benchmarks/vllm_profile.py $O/lists.json > $O/table.md".replace(
                "{python}", python
            ),
            limit=110,
        ),
        dict(
            name="code",
            command=f"{python} benchmarks/vllm_code.py {smol} --requests 4 --tokens 6000 --gpu-memory 0.15 --steps 16 "
            f"--only eps=0.1,FLASH_ATTN {both} --out $O/code.json && {python} benchmarks/vllm_profile.py $O/code.json "
            "> $O/table.md",
            limit=115,
        ),
        dict(
            name="soak",
            command=f"{soak} --minutes 0.5 --context 8192 --rate 20 --in-flight 48 --seed 1 -- {KV} {QUICK_SERVER}; "
            "echo $?",
            limit=110,
        ),
        dict(
            name="quality",
            command=f"{python} -m lite_attention.quality {smol} {texts}/code.txt {texts}/essays.txt --context 4096 "
            f"--positions 64 --lengths 4096 --cases 4 --prompts 4 --tokens 16 --commit {commit} --out $O",
            limit=80,
        ),
        dict(
            name="test-fp8",
            command=f"{python} benchmarks/gpu_suite.py run vllm --out $O --commit {commit} -vv -s -k fp8",
            limit=110,
        ),
    ]


def big(base, commit, python):
    qwen, smol = base / "models/Qwen2.5-Coder-0.5B-Instruct", base / "models/SmolLM2-135M-Instruct"
    texts = f"{base}/texts/code.txt {base}/texts/docs.txt {base}/texts/essays.txt"
    lists = f"{python} benchmarks/vllm_lists.py --profile --commit {commit} --out $O/lists.json"
    code = f"{python} benchmarks/vllm_code.py {qwen} --profile --commit {commit} --out $O/code.json"
    quality = f"{python} -m lite_attention.quality"
    test = f"{python} benchmarks/gpu_suite.py run vllm --out $O --commit {commit} -vv -s"
    tests = {"LITE_ATTENTION_TEST_MODEL": str(smol)}

    def soak(name, gpus, seed, model, context, rate, more="", serve="", **environment):
        command = when(model) + (
            f"cd $O && {python} {base}/repo/benchmarks/vllm_soak.py --minutes 5.1 --seed {seed} --model {model} "
            f"--context {context} --rate {rate} --out soak.json --log server.log --start-timeout 140 {more} "
            f"-- {serve}"
        )
        return dict(name=name, command=command, gpus=gpus, limit=460, env=environment)

    def measure(name, model, options, **more):
        return dict(
            name=name, gpus=(4,), command=f"{when(model)}{quality} {model} {texts} --commit {commit} --out $O {options}", **more
        )

    return [
        # Times, each engine on GPUs of its own.
        dict(
            name="lists-lite",
            gpus=(0,),
            command=orelse(f"{lists} --requests 12 --backends LITE_ATTENTION", "--quick"),
            limit=170,
        ),
        dict(
            name="lists-flash",
            gpus=(1,),
            command=orelse(f"{lists} --requests 12 --backends FLASH_ATTN", "--quick"),
            limit=170,
        ),
        dict(name="code-lite", gpus=(2,), command=orelse(f"{code} --only eps=0.1", "--quick", when(qwen)), limit=170),
        dict(name="code-flash", gpus=(3,), command=orelse(f"{code} --only FLASH_ATTN", "--quick", when(qwen)), limit=170),
        dict(
            name="tp2-lite",
            gpus=(0, 1),
            command=f"{lists} --quick --requests 24 --tensor-parallel 2 --backends LITE_ATTENTION",
            limit=150,
            after=("lists-lite", "lists-flash"),
        ),
        dict(
            name="tp2-flash",
            gpus=(2, 3),
            command=f"{lists} --quick --requests 24 --tensor-parallel 2 --backends FLASH_ATTN",
            limit=150,
            after=("code-lite", "code-flash"),
        ),
        dict(
            name="code-lite-002",
            gpus=(3,),
            command=orelse(f"{code} --only eps=0.02", "--quick"),
            limit=160,
            after=("tp2-flash",),
        ),
        # Minutes of load: three servers on one GPU, three on a pair.
        soak("soak-tp2", (5, 6), 4, qwen, 32768, 6, "--in-flight 48", "--tensor-parallel-size 2 " + KV),
        soak("soak-smol", (5,), 1, smol, 8192, 20, "--in-flight 48", KV),
        soak("soak-qwen", (5,), 2, qwen, 32768, 3, "", f"{KV} {QUICK_SERVER}"),
        soak("soak-fp8", (5,), 3, qwen, 32768, 3, "", f"{KV} {QUICK_SERVER} --kv-cache-dtype fp8"),
        soak(
            "soak-v1",
            (6,),
            5,
            qwen,
            16384,
            4,
            "--eps 0.02",
            f"{KV} {QUICK_SERVER}",
            VLLM_USE_V2_MODEL_RUNNER="0",
        ),
        soak("soak-eps002", (6,), 6, qwen, 32768, 3, "--eps 0.02 --min-context 4096", f"{KV} {QUICK_SERVER}"),
        # Quality, all on one GPU.
        measure("q-retrieval", qwen, "--only retrieval --lengths 32768,16384,8192,4096 --cases 40", limit=420),
        measure("q-generation", qwen, "--only generation --context 32768 --prompts 64 --tokens 128", limit=420),
        measure("q-loss0-16k", qwen, "--only loss --context 16384 --positions 1024 --dense-layers 0", limit=200),
        measure(
            "q-loss0-32k",
            qwen,
            "--only loss --context 32768 --positions 1024 --dense-layers 0",
            limit=240,
            after=("q-loss0-16k",),
        ),
        measure("q-smol", smol, "--only loss,retrieval --context 8192 --lengths 4096,8192 --cases 40", limit=300),
        measure(
            "q-loss-16k", qwen, "--only loss --context 16384 --positions 1024", limit=200, after=("q-loss0-32k",)
        ),
        measure(
            "q-loss-32k", qwen, "--only loss --context 32768 --positions 1024", limit=200, after=("q-loss-16k",)
        ),
        measure(
            "q-gen-dense0",
            qwen,
            "--only generation --context 32768 --prompts 64 --tokens 128 --dense-layers 0",
            limit=300,
            after=("q-generation", "q-retrieval"),
        ),
        # Tests, which are not timed and share GPUs.
        dict(name="test-isolation", gpus=(0, 1), command=f"{test} -k isolation", limit=330, after=("tp2-lite",), env=tests),
        dict(name="test-smollm2", gpus=(2,), command=f"{test} -k test_smollm2", limit=250, after=("tp2-flash",), env=tests),
        dict(
            name="test-lists",
            gpus=(2,),
            command=f"{test} -k 'lists_of_all or graphs_decode'",
            limit=250,
            after=("tp2-flash",),
            env=tests,
        ),
        dict(
            name="test-fp8",
            gpus=(2,),
            command=f"{test} -k 'fp8_kv_cache'",
            limit=250,
            after=("tp2-flash",),
            env=tests,
        ),
        dict(
            name="test-llama",
            gpus=(3,),
            command=f"{test} -k llama_8b",
            limit=250,
            after=("code-lite-002",),
            env=tests,
        ),
    ]


def four(base, commit, python):
    """Times alone, on four GPUs."""
    jobs = {job["name"]: job for job in big(base, commit, python)}
    for name, gpus in (("tp2-lite", (0, 1)), ("tp2-flash", (2, 3))):
        jobs[name] |= dict(gpus=gpus, limit=140)
    return [jobs[name] for name in ("lists-lite", "lists-flash", "code-lite", "code-flash", "tp2-lite", "tp2-flash")]


def stub(base, commit, python):
    jobs = big(base, commit, python)
    jobs.append(dict(name="hangs", command="sleep 9999", limit=100))
    return jobs

"""Choosing LITE_ATTENTION, and not choosing it: every way, every precedence, every kind of process."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest
from forks import run_in_fork
from processes import environment, run

CLASS = "vllm_plugin.backend.LiteAttentionBackend"
VARIABLE = {"VLLM_ATTENTION_BACKEND": "LITE_ATTENTION"}
OURS = "LITE_ATTENTION"


@pytest.fixture(scope="module")
def probe(model):
    """The backend, or error, and the log of each named case. vLLM is imported once for all of them."""
    base = {"model": model, "enforce_eager": True}
    argv = ["--model", model, "--enforce-eager"]
    cases = {
        "flag": {"argv": [*argv, "--attention-backend", OURS]},
        "flag in lower case": {"argv": [*argv, "--attention-backend", OURS.lower()]},
        "flag of the config": {"argv": [*argv, "--attention-config.backend", OURS]},
        "JSON of the config": {"argv": [*argv, "--attention-config", f'{{"backend": "{OURS}"}}']},
        "attention_backend": {"kwargs": base | {"attention_backend": OURS}},
        "attention_config": {"kwargs": base | {"attention_config": {"backend": OURS}}},
        "AttentionConfig": {"kwargs": base | {"AttentionConfig": {"backend": OURS}}},
        "variable": {"kwargs": base, "environment": VARIABLE},
        "variable, flag of another": {"argv": [*argv, "--attention-backend", "CPU_ATTN"], "environment": VARIABLE},
        "variable, config of another": {
            "kwargs": base | {"attention_config": {"backend": "CPU_ATTN"}},
            "environment": VARIABLE,
        },
        "variable, flag auto": {"argv": [*argv, "--attention-backend", "auto"], "environment": VARIABLE},
        "variable, flag": {"argv": [*argv, "--attention-backend", OURS], "environment": VARIABLE},
        "variable misspelt": {"kwargs": base, "environment": {"VLLM_ATTENTION_BACKEND": "LITE-ATTENTION"}},
        "variable of another": {"kwargs": base, "environment": {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}},
        "unknown": {"argv": [*argv, "--attention-backend", "LIGHT_ATTENTION"]},
        "nothing": {"kwargs": base},
    }
    results = run_in_fork("probe_selection.py", list(cases.values()))["results"]
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize(
    ("way", "source"),
    [
        ("flag", "--attention-backend"),
        ("flag in lower case", "--attention-backend"),
        ("flag of the config", "--attention-config"),
        ("JSON of the config", "--attention-config"),
        ("attention_backend", "attention_backend"),
        ("attention_config", "attention_config"),
        ("AttentionConfig", "attention_config"),
        ("variable", "VLLM_ATTENTION_BACKEND"),
        ("variable, flag", "--attention-backend"),
    ],
)
def test_every_way_chooses_and_the_log_says_which(probe, way, source):
    result = probe[way]
    assert result.get("backend") == OURS, result
    assert result["unchanged"]
    (line,) = [line for line in result["log"] if "Attention backend" in line]
    assert line.startswith(f"INFO Attention backend {OURS}, chosen by")
    assert source in line


@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("variable, flag of another", "CPU_ATTN"),
        ("variable, config of another", "CPU_ATTN"),
        ("variable, flag auto", None),
    ],
)
def test_what_is_given_explicitly_wins_over_the_variable(probe, way, backend):
    result = probe[way]
    assert result["backend"] == backend
    (line,) = [line for line in result["log"] if "Attention backend" in line]
    assert line.startswith("WARNING")
    assert "VLLM_ATTENTION_BACKEND=LITE_ATTENTION is ignored" in line


def test_an_unknown_name_is_an_error_that_lists_the_known(probe):
    assert "LIGHT_ATTENTION" in probe["unknown"]["error"]
    assert OURS in probe["unknown"]["error"]


def test_a_misspelt_variable_is_an_error(probe):
    assert probe["variable misspelt"]["error"].endswith("Did you mean LITE_ATTENTION?")


def test_a_variable_that_names_another_backend_is_left_to_vllm(probe):
    result = probe["variable of another"]
    assert result["backend"] is None
    assert any("Unknown vLLM environment variable" in line for line in result["log"])


def test_the_variable_is_known_to_vllm_where_it_chooses(model):
    (result,) = run("probe_selection.py", [{"kwargs": {"model": model}, "environment": VARIABLE}], **VARIABLE)[
        "results"
    ]
    assert result["backend"] == OURS
    assert not any("Unknown vLLM environment variable" in line for line in result["log"])


def test_installed_but_not_chosen_changes_nothing(model, probe, tmp_path):
    """The same start with and without the plugin: one name more, and only the plugin's own small modules imported."""
    assert probe["nothing"]["backend"] is None
    assert not any("LITE" in line for line in probe["nothing"]["log"])
    cases = [{"kwargs": {"model": model, "enforce_eager": True}}]
    groups = ("vllm.platform_plugins", "vllm.general_plugins")
    names = {plugin.name for group in groups for plugin in importlib.metadata.entry_points(group=group)}
    others = {"VLLM_PLUGINS": ",".join(names - {"lite_attention"})}
    # What vLLM imports depends on what it finds in its cache: each run starts with none.
    without = run("probe_selection.py", cases, VLLM_CACHE_ROOT=str(tmp_path / "without"), **others)
    with_plugin = run("probe_selection.py", cases, VLLM_CACHE_ROOT=str(tmp_path / "with"))
    assert with_plugin["platform"] == without["platform"]
    assert with_plugin["results"] == without["results"]
    assert set(with_plugin["backends"]) - set(without["backends"]) == {OURS}
    assert set(with_plugin["modules"]) - set(without["modules"]) == {
        "vllm_plugin",
        "vllm_plugin.cpu_platform",
        "vllm_plugin.register",
        "vllm_plugin.selection",
    }


def test_children_of_every_kind_know_the_choice(model):
    """`no plugins` is a child that was spawned and unpickles the choice before any plugin had a chance to run."""
    found = run("probe_processes.py", {"model": model})
    assert found == {"fork": CLASS, "spawn": CLASS, "no plugins": f"{OURS} {CLASS}"}


def test_the_server_refuses_an_unknown_name_at_start(model):
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    process = subprocess.run(
        [*command, "--attention-backend", "NO_SUCH_ATTENTION"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert process.returncode != 0
    assert "Unknown attention backend: 'NO_SUCH_ATTENTION'" in process.stdout + process.stderr
    assert OURS in process.stdout + process.stderr

"""The published models have the published sizes; the scripts start what they say, or a dry run of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ds.config import ModelConfig, RunConfig, load_toml, parse, validate
from megatron_ds.models.families import class_of
from megatron_ds.models.transformer import StageSettings

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.toml"))
SCRIPTS = sorted(EXAMPLES.glob("pretrain_*.sh"))
SLURM = EXAMPLES / "slurm_pretrain_llama3_8b.sbatch"
SHELL = [*sorted(EXAMPLES.glob("*.sh")), SLURM, ROOT / ".ci" / "run"]

# (published parameters, rows of the embedding they count). The unrounded numbers are those of the released weights
# (GPT-2, Llama 3, BLOOM, Sheared-LLaMA, BERT); GPT-3's paper gives 174,600 million in its table D.1.
PUBLISHED = {
    "gpt2-124m": (124_439_808, 50257),
    "gpt2-345m": (354_823_168, 50257),
    "gpt3-175b": (174_604_259_328, 50257),
    "llama-1.3b": (1_345_423_360, 32000),
    "llama3-8b": (8_030_261_248, 128256),
    "bloom-176b": (176_247_271_424, 250880),
    "bert-base": (109_514_298, 30522),
}


def counted(m: ModelConfig, vocabulary: int) -> int:
    """Parameters in closed form, term by term, from the papers' description of the architecture."""
    h, ffn, heads, groups, head = m.hidden_size, m.ffn_size, m.num_heads, m.num_kv_heads, m.head_size
    norm = 2 * h if m.norm == "layernorm" else h
    attention = h * head * (heads + 2 * groups) + heads * head * h
    mlp = (3 if m.activation == "swiglu" else 2) * h * ffn
    biases = (head * (heads + 2 * groups) + h + ffn + h) if m.bias else 0
    total = m.num_layers * (attention + mlp + biases + 2 * norm) + norm
    total += vocabulary * h * (1 if m.tied_embeddings else 2)
    total += m.max_positions * h if m.position == "learned" else 0
    total += h * h + h + vocabulary if m.family == "bert" else 0  # the head's own layer and biases
    return total + m.token_types * h + (2 * h if m.embedding_norm else 0)


def test_every_configuration_has_a_published_size_or_is_the_demo() -> None:
    assert {path.stem for path in CONFIGS} == {*PUBLISHED, "demo"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_the_published_number_of_parameters(name: str) -> None:
    published, vocabulary = PUBLISHED[name]
    model = load_toml(EXAMPLES / "configs" / f"{name}.toml").model
    assert counted(model, vocabulary) == published
    assert f"{published:,}" in (EXAMPLES / "configs" / f"{name}.toml").read_text(), "the file's first line says it"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_built_model_has_the_counted_parameters(path: Path) -> None:
    model = load_toml(path).model
    built = class_of(model)(model, StageSettings(device="meta"))
    assert sum(parameter.numel() for parameter in built.parameters()) == counted(model, model.padded_vocab)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_is_legal_from_one_replica_to_many(path: Path) -> None:
    config = parse(["--config", str(path), "--data.synthetic"])
    replica = config.mesh.tp * config.mesh.pp
    for dp in (1, 2):
        assert validate(config, replica * dp).dp == dp


def test_the_demo_fits_its_eight_ranks() -> None:
    config = parse(["--config", str(EXAMPLES / "configs" / "demo.toml"), "--data.synthetic"])
    shape = validate(config, 8)
    assert (shape.tp, shape.pp, shape.dp) == (2, 2, 2)
    assert config.mesh.sequence_parallel and config.zero.stage == 1


def tokens(config: RunConfig, steps: int) -> float:
    """Billions of tokens in that many steps."""
    return steps * config.train.global_batch * config.train.sequence_length / 1e9


def test_token_budgets_are_the_papers() -> None:
    gpt3 = load_toml(EXAMPLES / "configs" / "gpt3-175b.toml")
    assert tokens(gpt3, gpt3.train.steps) == pytest.approx(300, rel=1e-4)
    assert gpt3.optimizer.decay_steps and tokens(gpt3, gpt3.optimizer.decay_steps) == pytest.approx(260, rel=1e-4)
    assert tokens(gpt3, gpt3.optimizer.warmup_steps) == pytest.approx(0.375, rel=0.01)
    bloom = load_toml(EXAMPLES / "configs" / "bloom-176b.toml")
    assert tokens(bloom, bloom.train.steps) == pytest.approx(366, rel=1e-4)
    assert bloom.optimizer.decay_steps and tokens(bloom, bloom.optimizer.decay_steps) == pytest.approx(410, rel=1e-4)


# --- scripts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(tmp_path: Path) -> dict[str, str]:
    """An environment in which PYTHON prints its arguments, one a line, and no GPU is found."""
    python = tmp_path / "echo-python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    no_gpu = tmp_path / "nvidia-smi"
    no_gpu.write_text("#!/bin/sh\nexit 9\n")
    no_gpu.chmod(0o755)
    ours = ("GPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("SLURM")}
    return {**clean, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run(script: Path, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True, env=env, cwd="/")


def config_of(script: Path) -> str:
    name = re.search(r"^CONFIG=(\S+)$", script.read_text(), re.MULTILINE)
    assert name is not None
    return str(EXAMPLES / "configs" / name.group(1))


def entry_of(script: Path) -> str:
    name = re.search(r"^ENTRY=(\S+)$", script.read_text(), re.MULTILINE)
    return str(EXAMPLES / ("pretrain_gpt.py" if name is None else name.group(1)))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_starts_torchrun_on_this_node(script: Path, echo: dict[str, str]) -> None:
    done = run(script, "--data.prefix", "a path/corpus", "--mesh.tp", "4", env=echo)
    assert done.stdout.splitlines() == [
        *["-m", "megatron_ds.train.torchrun"],
        *["--nnodes", "1", "--node-rank", "0", "--nproc-per-node", "1"],
        *["--master-addr", "localhost", "--master-port", "29500"],
        *[entry_of(script), "--config", config_of(script)],
        *["--data.prefix", "a path/corpus", "--mesh.tp", "4"],
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_takes_its_place_among_nodes(script: Path, echo: dict[str, str]) -> None:
    place = {"NNODES": "16", "NODE_RANK": "3", "GPUS_PER_NODE": "8", "MASTER_ADDR": "node-0", "MASTER_PORT": "1234"}
    started = " ".join(run(script, env={**echo, **place}).stdout.splitlines())
    assert "--nnodes 16 --node-rank 3 --nproc-per-node 8 --master-addr node-0 --master-port 1234" in started


def test_a_script_counts_the_gpus(echo: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ "$1" = --list-gpus ] && printf "GPU 0: H\\nGPU 1: H\\n"\n')
    started = " ".join(run(SCRIPTS[0], env=echo).stdout.splitlines())
    assert "--nproc-per-node 2" in started


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR"])
def test_several_nodes_have_no_defaults(echo: dict[str, str], missing: str) -> None:
    """Two nodes of rank 0, or one that looks for the first at its own localhost, would wait for ever."""
    place = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node-0"}
    del place[missing]
    done = run(SCRIPTS[0], env={**echo, **place})
    assert done.returncode == 2 and f"error: NNODES=2 needs {missing} on each node" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra", "world_size", "rank"),
    [
        (["--dry-run"], {}, None, "0"),
        (["--dry-run", "--world-size", "16384", "--rank", "77"], {}, "16384", "77"),
        (["--rank=7", "--world-size=256", "--dry-run"], {}, "256", "7"),
        (["--dry-run"], {"NNODES": "32", "GPUS_PER_NODE": "8"}, "256", "0"),
    ],
)
def test_a_dry_run_starts_one_process(
    arguments: list[str], extra: dict[str, str], world_size: str | None, rank: str, echo: dict[str, str]
) -> None:
    for script in SCRIPTS:
        done = run(script, *arguments, "--train.steps", "3", env={**echo, **extra})
        default = re.search(r"^DRY_RUN_WORLD_SIZE=(\d+)$", script.read_text(), re.MULTILINE)
        assert default is not None
        assert done.stdout.splitlines() == [
            *[entry_of(script), "--config", config_of(script)],
            *["--dry-run", "--world-size", world_size or default.group(1), "--rank", rank, "--train.steps", "3"],
        ]


@pytest.mark.parametrize(
    ("arguments", "python", "message"),
    [
        (["--rank", "3"], None, "error: --world-size and --rank belong to --dry-run"),
        (["--dry-run", "--rank"], None, "error: --rank needs a number"),
        ([], "/nowhere/python", "error: no /nowhere/python; run 'make install'"),
    ],
)
def test_a_script_refuses_what_it_cannot_start(
    arguments: list[str], python: str | None, message: str, echo: dict[str, str]
) -> None:
    done = run(SCRIPTS[0], *arguments, env={**echo, **({"PYTHON": python} if python else {})})
    assert done.returncode == 2 and done.stderr.startswith(message) and not done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, SLURM], ids=lambda path: path.stem)
def test_help_names_every_variable(script: Path, echo: dict[str, str]) -> None:
    done = run(script, "--help", env=echo)
    assert done.returncode == 0
    for name in ("--dry-run", "GPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHON"):
        assert name in done.stdout


@pytest.fixture
def slurm(echo: dict[str, str], tmp_path: Path) -> Callable[[str], tuple[Path, dict[str, str]]]:
    """What SLURM runs, a copy of the script somewhere else, and in which environment; given the text of an srun."""

    def make(srun: str) -> tuple[Path, dict[str, str]]:
        # Of more nodes than a reader of the first takes; each name is a write.
        for name, text in (("srun", srun), ("scontrol", "seq -f node-%g 7 3000 | while read n; do echo $n; done\n")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
            (tmp_path / name).chmod(0o755)
        job = {"SLURM_JOB_NODELIST": "node-[7-10]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "4"}
        job |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "64"}
        return Path(shutil.copy(SLURM, tmp_path / "slurm_script")), {**echo, **job}

    return make


def test_slurm_starts_one_launcher_a_node(slurm: Callable[[str], tuple[Path, dict[str, str]]]) -> None:
    script, env = slurm('SLURM_NODEID=3 exec "$@"\n')
    started = run(script, "--data.prefix", "a b", env=env).stdout.splitlines()
    text = " ".join(started)
    assert "--nnodes 4 --node-rank 3 --nproc-per-node 8 --master-addr node-7 --master-port 23456" in text
    assert started[-3:] == ["--checkpoint.resume", "--data.prefix", "a b"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("SLURM_JOB_NODELIST", "no SLURM job: submit this with sbatch"),
        ("SLURM_SUBMIT_DIR", "call sbatch in the checkout"),
    ],
)
def test_the_slurm_script_at_another_place_says_where_it_belongs(
    missing: str, message: str, slurm: Callable[[str], tuple[Path, dict[str, str]]]
) -> None:
    script, env = slurm('exec "$@"\n')
    del env[missing]
    done = run(script, "--data.prefix", "a", env=env)
    assert done.returncode == 2 and message in done.stderr


def test_a_signal_to_the_slurm_script_itself_reaches_srun(
    slurm: Callable[[str], tuple[Path, dict[str, str]]],
) -> None:
    script, env = slurm("trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done\n")
    with subprocess.Popen(["bash", str(script)], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(20) == 7


def test_slurm_dry_runs_without_slurm(echo: dict[str, str]) -> None:
    started = run(SLURM, "--dry-run", env=echo).stdout.splitlines()
    assert started[0].endswith("pretrain_gpt.py") and "--dry-run" in started


# Not through PYTHON: what a user sees on a laptop. GPT-3 at the size of a large cluster is the heaviest.
@pytest.mark.parametrize(
    ("script", "arguments", "shown"),
    [
        (
            EXAMPLES / "pretrain_gpt3_175b.sh",
            ["--world-size", "16384", "--rank", "16383"],
            ["mesh of 16384 ranks: pp=16 x dp=128 x cp=1 x tp=8", "rank 16383: pp 15, dp 127, cp 0, tp 7", "bubble"],
        ),
        (SLURM, [], ["mesh of 8 ranks: pp=2 x dp=2 x cp=1 x tp=2", "rank 0: pp 0, dp 0, cp 0, tp 0", "bubble"]),
    ],
    ids=["gpt3-175b", "llama3-8b"],
)
def test_the_dry_run_itself(script: Path, arguments: list[str], shown: list[str]) -> None:
    hidden = ("GPUS_PER_NODE", "NNODES", "PYTHON")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = run(script, "--dry-run", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in shown), done.stdout


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert os.access(script, os.X_OK) or script.name == "launch.sh", "sourced only"
    if script.name != "launch.sh":
        assert "set -euo pipefail" in script.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shell_scripts_pass_shellcheck() -> None:
    done = subprocess.run(["shellcheck", "-x", *map(str, SHELL)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

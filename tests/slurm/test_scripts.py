"""What the batch scripts ask for is what their recipes need."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from em_megatron.planning.planner import make_plan

SCRIPTS = sorted(Path("slurm").glob("pretrain_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_recipe_fits_the_nodes_that_its_script_asks_for(script: Path):
    text = script.read_text()
    nodes, gpus = (
        int(re.search(rf"^#SBATCH --{name}=(\d+)$", text, re.MULTILINE)[1]) for name in ("nodes", "gpus-per-node")
    )
    recipe = re.search(r"launch/recipes/\w+\.yaml", text)[0]
    assert make_plan(recipe, (), nodes, gpus, "h100").refusal is None
    assert f"{script.stem}.yaml" in recipe


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md"])
def test_commands_of_the_documents_are_accepted(page: str):
    commands = re.findall(r"^sbatch .*?slurm/(pretrain_\w+)\.sh(.*)", Path(page).read_text(), re.MULTILINE)
    lines = re.findall(r"^sbatch .*slurm/pretrain.*", Path(page).read_text(), re.MULTILINE)
    assert commands
    for line, (name, rest) in zip(lines, commands, strict=True):
        nodes = re.search(r"--nodes=(\d+)", line)
        overrides = re.findall(r"[\w.]+=\S+", rest.split("#")[0])
        assert overrides
        plan = make_plan(
            f"launch/recipes/{name}.yaml", overrides, int(nodes[1]) if nodes else 1, 8, "h100", vocab_size=32000
        )
        assert plan.refusal is None, line


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not there: apt-get install shellcheck")
def test_scripts_pass_shellcheck():
    done = subprocess.run(
        ["shellcheck", *map(str, Path("slurm").glob("*.sh")), ".ci/run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout

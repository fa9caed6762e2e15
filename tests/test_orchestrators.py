"""The examples for Kubernetes and Slurm give every worker its place."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gpt_tf import cli
from gpt_tf.parallel import data as strategies

DOCS = Path(__file__).parent.parent / "docs"
# Stands for gpt-tf: says what it was given, and ends as it is told.
COMMAND = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["SAID"], "a") as file:
    print(json.dumps([os.environ["TF_CONFIG"], sys.argv[1:]]), file=file)
sys.exit(int(open(os.environ["STATUS"]).read()))
"""
# Stands for srun: runs the command once for each task and gives the highest status.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
highest=0
for rank in 0 1 2; do
  SLURM_PROCID=$rank "$@" || { s=$?; highest=$((s > highest ? s : highest)); }
done
exit $highest
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node[07-09]" ]] || exit 1
printf 'node07\\nnode08\\nnode09\\n'
"""


@pytest.fixture
def run(tmp_path):
    """Run a command beside a false gpt-tf; return its status and what that was told."""
    for name, text in (("gpt-tf", COMMAND), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    said = tmp_path / "said"

    def with_environment(command, status=0, **environment):
        (tmp_path / "status").write_text(str(status))
        said.write_text("")
        result = subprocess.run(
            command,
            env={
                "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "SAID": str(said),
                "STATUS": str(tmp_path / "status"),
                **environment,
            },
        )
        lines = said.read_text().splitlines()
        return result.returncode, [json.loads(line) for line in lines]

    return with_environment


def kubernetes_script():
    """The shell script that stands in the container's `args`."""
    text = (DOCS / "kubernetes.yaml").read_text("utf-8")
    (block,) = re.findall(
        r"^          args:\n            - \|\n((?: {14}.*\n)+)", text, re.M
    )
    return textwrap.dedent(block)


def kubernetes(run, index, workers="4"):
    return run(
        ["/bin/sh", "-c", kubernetes_script()],
        JOB="gpt-tf",
        WORKERS=workers,
        PORT="12345",
        JOB_COMPLETION_INDEX=str(index),
    )


@pytest.mark.parametrize("index", range(4))
def test_a_pod_is_the_worker_of_its_index(run, monkeypatch, index):
    _, [(config, _)] = kubernetes(run, index)
    monkeypatch.setenv("TF_CONFIG", config)
    assert strategies.read_tf_config() == {
        "cluster": {"worker": [f"gpt-tf-{i}.gpt-tf:12345" for i in range(4)]},
        "task": {"type": "worker", "index": index},
    }


def test_the_pods_are_as_many_as_the_job_has():
    text = (DOCS / "kubernetes.yaml").read_text("utf-8")
    numbers = re.findall(r"(?:completions|parallelism): (\d+)", text)
    numbers += re.findall(r'name: WORKERS\n\s+value: "(\d+)"', text)
    assert len(numbers) == 3 and len(set(numbers)) == 1
    ports = re.findall(r'(?:port|containerPort): (\d+)|PORT\n\s+value: "(\d+)"', text)
    assert {a or b for a, b in ports} == {"12345"} and len(ports) == 3


def test_a_pod_without_an_index_does_not_start(run):
    status, said = run(["/bin/sh", "-c", kubernetes_script()], WORKERS="2", JOB="x")
    assert status != 0
    assert said == []


def slurm(run, **options):
    return run(
        ["bash", str(DOCS / "slurm.sh")],
        SLURM_JOB_ID="123456",
        SLURM_JOB_NODELIST="node[07-09]",
        **options,
    )


def test_a_slurm_task_is_the_worker_of_its_rank(run, monkeypatch):
    status, said = slurm(run)
    assert status == 0
    assert len(said) == 3
    for rank, (config, _) in enumerate(said):
        monkeypatch.setenv("TF_CONFIG", config)
        assert strategies.read_tf_config() == {
            "cluster": {"worker": [f"node0{i}:23456" for i in (7, 8, 9)]},
            "task": {"type": "worker", "index": rank},
        }


@pytest.mark.parametrize(("status", "attempts"), [(75, 2), (137, 2), (2, 1), (0, 1)])
def test_slurm_tries_again_what_another_try_may_mend(run, status, attempts):
    ended, said = slurm(run, status=status, ATTEMPTS="2")
    assert ended == status
    assert len(said) == 3 * attempts


@pytest.mark.parametrize("words", ["kubernetes", "slurm"])
def test_the_examples_give_options_that_there_are(run, words, monkeypatch):
    _, said = kubernetes(run, 0) if words == "kubernetes" else slurm(run)
    arguments = said[0][1]
    assert {"--resume-or-start", "multi_worker"} <= set(arguments)
    assert_options_are_known(arguments)
    with pytest.raises(AssertionError):
        assert_options_are_known([*arguments, "--no-such"])


def test_the_page_names_options_that_there_are():
    text = (DOCS / "many_machines.md").read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"gpt-tf (train --.*)$", text, re.M)
    assert len(commands) >= 3
    for command in commands:
        assert_options_are_known(shlex.split(command.replace(" ...", "")))


def assert_options_are_known(arguments):
    import typer.main

    command = typer.main.get_command(cli.app).commands[arguments[0]]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= known

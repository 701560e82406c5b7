"""The tools for developers, in small."""

import json

import pytest

pytest.importorskip("accelerate")


@pytest.mark.slow
def test_gpu_check_takes_every_branch_on_the_cpu(run, tmp_path):
    done = run("tools/gpu_check.py", "--dry-run", "--minutes", "9", "--out", "check")
    found = json.loads((tmp_path / "check/gpu_check.json").read_text())
    assert [line["problem"] for line in found if line["name"] == "part"] == [""] * 5
    names = {(line.get("part"), line["name"]) for line in found}
    for part in ("large", "small"):
        assert {(part, name) for name in ("CUDA graphs", "eager", "Trainer")} <= names
    assert ("whole", "the command to the first step") in names
    assert "| large: CUDA graphs |" in done.stdout
    assert (tmp_path / "check/training/submission.csv").exists()

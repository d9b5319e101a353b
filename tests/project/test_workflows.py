"""Workflows run with few rights, and nothing in them can change under a name that stays."""

import re

import pytest
import yaml


@pytest.fixture(params=["ci", "release"])
def workflow(request, root):
    return (root / ".github" / "workflows" / f"{request.param}.yml").read_text()


def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it(workflow):
    used = re.findall(r"uses: *(.*)", workflow)
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line)] == []


def test_jobs_read_and_only_the_release_signs(workflow):
    document = yaml.safe_load(workflow)
    assert document["permissions"] == {"contents": "read"}
    for job in document["jobs"].values():
        assert set(job.get("permissions", {})) <= {"contents", "id-token", "attestations"}
        assert job["timeout-minutes"] <= 60
        checkouts = [step for step in job["steps"] if "checkout" in step.get("uses", "")]
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_the_tag_of_a_release_is_looked_for_as_the_version_is_written(root):
    (line,) = [row for row in (root / "kappa_fast" / "_version.py").read_text().splitlines() if "__version__" in row]
    assert re.fullmatch(r'__version__ = "[^"]+"', line)

"""DVC on the same store: what one person pushed with a commit, another pulls with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from minio import Minio

from sonorant.artifacts import digest_folder, read_record
from sonorant.params import read_params
from sonorant.store.connection import open_client, read_settings
from tests.cluster.rgw import Rgw
from tests.workflow import TINY

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent
BUCKET = "sonorant"
"""That of .dvc/config."""
READ_ONLY: dict[str, Any] = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"AWS": ["arn:aws:iam:::user/reader"]},
            "Action": ["s3:GetObject", "s3:ListBucket", "s3:GetBucketLocation"],
            "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
        }
    ],
}
READER = ("00reader", "the secret of someone who may read")


@pytest.fixture(scope="module")
def store(rgw: Rgw) -> Minio:
    """The bucket that .dvc/config names, which one other person may read."""
    client = open_client(read_settings(environment=rgw.variables(BUCKET)))
    client.make_bucket(BUCKET)
    rgw.create_user("reader", *READER)
    client.set_bucket_policy(BUCKET, json.dumps(READ_ONLY))
    return client


class Person:
    """Someone's clone, and how they reach the store."""

    def __init__(self, folder: Path, origin: Path, rgw: Rgw, *keys: str) -> None:
        """`keys`: access key and secret, those of the store's owner where they are left out."""
        folder.mkdir()
        self.clone = folder / "clone"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SONORANT_", "DVC_"))}
        who = {f"GIT_{role}_{key}": "test" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        # Nothing of this machine's settings counts, and what one person's DVC remembers another's does not know.
        own = {"HOME": str(folder), "DVC_SITE_CACHE_DIR": str(folder / "site"), "SONORANT_RUNS": str(folder / "runs")}
        path = {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
        self.environment = {**kept, **who, **own, **path, "DVC_NO_ANALYTICS": "1", **rgw.variables(BUCKET, *keys)}
        self("git", "clone", "--quiet", str(origin), str(self.clone), where=folder)

    def __call__(self, *words: str, where: Path | None = None, fails: bool = False) -> str:
        """What a command says on stdout; on both where it `fails`, as it must then."""
        place = where or self.clone
        answer = subprocess.run(words, cwd=place, env=self.environment, capture_output=True, text=True, timeout=280)
        assert bool(answer.returncode) == fails, answer.stdout[-3000:] + answer.stderr[-3000:]
        return answer.stdout + answer.stderr if fails else answer.stdout


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository that all may clone: this one's workflow with parameters of a tiny run."""
    folder = tmp_path / "origin"
    folder.mkdir()
    for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "optional", folder / "optional", ignore=shutil.ignore_patterns("dvc.lock"))
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc")
    (folder / "params.yaml").write_text(yaml.safe_dump(read_params([ROOT / "params.yaml"], TINY)))
    git = ["git", "-c", "user.name=test", "-c", "user.email=test"]
    # Others push to its branch.
    config = ["config", "receive.denyCurrentBranch", "ignore"]
    for words in (["init", "-q", "-b", "main"], config, ["add", "."], ["commit", "-q", "-m", "The workflow"]):
        subprocess.run([*git, *words], cwd=folder, check=True, timeout=60)
    return folder


MADE = ("dvc.yaml", "optional/dvc.yaml:ground", "optional/dvc.yaml:align")
"""The stages of one round."""


def commit_lock(person: Person, message: str) -> None:
    """Commit and push what `dvc repro` wrote down."""
    person("git", "add", "*dvc.lock")
    person("git", "commit", "--quiet", "-m", message)
    person("git", "push", "--quiet", "origin", "HEAD:main")


def test_what_one_pushes_another_who_may_only_read_pulls(origin: Path, store: Minio, rgw: Rgw, tmp_path: Path) -> None:
    first = Person(tmp_path / "first", origin, rgw)
    first("dvc", "repro", "prepare")
    commit_lock(first, "A corpus")
    first("dvc", "push", "prepare")
    assert list(store.list_objects(BUCKET, "dvc/", recursive=True))

    second = Person(tmp_path / "second", origin, rgw, *READER)
    second("dvc", "pull", "prepare")
    theirs, ours = (person.clone / "artifacts" / "corpus" for person in (first, second))
    assert digest_folder(theirs) == digest_folder(ours) == read_record(ours, "corpus")["digest"]
    assert "in sync" in second("dvc", "status", "--cloud", "prepare")
    assert second("git", "status", "--porcelain") == ""
    # The key is good for reading alone.
    (second.clone / "notes.txt").write_text("what I heard in it")
    second("dvc", "add", "--quiet", "notes.txt")
    assert "AccessDenied" in second("dvc", "push", "notes.txt", fails=True)

    third = Person(tmp_path / "third", origin, rgw, READER[0], "wrong")
    said = third("dvc", "pull", "prepare", fails=True)
    assert "failed to connect to s3 (sonorant/dvc" in said
    assert "Forbidden" in said
    assert "Traceback" not in said
    for person in (first, second):
        for path in (person.clone / ".dvc").glob("config*"):
            assert person.environment["AWS_SECRET_ACCESS_KEY"] not in path.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_exact_model_of_a_commit_and_experiments(origin: Path, store: Minio, rgw: Rgw, tmp_path: Path) -> None:
    first = Person(tmp_path / "first", origin, rgw)
    first("dvc", "repro")
    commit_lock(first, "A model")
    first("dvc", "push", *MADE)
    commit = first("git", "rev-parse", "HEAD").strip()
    wanted = digest_folder(first.clone / "artifacts" / "model")

    # An experiment is run, shown and compared; the next commit has another model.
    first("dvc", "exp", "run", "--set-param", "publish.num_units=6", "--name", "six")
    shown = first("dvc", "exp", "show", "--csv")
    assert "six" in shown
    assert "publish.num_units" in shown
    compared = first("dvc", "metrics", "diff", "HEAD", "--json")
    changed = json.loads(compared)["artifacts/report/metrics.json"]
    assert any(key.startswith("model") for key in changed), compared
    first("dvc", "plots", "show")
    page = (first.clone / "dvc_plots" / "index.html").read_text()
    for name in ("training.csv", "scores.csv"):
        assert name in page
    first("git", "add", "params.yaml")
    commit_lock(first, "Six units")
    first("dvc", "push", *MADE)
    six = digest_folder(first.clone / "artifacts" / "model")
    assert six != wanted

    second = Person(tmp_path / "second", origin, rgw, *READER)
    for revision, digest in (("main", six), (commit, wanted)):
        second("git", "checkout", "--quiet", revision)
        second("dvc", "pull", "artifacts/model")
        model = second.clone / "artifacts" / "model"
        assert digest_folder(model) == digest == read_record(model, "model")["digest"]
    second("dvc", "pull", *MADE)
    # Nothing is left to be made: what the workflow would make is what was pulled.
    assert "Running stage" not in second("dvc", "repro")
    assert "in sync" in second("dvc", "status", "--cloud", *MADE)
    assert second("git", "status", "--porcelain") == ""
    assert list(store.list_objects(BUCKET, "dvc/", recursive=True))

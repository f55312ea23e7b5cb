"""What each install may need: importing with everything else made impossible to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ["faiss", "lhotse", "matplotlib", "numba", "PIL", "rich", "scipy", "typer", "yaml", "dvc", "minio"]
OTHERS = ["fastapi", "kfp", "kubernetes", "prometheus_client", "espeakng_loader", "sklearn", "transformers"]
GPU_MACHINE_LACKS = [*TRAINING, "soundfile", "torchaudio", "fastapi", "kfp", "kubernetes", "prometheus_client"]
CLIENT_LACKS = [
    *(name for name in (*TRAINING, *OTHERS) if name not in ("rich", "typer")),
    *("torch", "torchaudio", "soundfile"),
]
BLOCK = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def run_without(absent: list[str], source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK.replace("{absent}", repr(set(absent))) + source]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_the_base_install_is_enough_for_inference() -> None:
    source = """
from pathlib import Path
import tempfile
import numpy as np
import soundfile
from sonorant.config import EncoderConfig
from sonorant.inference import load, read_wave
from sonorant.models.codebook import Codebook
from sonorant.models.encoder import Encoder
from sonorant.models.huggingface import save_encoder
folder = Path(tempfile.mkdtemp())
config = EncoderConfig(stem_channels=8, dim=16, num_layers=1, num_heads=1, ffn_dim=16, position_groups=4)
save_encoder(Encoder(config), folder, layer=1)
Codebook(np.eye(4, 16, dtype=np.float32), np.zeros(16, np.float32), np.ones(16, np.float32)).save(
    folder / "codebook.safetensors"
)
rng = np.random.default_rng(0)
soundfile.write(folder / "a.wav", rng.uniform(-0.5, 0.5, 44_100), 44_100)
[units] = load(folder).units([read_wave(folder / "a.wav")])
print(len(units))
"""
    answer = run_without([*TRAINING, *OTHERS], source)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "49"


def test_the_base_install_hears_with_a_grounded_model_and_says_what_search_lacks() -> None:
    source = """
from pathlib import Path
import tempfile
import numpy as np
from sonorant.config import EncoderConfig, GroundingConfig
from sonorant.inference import load
from sonorant.models.codebook import Codebook
from sonorant.models.encoder import Encoder
from sonorant.models.grounding import Grounder, save_grounder
from sonorant.models.huggingface import save_encoder
folder = Path(tempfile.mkdtemp())
config = EncoderConfig(stem_channels=8, dim=16, num_layers=1, num_heads=1, ffn_dim=16, position_groups=4)
save_encoder(Encoder(config), folder, layer=1, num_images=3)
save_grounder(Grounder(16, 1, GroundingConfig(layer=1, dim=4), with_images=False), folder)
(folder / "images.faiss").write_bytes(b"")
Codebook(np.eye(4, 16, dtype=np.float32), np.zeros(16, np.float32), np.ones(16, np.float32)).save(
    folder / "codebook.safetensors"
)
wave = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
speech = load(folder)
print(len(speech.units([wave])[0]))
try:
    speech.search([wave], top=1)
except ValueError as error:
    print(error)
"""
    answer = run_without([*TRAINING, *OTHERS], source)
    assert answer.returncode == 0, answer.stderr
    wanted = "model: found no module faiss, wanted it to search: pip install 'sonorant[serve]'"
    assert answer.stdout.splitlines() == ["49", wanted]


def test_the_serve_install_is_enough_for_the_server() -> None:
    """Neither training nor Kubeflow nor DVC is needed to answer a request."""
    source = """
import sys
sys.path.insert(0, ".")
from serving.__main__ import main
import serving.app, serving.engine.worker
from serving.settings import Settings
serving.app.create_app(Settings())
print("ready")
"""
    lacking = [name for name in TRAINING if name != "faiss"]
    absent = [*lacking, "kfp", "kubernetes", "espeakng_loader", "sklearn", "transformers", "httpx", "pyarrow"]
    answer = run_without([*absent, "pandas"], source)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "ready"


@pytest.mark.parametrize("module", ["sonorant.models.encoder", "sonorant.tasks", "sonorant.training.engine"])
def test_the_engine_imports_on_a_bare_gpu_machine(module: str) -> None:
    answer = run_without(GPU_MACHINE_LACKS, f"import {module}")
    assert answer.returncode == 0, answer.stderr


def test_the_client_needs_its_extra_and_no_torch() -> None:
    source = """
import sonorant.client.run, sonorant.client.store
from sonorant.client import Client
Client("http://127.0.0.1:8000").close()
sys.argv = ["sonorant", "embed", "nowhere.wav", "--output", "out.parquet"]
from sonorant.cli import main
main()
"""
    answer = run_without(CLIENT_LACKS, source)
    assert answer.stderr.startswith("embed: nowhere.wav: found nothing there"), answer.stderr


@pytest.mark.parametrize("module", ["httpx", "pyarrow", "rich"])
def test_the_clients_extra_is_named_where_it_lacks(module: str) -> None:
    source = 'sys.argv = ["sonorant", "embed", "a.wav", "--output", "o"]\nfrom sonorant.cli import main\nmain()'
    answer = run_without([module], source)
    assert answer.returncode == 1
    wanted = "wanted the client extra: pip install 'sonorant[client]'"
    assert answer.stderr == f"sonorant: found no module {module}, {wanted}\n"


def test_the_absent_are_absent() -> None:
    assert run_without(["soundfile"], "import soundfile").returncode != 0

"""Downloads of weights: what is fetched, kept, gone on with and refused before it travels."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hub_kit import COMMIT, CONFIG, FILES, Answer, FakeHub, cut, get, present, safetensors
from tandem_worker.errors import ModelError
from tandem_worker.models.download import main
from tandem_worker.models.fetching import WeightsError
from tandem_worker.models.identity import identify


def test_what_a_worker_reads_is_fetched_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    hub.files |= {
        "README.md": b"x",
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": safetensors(5),
        "onnx/model.safetensors": safetensors(5),
        "merges.txt": b"x",
    }

    get(hub, tmp_path)

    assert present(tmp_path) == FILES
    assert len(hub.gets("model.safetensors")) == 1


def test_a_reference_is_resolved_to_a_commit_and_read_at_it(hub: FakeHub, tmp_path: Path) -> None:
    get(hub, tmp_path, "hf://org/name@v1")

    paths = [path for _, path, _ in hub.requests]
    assert paths[0] == "/api/models/org/name/revision/v1"
    assert all(COMMIT in path for path in paths[1:])
    assert identify(tmp_path).commit == COMMIT


def test_a_finished_folder_is_kept_even_if_the_name_has_moved_on(
    hub: FakeHub, tmp_path: Path
) -> None:
    get(hub, tmp_path)
    first = identify(tmp_path)
    hub.requests.clear()
    hub.commit = "d" * 40
    hub.files["model.safetensors"] = safetensors(1000, fill=2)

    said = get(hub, tmp_path)

    assert hub.requests == []
    assert "there already" in said[0]
    assert identify(tmp_path) == first


def test_a_pod_without_the_folder_gets_the_pinned_commit(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit = "d" * 40

    get(hub, tmp_path, pinned_commit=COMMIT)

    assert identify(tmp_path).commit == COMMIT
    assert not any("/revision/" in path for _, path, _ in hub.requests)


def test_the_identity_is_of_the_content_however_it_came(hub: FakeHub, tmp_path: Path) -> None:
    get(hub, tmp_path / "a")
    for name, body in FILES.items():
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes(body)

    by_hand = identify(tmp_path / "b")

    assert by_hand.digest == identify(tmp_path / "a").digest
    (tmp_path / "b" / "config.json").write_bytes(CONFIG.replace(b"8", b"9"))
    assert identify(tmp_path / "b").digest != by_hand.digest


def test_a_file_changed_behind_the_manifest_is_noticed_and_fetched_again(
    hub: FakeHub, tmp_path: Path
) -> None:
    get(hub, tmp_path)
    good = identify(tmp_path).digest
    (tmp_path / "model.safetensors").write_bytes(safetensors(1000, fill=9))

    assert identify(tmp_path).digest != good

    get(hub, tmp_path)
    assert identify(tmp_path).digest == good
    assert len(hub.gets("tokenizer.json")) == 1


def test_all_pages_of_a_listing_are_read(hub: FakeHub, tmp_path: Path) -> None:
    hub.page_size = 1

    get(hub, tmp_path)

    assert present(tmp_path) == FILES


def test_a_cut_download_goes_on_where_it_was_cut(hub: FakeHub, tmp_path: Path) -> None:
    cut(hub, "model.safetensors", 300, 200)

    get(hub, tmp_path)

    assert present(tmp_path) == FILES
    ranges = [headers.get("range") for headers in hub.gets("model.safetensors")]
    assert ranges == [None, "bytes=300-", "bytes=500-"]


def test_a_killed_download_goes_on_in_the_next_pod(hub: FakeHub, tmp_path: Path) -> None:
    cut(hub, "model.safetensors", 300, 0, 0, 0, 0)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        get(hub, tmp_path)
    hub.requests.clear()

    get(hub, tmp_path)

    assert [h.get("range") for h in hub.gets("model.safetensors")] == ["bytes=300-"]
    assert present(tmp_path) == FILES


COLLIDING = """
import os, sys
os.getpid = lambda: 1  # every container's first process
from tandem_worker.models.download import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_two_pods_on_one_claim_leave_whole_files(hub: FakeHub, tmp_path: Path) -> None:
    """Their part files once collided: zeros in the file, exit status 0."""
    body = hub.files["model.safetensors"] = safetensors(24 * 2**20)
    second_waits = threading.Event()
    first_is_at_two_thirds = threading.Event()

    def rule(request: BaseHTTPRequestHandler) -> Answer | None:
        if request.command != "GET" or not request.path.endswith("/model.safetensors"):
            return None
        if len(hub.gets("model.safetensors")) == 1:
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body[: 16 * 2**20])
            first_is_at_two_thirds.set()
            second_waits.wait(60)
            request.wfile.write(body[16 * 2**20 :])
            request.close_connection = True
            return None
        return None

    hub.rules.append(rule)
    env = {**os.environ, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-u", "-c", COLLIDING, "hf://org/name", str(tmp_path)]

    pods = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)]
    assert first_is_at_two_thirds.wait(60)
    pods.append(
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    )
    waits = pods[1].stdout
    assert waits is not None
    told = waits.readline()
    second_waits.set()
    said = [pod.communicate(timeout=60)[0].decode() for pod in pods]

    assert b"another pod is writing" in told
    assert [pod.returncode for pod in pods] == [0, 0], said
    assert (tmp_path / "model.safetensors").read_bytes() == body
    assert len(hub.gets("model.safetensors")) == 1


# -- what no worker runs is refused before the weights travel --------------------------------------


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["model-q4.gguf"], "holds GGUF"),
        (["pytorch_model.bin"], r"PyTorch pickles \(\.bin\)"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter alone"),
        (["consolidated.safetensors", "params.json"], "but neither model.safetensors nor"),
        (["model.safetensors", "tokenizer.model", "config.json"], "tokenizer.model is the slow"),
        (["model.safetensors", "params.json", "tokenizer.json"], "params.json is Meta's"),
        ([], r"holds no \.safetensors file"),
    ],
)
def test_other_formats_are_named_before_anything_is_fetched(
    hub: FakeHub, tmp_path: Path, names: list[str], sentence: str
) -> None:
    hub.files = dict.fromkeys(names, b"{}")

    with pytest.raises(ModelError, match=sentence):
        get(hub, tmp_path)

    assert not any("/resolve/" in path for _, path, _ in hub.requests)


def test_an_unknown_architecture_is_told_before_its_weights_travel(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.files["config.json"] = CONFIG.replace(b"llama", b"mamba")

    with pytest.raises(ModelError, match="model_type='mamba'"):
        get(hub, tmp_path)

    assert hub.gets("model.safetensors") == []


def test_a_full_disk_is_told_before_it_is_full(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)

    with pytest.raises(WeightsError, match=r"enlarge weights\.cache\.size"):
        get(hub, tmp_path)


def test_a_wrong_call_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([]) == 2
    assert main(["ftp://x", str(tmp_path / "x")]) == 1

    assert "use hf:// or s3://" in capsys.readouterr().err

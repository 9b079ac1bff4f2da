"""push(): what is proven goes to the hub, and nothing else."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from integrations.fake_hub import FakeHub, fake_hub

import loralab
from loralab.errors import AdapterFileError, CertificateError, ConfigError, TransferError

SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "certificate.safetensors", "loralab.json"}


@pytest.fixture(scope="module")
def made(flat_llama_folder: Path, sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all tests."""
    training = loralab.Training(max_steps=2, batch_size=4, precision="fp32")
    output = tmp_path_factory.mktemp("pushed") / "sums"
    run = loralab.train(model=str(flat_llama_folder), data=str(sums_file), output_dir=output, training=training)
    return run.output_dir


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return shutil.copytree(made, tmp_path / "sums")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield found


def test_a_run_is_sent_with_its_card_and_without_its_logs(trained: Path, hub: FakeHub) -> None:
    sent = loralab.push(trained, "me/sums")
    assert (sent.repo, sent.private, set(sent.files)) == ("me/sums", True, SENT)
    assert hub.private == {"me/sums": True}
    assert set(hub.files["me/sums"]) == SENT
    for name, content in hub.files["me/sums"].items():
        assert content == (trained / name).read_bytes()
    assert "me/sums" in ModelCard(hub.files["me/sums"]["README.md"].decode()).text
    assert len(sent.notes) == 2  # prompts are in it; the base is a folder of this machine


def test_a_readme_of_somebody_is_sent_as_it_is(trained: Path, hub: FakeHub) -> None:
    (trained / "README.md").write_text("mine\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        loralab.push(trained, "me/sums", license="mit")
    assert (error.value.code, error.value.field, hub.private) == ("no_effect", "license", {})
    loralab.push(trained, "me/sums")
    assert hub.files["me/sums"]["README.md"] == b"mine\n"


def test_what_is_not_what_was_certified_is_not_sent(trained: Path, hub: FakeHub) -> None:
    data = bytearray((trained / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (trained / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(CertificateError):
        loralab.push(trained, "me/sums")
    assert hub.private == {} and hub.files == {}


def test_a_folder_without_a_certificate_is_not_sent(trained: Path, hub: FakeHub) -> None:
    record = json.loads((trained / "loralab.json").read_text(encoding="utf-8"))
    del record["certificate"]
    (trained / "loralab.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(AdapterFileError) as error:
        loralab.push(trained, "me/sums")
    assert error.value.code == "no_certificate" and hub.files == {}


def test_a_public_repository_takes_nothing_private(trained: Path, hub: FakeHub) -> None:
    hub.private["me/sums"] = False
    with pytest.raises(ConfigError) as error:
        loralab.push(trained, "me/sums")
    assert error.value.code == "already_public" and hub.files == {}
    assert not loralab.push(trained, "me/sums", private=False).private


@pytest.mark.parametrize("repo", ["sums", "a/b/c", "../x", "me/a--b", "me/電影", ""])
def test_an_id_that_is_none_is_refused(repo: str, trained: Path) -> None:
    with pytest.raises(ConfigError) as error:
        loralab.push(trained, repo)
    assert error.value.code == "not_an_id"
    with pytest.raises(AdapterFileError) as missing:  # before anybody is asked
        loralab.push(trained / "nowhere", "me/sums")
    assert missing.value.code == "no_record"


def test_a_hub_that_refuses_is_one_line(trained: Path, hub: FakeHub) -> None:
    hub.status = 403
    with pytest.raises(TransferError) as error:
        loralab.push(trained, "me/sums")
    assert error.value.code == "refused" and len(str(error.value).splitlines()) == 1


def test_no_network_is_one_line(trained: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(TransferError) as error:
            loralab.push(trained, "me/sums")
    assert error.value.code == "not_reached" and len(str(error.value).splitlines()) == 1

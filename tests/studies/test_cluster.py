"""On a cluster a study gives the numbers that it gives at home, whatever happens to machines."""

import dataclasses
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies.conftest import setup_of
from studies.outcomes import results

from loralab.cluster import joined, require_reachable
from loralab.errors import ConfigError
from loralab.studies import store
from loralab.studies.cluster import LOCAL_ONLY, Cluster, RemoteResult, measure_here, received
from loralab.studies.executor import Here
from loralab.studies.halving import FIRST, RATES
from loralab.studies.rates import usual
from loralab.studies.runner import session
from loralab.studies.search import in_turn
from loralab.studies.study import DONE, FAILED, Arm, Record, StudySetup, Trial
from loralab.studies.suggest import suggested

# Ray's own test cluster leaves files and processes to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
MEASURES = Path(__file__).parents[2] / "src" / "loralab" / "studies" / "measures"
TOML = """
model = "{model}"
data = "{data}"
steps = {steps}
batch_size = 8
precision = "fp32"
test_rows = 20
seeds = 2
method = "lora"
rank = [2, 4]
"""


# -- without a cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["here", "host:port", "ray://:0", "1.2.3.4:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--ray"):
        require_reachable(address)


def test_an_address_where_nothing_answers_is_refused_in_seconds() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"--ray 127.0.0.1:{port}: nothing answers"):
        require_reachable(f"127.0.0.1:{port}")
    assert time.monotonic() - began < 30  # Ray itself would try for minutes


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"loralab\[ray\]"), joined("local"):
        pass


def test_a_cluster_that_does_not_start_is_no_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**given: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(ConfigError) as error, joined("local"):
        pass
    assert (error.value.code, error.value.field) == ("no_cluster", "ray")


def test_what_reads_other_trials_or_takes_times_stays_at_home() -> None:
    signs = ("carried import adapter_folder", "folder.parent", "perf_counter")
    found = {
        file.stem for file in MEASURES.glob("*.py") if any(sign in file.read_text(encoding="utf-8") for sign in signs)
    }
    # a library of such measures, and one that keeps what a node measures anew
    assert found - {"carried", "forgetting"} <= LOCAL_ONLY
    assert all((MEASURES / f"{name}.py").is_file() for name in LOCAL_ONLY)


def test_what_cannot_be_measured_is_a_record_that_says_why(tmp_path: Path) -> None:
    trial = Trial(measure="m:f", setup=setup_of("grid", tmp_path, tmp_path), arm=Arm(name="x"), seed=0)
    assert Cluster.accepts(trial)
    place = store.place_of(tmp_path, trial)
    back = RemoteResult(node="n1", reason="there is no model (on node n1)", log="a traceback")
    with session(tmp_path) as own:
        record = own.settle(trial, received(back, place))
    assert (record.status, record.reason) == (FAILED, back.reason)
    assert store.read(tmp_path, trial) == record
    assert "n1" in (tmp_path / store.LOG).read_text(encoding="utf-8")


def test_what_comes_back_is_put_whole_into_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(measure="m:f", setup=setup_of("grid", tmp_path, tmp_path), arm=Arm(name="x"), seed=0)

    def measure(here: Here, trial: Trial, place: Path, tell: object) -> str:
        (place / "run").mkdir()
        (place / "run" / "kept").write_text("a run", encoding="utf-8")
        store.write(place, trial, Record(arm=trial.arm, seed=0, numbers={"score": 0.5}), 3.0)
        return ""

    monkeypatch.setattr(Here, "measure", measure)
    place = store.place_of(tmp_path, trial)
    (place / "run").mkdir(parents=True)  # a start that did not come to its end
    (place / "run" / "half").touch()
    assert received(measure_here(trial, 1), place) == ""
    record = store.read(tmp_path, trial)
    assert record is not None
    assert (record.numbers, record.seconds, set(record.texts)) == ({"score": 0.5}, 3.0, {"node"})
    assert [file.name for file in (place / "run").iterdir()] == ["kept"]


class Proposed:
    """A session whose runs take no time; the loss is lowest at three times the usual rate."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, list[str]()
        self.cluster = SimpleNamespace(each=in_turn, abreast=2)

    def prepare(self, setup: StudySetup, arms: list[Arm], *, skip_invalid: bool) -> list[Arm]:
        return arms

    def obtain(self, trial: Trial) -> Record:
        self.ran.append(trial.digest)
        factor = trial.arm.fields["learning_rate"] / usual(trial.setup, trial.arm)
        record = trial.record(numbers={"validation_loss": math.log(factor / 3) ** 2})
        store.write(store.place_of(self.folder, trial), trial, record, 1.0)
        return record


def test_proposals_go_on_from_what_the_folder_holds(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    setup = setup_of("recommend", tmp_path, tmp_path, fields={"max_steps": 90, "batch_size": 4, "precision": "fp32"})
    first, second = Proposed(tmp_path), Proposed(tmp_path)
    few = suggested(first, dataclasses.replace(setup, values=("9", "90")))
    assert {arm.name for arm in few[:2]} == {"base", "default"}
    assert sum(FIRST in arm.name for arm in few) >= len(RATES)  # what one would take without looking
    more = suggested(second, dataclasses.replace(setup, values=("18", "90")))
    assert len(first.ran) == 9
    assert len(second.ran) == 18 - (len(few) - 2)
    assert not set(first.ran) & set(second.ran[:1])
    assert {arm.name for arm in few} <= {arm.name for arm in more}


# -- with one ------------------------------------------------------------------------------------


@pytest.fixture
def ray() -> Any:
    return pytest.importorskip("ray")


@dataclasses.dataclass
class Machines:
    """A head without processors, and two nodes with one each."""

    address: str
    cluster: Any
    nodes: list[Any]


@pytest.fixture
def machines(ray: Any) -> Iterator[Machines]:
    utils = pytest.importorskip("ray.cluster_utils")
    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield Machines(cluster.address, cluster, nodes)
    cluster.shutdown()


def own_study(folder: Path, model: Path, data: Path, steps: int = 6) -> Path:
    file = folder / "mine.toml"
    file.write_text(TOML.format(model=model, data=data, steps=steps), encoding="utf-8")
    return file


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "loralab", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended_well(*arguments: object) -> str:
    running = start(*arguments)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    return out + err


def files(folder: Path) -> set[str]:
    """Return all files of a study's trials."""
    return {str(file.relative_to(folder)) for file in (folder / "runs").rglob("*")}


def finished(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"runs/*/{store.RECORD}"))


def wait_for(folder: Path, count: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while len(finished(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_node_that_dies_changes_no_number(
    machines: Machines, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    study = own_study(tmp_path, tiny_bert_folder, noise_file, steps=30)
    away, home = tmp_path / "away", tmp_path / "home"
    running = start("study", study, "--output-dir", away, "--ray", machines.address)
    wait_for(away, 2)
    machines.cluster.remove_node(machines.nodes[0], allow_graceful=False)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 0, said
    ended_well("study", study, "--output-dir", home)
    assert results(away) == results(home)
    assert {record.status for record in results(away).values()} == {DONE}
    assert files(away) == files(home)


@pytest.mark.slow
def test_a_study_whose_driver_is_killed_goes_on(
    machines: Machines, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    study = own_study(tmp_path, tiny_bert_folder, noise_file)
    away, home = tmp_path / "away", tmp_path / "home"
    running = start("study", study, "--output-dir", away, "--ray", machines.address)
    wait_for(away, 3)
    running.kill()
    running.communicate()
    before = {file: file.stat().st_mtime_ns for file in finished(away)}
    ended_well("study", study, "--output-dir", away, "--ray", machines.address, "--resume")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    ended_well("study", study, "--output-dir", home)
    assert results(away) == results(home)


@pytest.mark.slow
def test_ctrl_c_ends_a_study_and_what_is_away(
    machines: Machines, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    study = own_study(tmp_path, tiny_bert_folder, noise_file, steps=400)
    running = start("study", study, "--output-dir", tmp_path / "x", "--ray", machines.address)
    wait_for(tmp_path / "x", 1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "--resume" in said


@pytest.mark.slow
def test_a_node_that_cannot_read_the_data_is_named(
    machines: Machines, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    study = own_study(tmp_path, tiny_bert_folder, noise_file)
    # the nodes run here: what only they cannot see is a relative path
    text = study.read_text(encoding="utf-8").replace(str(noise_file), "noise.csv")
    study.write_text(text, encoding="utf-8")
    (tmp_path / "noise.csv").write_bytes(noise_file.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "loralab", "study", study, "--ray", machines.address, "--output-dir", "out"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error: node " in done.stderr
    assert "noise.csv" in done.stderr


@pytest.mark.slow
def test_a_cluster_on_this_machine(ray: Any, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path) -> None:
    study = own_study(tmp_path, tiny_bert_folder, noise_file)
    away, home = tmp_path / "away", tmp_path / "home"
    ended_well("study", study, "--output-dir", away, "--ray", "local", "--fixed-lr")
    ended_well("study", study, "--output-dir", home, "--fixed-lr")
    assert results(away) == results(home)


@pytest.mark.slow
def test_optuna_proposes_what_is_recommended_and_goes_on_where_it_was(
    ray: Any, tmp_path: Path, tiny_bert_folder: Path, noise_file: Path
) -> None:
    pytest.importorskip("optuna")
    folder = tmp_path / "found"
    given = [
        "recommend",
        "--model",
        tiny_bert_folder,
        "--data",
        noise_file,
        "--output-dir",
        folder,
        "--steps",
        9,
        "--batch-size",
        4,
        "--test-rows",
        16,
        "--precision",
        "fp32",
        "--ray",
        "local",
        "--budget",
        "4m",
    ]
    running = start(*given)
    wait_for(folder, 5)
    running.kill()
    running.communicate()
    before = {file: file.stat().st_mtime_ns for file in finished(folder)}
    ended_well(*given, "--resume")
    assert {file: file.stat().st_mtime_ns for file in before} == before
    (setup, arms, _), *_ = store.plans(folder).values()
    count = int(setup.values[0])
    assert 0.8 * count <= len(arms) - 1 <= count  # two proposals may round to the same arm
    rates = {arm.fields["learning_rate"] for arm in arms if arm.fields}
    assert len(rates) > 3  # of no grid
    assert (folder / "config.toml").is_file()
    assert (folder / "report.html").stat().st_size > 500

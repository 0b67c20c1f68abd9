"""Two executors, one promise: every task ends as one result, whatever happens to workers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.build.executor import Executor
from data_pipeline.build.executor_local import LocalExecutor
from data_pipeline.build.executor_ray import RayExecutor
from data_pipeline.build.plan import make_tasks
from data_pipeline.build.task import Task, TaskResult
from data_pipeline.deidentify import PseudonymKey
from data_pipeline.sources.inventory import find_sources
from mim_scale.ray_cluster import ray_cluster
from mim_scale.store.dataset import volume_folder
from tests.pipeline.sources import build_or_die, config, phantom, write_image


@pytest.fixture(
    params=["local", pytest.param("ray", marks=pytest.mark.ray)],
    scope="module",
)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "local":
        yield LocalExecutor(2)
    else:
        with ray_cluster(2):  # one cluster for the module: the executor joins what is there
            yield RayExecutor(2)


def _tasks(tmp_path: Path, names: list[str]) -> list[Task]:
    for seed, name in enumerate(names):
        write_image(tmp_path / "in" / f"{name}.nii.gz", phantom(seed))
    sources = find_sources(tmp_path / "in").sources
    (tmp_path / "store" / "volumes").mkdir(parents=True)
    settings = config(tmp_path / "in", tmp_path / "store")
    return list(make_tasks(tmp_path / "in", sources, settings, PseudonymKey(b"key")))


def _by_name(tasks: list[Task], results: list[TaskResult]) -> dict[str, TaskResult]:
    names = {task.key: task.source.name.removesuffix(".nii.gz") for task in tasks}
    return {names[result.key]: result for result in results}


def test_every_task_gives_one_result(tmp_path: Path, executor: Executor) -> None:
    tasks = _tasks(tmp_path, ["a", "b", "c", "d", "e"])
    (tmp_path / "in" / "c.nii.gz").write_bytes(b"no longer a scan")
    results = _by_name(tasks, list(executor.run(build_or_die, tasks)))
    assert sorted(results) == ["a", "b", "c", "d", "e"]
    assert results["c"].rejected
    assert results["c"].rejected[0] == "unreadable"
    for name in "abde":
        row = results[name].row
        assert row
        assert volume_folder(tmp_path / "store", row.key).is_dir()
        assert TaskResult.from_values(results[name].values()) == results[name]


def test_a_task_that_kills_its_workers_is_set_aside(tmp_path: Path, executor: Executor) -> None:
    tasks = _tasks(tmp_path, ["a", "b", "dies", "e", "f"])
    results = _by_name(tasks, list(executor.run(build_or_die, tasks)))
    assert len(results) == 5
    assert results["dies"].rejected
    assert results["dies"].rejected[0] == "worker_died"
    assert all(results[name].row for name in "abef")


def test_an_error_of_a_task_reaches_the_build(tmp_path: Path, executor: Executor) -> None:
    tasks = _tasks(tmp_path, ["a", "raises"])
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        list(executor.run(build_or_die, tasks))
    assert next(iter(executor.run(build_or_die, tasks[:1]))).row


def test_no_tasks_no_results(executor: Executor) -> None:
    assert list(executor.run(build_or_die, [])) == []


def test_a_task_larger_than_the_machine_still_runs(tmp_path: Path, executor: Executor) -> None:
    tasks = [replace(task, memory_bytes=10**15) for task in _tasks(tmp_path, ["a", "b"])]
    assert all(result.row for result in executor.run(build_or_die, tasks))

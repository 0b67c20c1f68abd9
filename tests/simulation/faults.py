"""What befalls a simulated run."""

from typing import TYPE_CHECKING

from tests.simulation.cluster import Launch
from tests.simulation.virtual import Here

if TYPE_CHECKING:
    from tests.simulation.simulate import Simulation

FAULTS = (
    "rank killed",
    "killed in a write",
    "node killed",
    "power failure",
    "power failure, names stay",
    "rank stopped",
    "network dead",
    "asked to stop",
    "all asked to stop",
    "disk full for a while",
    "disk error",
    "short writes for a while",
    "stale reads for a while",
    "clock jumps",
    "MLflow down",
    "MLflow slow",
    "MLflow deaf",
    "second launch",
    "lock kept",
)
"""Beside these: bit rot between launches, slow ranks, ranks that do not see the folder, another number of ranks, losses
that are not finite."""
_SPELLS = {
    "killed in a write": "deadly",
    "disk full for a while": "full",
    "disk error": "error",
    "short writes for a while": "short",
    "stale reads for a while": "stale",
}
_EXCUSES = ("full", "error", "stale")
"""What may end a launch by an error, or let a checkpoint be passed over."""
_MLFLOW = {"MLflow down": "down", "MLflow slow": "slow", "MLflow deaf": "deaf"}
_POWER = {"power failure": "power fails", "power failure, names stay": "power fails, names stay"}


def befall(fault: str, simulation: "Simulation", launch: Launch) -> None:
    """Let it happen now; nothing, where the launch is over."""
    if launch.is_over:
        return
    random, disk = Here.world.random, simulation.disk
    simulation.happened[fault] += 1
    simulation.say(f"!! {fault}")
    if fault in _SPELLS:
        spell = _SPELLS[fault]
        disk.spells.add(spell)
        if spell in _EXCUSES:
            simulation.excuse(spell)
        if spell != "deadly":
            Here.world.after(random.expovariate(1 / 3), lambda: disk.spells.discard(spell))
    elif fault in _MLFLOW:
        ails = simulation.mlflow.ails
        ails.add(_MLFLOW[fault])
        Here.world.after(random.expovariate(1 / 100), lambda: ails.discard(_MLFLOW[fault]))
    elif fault in _POWER:
        launch.kill_all()
        simulation.power = _POWER[fault]
    else:
        _to_ranks(fault, simulation, launch)


def _to_ranks(fault: str, simulation: "Simulation", launch: Launch) -> None:
    rank = Here.world.random.randrange(launch.size)
    match fault:
        case "rank killed":
            launch.kill(rank)
        case "node killed":
            launch.kill_all()
        case "rank stopped":
            launch.freeze(rank)
        case "network dead":
            launch.cut()
        case "asked to stop":
            launch.ask_to_stop(rank)
        case "all asked to stop":
            for each in range(launch.size):
                launch.ask_to_stop(each)
        case "clock jumps":
            Here.world.wall_offset += Here.world.random.uniform(-1e6, 1e6)
        case "second launch":
            _intrude(simulation, launch)
        case "lock kept":
            simulation.keep_locks()
            launch.kill_all()
        case _:
            raise KeyError(fault)


def _intrude(simulation: "Simulation", launch: Launch) -> None:
    """Somebody starts the same command again while the run is alive."""
    if not simulation.is_locked:
        return
    second = Launch(launch.config, 1, frozenset(), frozenset(), is_patient=True)
    simulation.intruders.append(second)
    second.start()

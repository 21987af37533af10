"""A container's GPU under this node's settings: the `cuda` package with grit.toml applied.

For a container that has no CUDA process, nothing of `cuda`'s engine is imported and no helper
process started.
"""

from __future__ import annotations

from contextlib import contextmanager

from shim import digests, failpoint, headroom, journal, log, places
from shim.cuda import discovery
from shim.cuda.errors import CudaError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.config import GritOptions
    from shim.container import Container
    from shim.cuda.driver import Driver, Library
    from shim.cuda.engine import Policy
    from shim.cuda.survey import Survey
    from shim.cuda.suspension import Process, Suspension

PLUGIN_DIRECTORY = "/usr/lib/criu"
"""Where CRIU looks for plugins unless told otherwise (CRIU 4.2: include/plugin.h)."""


def suspend(container: Container, driver: Driver) -> Suspension:
    """Takes the GPU from all CUDA processes of a running container, or from none; a false one if
    there are none. Raises CudaError with every process as it was found, or saying which is not.

    With the driver engine the copies lie on the host afterwards, with CRIU's plugin they are yet
    to be made; before either, `headroom` has its say."""
    from shim.cuda.suspension import Suspension

    candidates = discovery.candidates(container.pids())
    if not candidates:
        return Suspension()
    from shim.cuda import engine

    journal.note(container, journal.LOCKING, processes=[c.key for c in candidates])

    def before_copy(processes: list[Process]) -> None:
        failpoint.reach("copy")
        journal.note(container, journal.COPYING, processes=_keys(processes))
        headroom.make_room(container, processes)

    try:
        suspension = engine.suspend(
            container.pids,
            driver,
            policy(container.config),
            before_copy=before_copy,
        )
    except BaseException:
        headroom.put_back(container)
        raise
    for pid, problem in suspension.forked.items():
        if problem:
            log.warning(
                "a forked process keeps its parent's GPU files, and CRIU will not dump it",
                id=container.id,
                pid=pid,
                reason=problem,
            )
        else:
            log.info("a forked process was freed of its parent's GPU", id=container.id, pid=pid)
    if suspension:
        size = sum(process.device_bytes for process in suspension.processes)
        container.phases["suspend"] = suspension.seconds
        container.sizes["device"] = size
        journal.note(
            container,
            journal.SUSPENDED,
            processes=_keys(suspension.processes),
            engine=suspension.engine,
        )
        log.info(
            "GPU suspended",
            id=container.id,
            phase="suspend",
            engine=suspension.engine,
            processes=len(suspension.processes),
            bytes=size,
            seconds=round(suspension.seconds, 3),
        )
    else:
        headroom.put_back(container)  # whoever held device memory has died meanwhile
    return suspension


def resume(container: Container, suspension: Suspension) -> None:
    """Gives the GPU back to a thawed container and checks that each process has it.

    Raises CudaError naming those that have not; may then be called again."""
    from shim.cuda import engine

    journal.note(container, journal.GIVING_BACK)
    with helper(container.config) as driver:
        try:
            engine.resume(suspension, driver, policy(container.config))
        finally:
            headroom.put_back(container)
    _log_resumed("GPU resumed", container, suspension.processes)


def missed(container: Container, suspension: Suspension) -> list[int]:
    """The pids, in a frozen container, of processes that took up CUDA after `suspend` looked."""
    from shim.cuda import engine

    return [one.pid for one in engine.missed(suspension, container.pids())]


def require(container: Container, engine_name: str) -> tuple[Library, Survey]:
    """What this node's driver can and has; raises LibraryError, with the reason, unless it can give
    processes their GPU back by the engine that took it: before anything is restored, not after."""
    from shim.cuda import engine

    wanted = policy(container.config)
    wanted.engine = engine_name
    with helper(container.config) as driver:
        library = driver.library()
        engine.choose(wanted, library)
        return library, driver.survey([], timeout=engine.ANSWER_SECONDS)


def choose(config: GritOptions, engine_name: str) -> str:
    """The engine that this node would use where `engine_name` ("auto" too) is asked for. Raises
    LibraryError, with the reason, where it cannot."""
    from shim.cuda import engine

    wanted = policy(config)
    wanted.engine = engine_name
    with helper(config) as driver:
        return engine.choose(wanted, driver.library())


def resume_restored(
    container: Container, expected: list[Process], engine_name: str, device_map: str
) -> list[Process]:
    """Gives a restored container's processes their GPU back, by `device_map` on other GPUs than
    before, or, for the plugin engine, checks that CRIU's plugin has. Raises CudaError naming each
    process that does not run."""
    from shim.cuda import engine

    with helper(container.config) as driver:
        restored = engine.resume_restored(
            container.pids,
            expected,
            driver,
            policy(container.config),
            engine=engine_name,
            device_map=device_map,
        )
    _log_resumed("GPU restored", container, restored)
    return restored


def _keys(processes: list[Process]) -> list[tuple[int, int]]:
    return [(process.pid, process.start_time) for process in processes]


def _log_resumed(message: str, container: Container, processes: list[Process]) -> None:
    """With the seconds that the slowest process took for each of the driver's steps."""
    seconds = {
        step: round(
            max((p.steps[step]["seconds"] for p in processes if step in p.steps), default=0), 3
        )
        for step in ("restore", "unlock")
    }
    container.phases |= {f"gpu_{step}": took for step, took in seconds.items()}
    log.info(message, id=container.id, phase="resume", processes=len(processes), **seconds)


def plugin_directory(config: GritOptions) -> str:
    return config.plugin_dir or PLUGIN_DIRECTORY


def policy(config: GritOptions) -> Policy:
    from shim.criu_bridge import client, transport
    from shim.cuda.engine import Policy

    def criu_version() -> tuple[int, int, int]:
        if config.criu_service:
            raise CudaError(
                f"the CRIU service at {config.criu_service} was started by somebody else, and its "
                "plugin cannot be told what it must not ask the driver; unset criu_service"
            )
        return client.version(transport.Swrk(config.criu))

    return Policy(
        engine=config.engine,
        lock_timeout=config.lock_timeout,
        copy_timeout=config.dump_timeout,
        prefault=(config.lane_from, threads(config)) if config.prefault == "auto" else None,
        plugin_dir=plugin_directory(config),
        criu_version=criu_version,
    )


def threads(config: GritOptions) -> int:
    """How many are to move device memory at a time."""
    return config.lane_threads or digests.processors()


@contextmanager
def helper(config: GritOptions) -> Iterator[Driver]:
    """A driver helper for the length of one operation, started when it is first asked. None is kept
    in between: it would hold 19 MB for as long as a container stays paused, and starts in 0.1 s."""
    from shim.cuda.driver import Driver

    library = "" if config.libcuda == "libcuda.so.1" else config.libcuda
    driver = Driver(places.python(), library, config.cuda_checkpoint or "")
    try:
        yield driver
    finally:
        driver.close()

"""The lane: device memory past CRIU, by many threads at once.

What the driver has copied to the host is most of a GPU container's memory, and CRIU would move it
with one thread. So:

    write    each such region to files of the draft, `lane-*.img`, synced: before the freeze, where
             it is known by then where the draft is
    check    once the container is frozen, that what was written before is still what is there
    drop     the regions' pages, so that CRIU finds nothing there
    refill   what was dropped: after the thaw, or before it where the dump failed; not where the
             processes have ended with the dump
    fill     the regions of restored processes, which CRIU leaves stopped for as long

The regions appeared while the driver copied and are the driver's: a process whose CUDA calls are
locked neither reads nor writes there, so it may run meanwhile.

Never a byte lost: what is dropped is whole in files that stay, or are held open, until it was
filled in again. Where the lane cannot be used CRIU moves it all, as without; the log says why.
"""

from __future__ import annotations

import os
import signal
import time

from shim import digests, failpoint, gpu, journal, log, patience
from shim.criu_bridge import freezer
from shim.cuda import discovery
from shim.cuda.errors import CudaError
from shim.cuda.shards import Shard
from shim.cuda.suspension import Process
from shim.manifest import NO_COMPRESSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shim.container import Container, Restore
    from shim.cuda.driver import Driver
    from shim.cuda.suspension import Suspension
    from shim.manifest import Manifest

PREFIX = "lane-"

_FREEZE_SECONDS = 10.0


class NotRefilled(Exception):
    """Device memory is in files and not in its process, which must not run without it. `fact` is
    the text without what to do about it."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}. {advice}")
        self.fact = fact


def write_ahead(
    container: Container, driver: Driver, suspension: Suspension, directory: str
) -> None:
    """Writes the device memory of a container that still runs, its GPU suspended, as far as that is
    worth it; whatever goes wrong is left to `write_and_drop`.

    Raises patience.DiskHangs if nothing can be put into the directory."""
    took = _worth_it(container, suspension)
    if not took:
        return
    try:
        _write(container, driver, took, directory)
    except (CudaError, OSError, failpoint.Reached) as error:
        log.warning(
            "device memory was not written before the freeze", id=container.id, reason=error
        )
        forget(container, suspension, directory)


def forget(container: Container, suspension: Suspension, directory: str) -> None:
    """Takes back what `write_ahead` did. Raises patience.DiskHangs."""
    _begin_anew(suspension)
    patience.within(
        container.config.dump_timeout,
        f"{directory}: the lane's files were not removed",
        lambda: _remove(directory),
    )


def begin_anew(container: Container) -> None:
    """What was written was for another checkpoint, or a draft that is no more. Nothing must be
    dropped."""
    if container.suspension:
        _begin_anew(container.suspension)


def _begin_anew(suspension: Suspension) -> None:
    for process in suspension.processes:
        process.lane = []


def write_and_drop(container: Container, directory: str) -> dict[str, str]:
    """Takes the device memory out of the frozen container's processes and into `directory`, as far
    as that is worth it, can be done, and was not before. The digests of the files by name.

    Raises NotRefilled if a process was left without some of its memory, which is in the files;
    patience.DiskHangs if nothing can be put into the directory."""
    took = _worth_it(container, container.suspension)
    if not took:
        return {}
    with gpu.helper(container.config) as driver:
        try:
            _check(container, driver, took, directory)
            _write(container, driver, [one for one in took if not one.lane], directory)
            began = time.monotonic()
            failpoint.reach("drop")
            journal.note(container, journal.DROPPING)
            for process in took:
                process.dropped_to = directory  # before it is true: see `refill`
            driver.lane_drop(
                container.freezer(),
                [(p.pid, start, end) for p in took for start, end in _spans(p)],
                threads=gpu.threads(container.config),
                timeout=container.config.dump_timeout,
            )
        except (CudaError, OSError, failpoint.Reached) as error:
            log.warning(
                "CRIU is to move the device memory: the lane cannot be used",
                id=container.id,
                reason=error,
            )
            # A helper that was given up may have left it thawed, and files of no process.
            freezer.put_back(container.freezer(), freezer.FROZEN, _FREEZE_SECONDS)
            refill(container)
            assert container.suspension is not None
            forget(container, container.suspension, directory)
            return {}
    container.phases["lane_drop"] = time.monotonic() - began
    container.sizes["lane"] = sum(shard.size for process in took for shard in process.lane)
    log.info(
        "device memory dropped: CRIU is not to see it",
        id=container.id,
        phase="lane",
        seconds=round(container.phases["lane_drop"], 3),
    )
    return {shard.name: shard.digest for process in took for shard in process.lane}


def moved(container: Container, directory: str) -> None:
    """The files are in `directory` now."""
    for process in _dropped(container):
        process.dropped_to = directory


def hold(container: Container) -> None:
    """Opens the files of what is dropped, so that they can be filled in whatever becomes of them
    while the container waits for its Resume. Raises OSError or patience.DiskHangs, with none
    open."""
    paths = {
        shard.name: os.path.join(process.dropped_to, shard.name)
        for process in _dropped(container)
        for shard in process.lane
    }
    if paths:
        container.held = patience.within(
            container.config.dump_timeout,
            "the lane's files were not opened",
            lambda: _opened(paths),
        )


def _opened(paths: dict[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    try:
        for name, path in paths.items():
            found[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        for fd in found.values():
            os.close(fd)
        raise
    return found


def is_dropped(container: Container) -> bool:
    """Whether some process lacks memory that is in files."""
    return bool(_dropped(container))


def refill(container: Container) -> None:
    """Puts back what was dropped; nothing, if nothing was. Can be called again. Raises
    NotRefilled."""
    dropped = _dropped(container)
    if not dropped:
        return
    began = time.monotonic()
    failpoint.reach("refill")
    journal.note(container, journal.REFILLING)
    with gpu.helper(container.config) as driver:
        for process in dropped:
            if not discovery.alive(process.pid, process.start_time):
                process.dropped_to = ""
                continue
            try:
                directory, algorithm = process.dropped_to, digests.algorithm(container.config)
                held = container.held
                _filled(container, driver, process, directory, algorithm, fresh=False, held=held)
            except (CudaError, OSError) as error:
                where = f"{process.dropped_to}/{PREFIX}*"
                if container.held:
                    where += f", which this shim (pid {os.getpid()}) holds open,"
                raise NotRefilled(
                    f"container {container.id}: the device memory of {process} is in "
                    f"{where} and not in the process: {error}",
                    "The container must not run like this, and stays frozen. Remove the cause and "
                    f"resume it: ctr -n {container.namespace} task resume {container.id}",
                ) from error
            process.dropped_to = ""
    container.close_held()
    _log_filled("device memory filled in again", container, began)


def fill_restored(container: Container, found: Restore) -> None:
    """Fills in the regions of restored processes, which stand still. Raises CudaError, and then no
    process may run."""
    assert found.manifest is not None
    wanted = {process.inner: process for process in found.processes if process.lane}
    began = time.monotonic()
    with gpu.helper(container.config) as driver:
        for inner, pid in _pids(container).items():
            process = wanted.pop(inner, None)
            if process is not None:
                process.pid = pid
                algorithm = found.manifest.files[process.lane[0].name].algorithm
                _filled(container, driver, process, found.images, algorithm, fresh=True)
    if wanted:
        lost = ", ".join(map(str, wanted.values()))
        raise CudaError(f"{lost}: not among the restored processes", {})
    _log_filled("device memory filled in", container, began)


def compression(container: Container) -> dict[str, str]:
    """How the files that were written are compressed, and why so, for the manifest; empty where
    they were not to be, or there are none."""
    processes = container.suspension.processes if container.suspension else []
    codecs = {shard.codec for process in processes for shard in process.lane}
    if not codecs or not container.choice:
        return {}
    names = ", ".join(sorted(codecs - {""}))
    return {"algorithm": names or NO_COMPRESSION, "why": container.choice}


def files(manifest: Manifest, *, packed: bool = True) -> set[str]:
    """Those of the lane, where the manifest has the same digest for them, the compressed ones
    among them if `packed`; none if its `cuda_processes` are not as we write them, as whoever
    restores them will find."""
    try:
        shards = [s for plain in manifest.cuda_processes for s in Process.from_dict(plain).lane]
    except (KeyError, TypeError, ValueError):
        return set()
    return {
        shard.name
        for shard in shards
        if shard.name in manifest.files
        and manifest.files[shard.name].digest == shard.digest
        and (packed or not shard.codec)
    }


def forget_digests(manifest: Manifest) -> None:
    """Whoever can guess what was in the memory could find it right by them."""
    _set_digests(manifest, dict.fromkeys(_names(manifest), ""))


def take_digests(manifest: Manifest, directory: str) -> None:
    """Of the decrypted files in `directory`, for `fill_restored` to compare. Raises OSError."""
    names = [name for name in _names(manifest) if name in manifest.files]
    if not names:
        return
    paths = {name: os.path.join(directory, name) for name in names}
    found = digests.take(
        {name: (path, os.stat(path).st_size) for name, path in paths.items()},
        algorithm=manifest.files[names[0]].algorithm,
    )
    for one in found.values():
        if isinstance(one, OSError):
            raise one
    _set_digests(manifest, {name: str(one) for name, one in found.items()})


def _names(manifest: Manifest) -> list[str]:
    return [s.name for one in manifest.cuda_processes for s in Process.from_dict(one).lane]


def _set_digests(manifest: Manifest, found: dict[str, str]) -> None:
    for plain in manifest.cuda_processes:
        shards = Process.from_dict(plain).lane
        for shard in shards:
            shard.digest = found.get(shard.name, shard.digest)
        plain["lane"] = [shard.plain() for shard in shards]


def let_run(container: Container, directory: str) -> None:
    """Has the restored processes go on, but for those that were stopped when they were dumped:
    children before their parents, who might otherwise take notice of a child that has stopped."""
    from shim.criu_bridge import contents, images

    pids = {inner[0]: pid for inner, pid in _pids(container).items()}
    for process in reversed(images.processes(directory)):
        inner = process.pid or 0
        if inner in pids and not contents.was_stopped(directory, inner):
            try:
                os.kill(pids[inner], signal.SIGCONT)
            except ProcessLookupError:
                continue


def _log_filled(message: str, container: Container, began: float) -> None:
    took = container.phases["lane_fill"] = time.monotonic() - began
    log.info(message, id=container.id, phase="lane_fill", seconds=round(took, 3))


def _pids(container: Container) -> dict[tuple[int, ...], int]:
    """Of its processes, by their pids in the container."""
    found = {}
    for pid in container.pids():
        try:
            found[discovery.identify(pid).inner] = pid
        except (OSError, discovery.ProcessGone):
            continue
    return found


def _dropped(container: Container) -> list[Process]:
    processes = container.suspension.processes if container.suspension else []
    return [process for process in processes if process.dropped_to]


def _worth_it(container: Container, suspension: Suspension | None) -> list[Process]:
    """The processes with memory for the lane."""
    if suspension is None or suspension.engine != "driver" or container.config.lane == "off":
        return []
    least = container.config.lane_from
    return [one for one in suspension.processes if one.lane or _regions(one, least)]


def _write(container: Container, driver: Driver, took: list[Process], directory: str) -> None:
    if not took:
        return
    failpoint.reach("lane")
    codec = _codec(container, driver, took[0], directory)
    began = time.monotonic()
    for process in took:
        process.lane = _written(container, driver, process, directory, codec)
    container.phases["lane_write"] = round(time.monotonic() - began, 6)
    log.info(
        "device memory written past CRIU",
        id=container.id,
        phase="lane",
        bytes=sum(shard.size for process in took for shard in process.lane),
        files=sum(len(process.lane) for process in took),
        seconds=round(container.phases["lane_write"], 3),
    )


def _check(container: Container, driver: Driver, took: list[Process], directory: str) -> None:
    """Whether what was written before the freeze is what is there. Raises CudaError or OSError:
    then CRIU is to move it, who reads it now. patience.DiskHangs where nobody can say."""
    before = [process for process in took if process.lane]
    if not before:
        return
    began = time.monotonic()
    patience.within(
        container.config.dump_timeout,
        f"{directory}: the lane's files were not found",
        lambda: [os.stat(os.path.join(directory, s.name)) for p in before for s in p.lane],
    )
    for process in before:
        for shards in _ranges(process.lane):
            driver.lane_check(
                process.pid,
                shards,
                threads=gpu.threads(container.config),
                timeout=container.config.dump_timeout,
            )
    container.phases["lane_check"] = round(time.monotonic() - began, 6)


def _regions(process: Process, least: int) -> list[tuple[int, int]]:
    """What is worth a file of its own."""
    found = discovery.anonymous_memory(process.pid)
    return [
        (start, end)
        for start, end in process.regions
        if end - start >= least and any(s <= start and end <= e for s, e in found)
    ]


def _remove(directory: str) -> None:
    for name in os.listdir(directory):
        if name.startswith(PREFIX):
            os.unlink(os.path.join(directory, name))


def _codec(container: Container, driver: Driver, process: Process, directory: str) -> str:
    """By which all files are to be compressed, by what is found of one process's memory; "" for by
    none. Notes why."""
    settings = container.config
    container.choice = ""
    if settings.lane_compression == "off":
        return ""
    began = time.monotonic()
    codec, container.choice = driver.lane_choose(
        process.pid,
        settings.lane_compression,
        _regions(process, settings.lane_from),
        directory,
        threads=gpu.threads(settings),
        direct=settings.lane_direct,
        timeout=settings.dump_timeout,
    )
    container.phases["lane_choose"] = round(time.monotonic() - began, 6)
    tell = log.info if codec or settings.lane_compression == "auto" else log.warning
    tell(
        f"device memory is compressed by {codec}" if codec else "device memory is not compressed",
        id=container.id,
        reason=container.choice,
    )
    return codec


def _written(
    container: Container, driver: Driver, process: Process, directory: str, codec: str
) -> list[Shard]:
    settings = container.config
    shards: list[Shard] = []
    for number, (start, end) in enumerate(_regions(process, settings.lane_from)):
        shards += driver.lane_write(
            process.pid,
            start,
            end,
            directory,
            f"{PREFIX}{process.inner[0]}-{number}-",
            threads=gpu.threads(settings),
            direct=settings.lane_direct,
            algorithm=digests.algorithm(settings),
            compression=codec,
            timeout=settings.dump_timeout,
        )
    return shards


def _filled(
    container: Container,
    driver: Driver,
    process: Process,
    directory: str,
    algorithm: str,
    *,
    fresh: bool,
    held: Mapping[str, int] = {},
) -> None:
    """`held` are the files, by name, where they are open: then they may be in no directory."""
    for shards in _ranges(process.lane):
        names = shards
        if held:
            directory = f"/proc/{os.getpid()}/fd"
            names = [Shard(str(held[s.name]), s.start, s.size, s.digest, s.codec) for s in shards]
        driver.lane_fill(
            process.pid,
            shards[0].start,
            directory,
            names,
            threads=gpu.threads(container.config),
            fresh=fresh,
            held=bool(held),
            algorithm=algorithm,
            timeout=container.config.dump_timeout,
        )


def _ranges(shards: list[Shard]) -> Iterator[list[Shard]]:
    """Those of one region together."""
    part: list[Shard] = []
    for shard in shards:
        if part and part[-1].start + part[-1].size != shard.start:
            yield part
            part = []
        part.append(shard)
    if part:
        yield part


def _spans(process: Process) -> list[tuple[int, int]]:
    return [(part[0].start, part[-1].start + part[-1].size) for part in _ranges(process.lane)]

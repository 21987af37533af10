"""The manifest of a checkpoint, `grit.json`: its keys, its bytes, and what is wrong with them.

It records who wrote which container's checkpoint from what, with the size and digest of every
file. It is read from storage that others may have written to, so nothing in it is believed before
its type is checked, and no name in it may lead out of the checkpoint's directory.
"""

from __future__ import annotations

from shim.digests import BLOCK, SHA256, XXH3

MANIFEST = "grit.json"
INVENTORY = "inventory.img"  # CRIU writes it last, and begins every restore with it
FORMAT, FORMAT_XXH3, FORMAT_ENCRYPTED, FORMAT_COMPRESSED = 1, 2, 3, 4
"""The second is that of a manifest with XXH3 digests, which a reader of the first cannot check; the
third that of encrypted files, which no other reader should hand to CRIU; the fourth that of
compressed device memory, encrypted or not, which no other reader should put into a process."""
NO_COMPRESSION = "none"
# A manifest has both, so that no single damaged place makes it look like one that has neither.
_SEALED = "self_check"
_SEAL = "sha256_of_the_above"
_SEAL_BEGINS = f',\n  "{_SEAL}": "'.encode()


class CheckpointDirError(Exception):
    """A checkpoint cannot be written or used; says which directory, why, and what to do."""


class ManifestError(CheckpointDirError):
    """The manifest is missing or unusable; names the file and the key that is wrong."""


# By algorithm: its name in `grit.json`, and how many hexadecimal digits it has.
_NAMES = {SHA256: ("sha256", 64), XXH3: ("xxh3_128", 32)}


class File:
    """One file of a checkpoint: its size in bytes and its digest, in hex, as `digests` has it by
    that algorithm: of the contents, or, above `digests.BLOCK` bytes, of the blocks' digests."""

    __slots__ = ("algorithm", "digest", "size")

    def __init__(self, size: int, digest: str, algorithm: str = SHA256) -> None:
        self.size, self.digest, self.algorithm = size, digest, algorithm

    @property
    def key(self) -> str:
        """What the digest is called in `grit.json`: a plain one is what sha256sum prints, or
        xxh128sum."""
        return _key(self.algorithm, self.size)

    def _values(self) -> tuple[int, str, str]:
        return self.size, self.digest, self.algorithm

    def __eq__(self, other: object) -> bool:
        return isinstance(other, File) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"File({self.size}, {self.digest!r}, {self.algorithm!r})"


def _key(algorithm: str, size: int) -> str:
    name, _ = _NAMES[algorithm]
    return name if size <= BLOCK else f"{name}_of_64m_blocks"


class Manifest:
    """What `grit.json` says. `created` (RFC 3339) and `files` are filled in by Draft.publish().

    `engine` is "driver", "plugin" or "none"; `driver_version` is None without a GPU; each of
    `gpus` has a `uuid` and a `name`; `cuda_processes` belongs to the CUDA engine, and is only
    carried here; `cpu` is what `fit.cpu` says, empty where it is not known; `mounts` and `devices`
    are what `injected.recorded` found; `phases` gives the seconds each took; `encryption` has the
    `algorithm` (`sealed.ALGORITHM`), the `key`'s identity and the `id` that the files are bound to,
    and is empty where they are as CRIU wrote them; `compression` has the `algorithm` of the lane's
    files, or NO_COMPRESSION, and `why` it is that, and is empty where there was no question.
    """

    def __init__(
        self,
        *,
        container_id: str,
        namespace: str,
        image: str,
        runtime: str,
        engine: str,
        driver_version: str | None,
        gpus: list[dict[str, str]],
        criu_version: str,
        kernel: str,
        hostname: str,
        options: dict[str, bool | int | str],
        cuda_processes: list[dict[str, object]],
        phases: dict[str, float],
        cpu: dict[str, str] | None = None,
        mounts: list[dict[str, str]] | None = None,
        devices: list[str] | None = None,
        encryption: dict[str, str] | None = None,
        compression: dict[str, str] | None = None,
        created: str = "",
        files: dict[str, File] | None = None,
    ) -> None:
        self.container_id = container_id
        self.namespace = namespace
        self.image = image
        self.runtime = runtime
        self.engine = engine
        self.driver_version = driver_version
        self.gpus = gpus
        self.criu_version = criu_version
        self.kernel = kernel
        self.hostname = hostname
        self.options = options
        self.cuda_processes = cuda_processes
        self.phases = phases
        self.cpu = cpu or {}
        self.mounts = mounts or []
        self.devices = devices or []
        self.encryption = encryption or {}
        self.compression = compression or {}
        self.created = created
        self.files = files or {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Manifest({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def encode(self) -> bytes:
        """The bytes of `grit.json`: indented for people, keys in a telling order, and in the last
        line the SHA-256 of all above it."""
        import json

        document = {
            "format": self._format(),
            _SEALED: "sha256",
            "created": self.created,
            "container": {
                "id": self.container_id,
                "namespace": self.namespace,
                "image": self.image,
            },
            "runtime": self.runtime,
            "engine": self.engine,
            "driver": self.driver_version,
            "gpus": self.gpus,
            "criu": self.criu_version,
            "kernel": self.kernel,
            "hostname": self.hostname,
            "cpu": self.cpu,
            "options": self.options,
            "cuda_processes": self.cuda_processes,
            "mounts": self.mounts,
            "devices": self.devices,
            "phases": self.phases,
            **({"encryption": self.encryption} if self.encryption else {}),
            **({"compression": self.compression} if self.compression else {}),
            "files": {
                name: {"size": file.size, file.key: file.digest}
                for name, file in sorted(self.files.items())
            },
        }
        above = json.dumps(document, indent=2, allow_nan=False).encode().removesuffix(b"\n}")
        return above + _SEAL_BEGINS + _seal_of(above)

    def _format(self) -> int:
        if self.compression.get("algorithm", NO_COMPRESSION) != NO_COMPRESSION:
            return FORMAT_COMPRESSED
        if self.encryption:
            return FORMAT_ENCRYPTED
        plain = all(file.algorithm == SHA256 for file in self.files.values())
        return FORMAT if plain else FORMAT_XXH3

    @classmethod
    def decode(cls, data: bytes, where: str) -> Manifest:
        """Raises ManifestError, in which `where` names the file. Unknown keys are passed over. One
        that was written without a checksum of itself is read without it."""
        document = _Reader(_read_json(data, where), where)
        number = document.integer("format")
        if number not in (FORMAT, FORMAT_XXH3, FORMAT_ENCRYPTED, FORMAT_COMPRESSED):
            raise ManifestError(
                f"{where}: is of format {number}, and this grit reads formats {FORMAT} to "
                f"{FORMAT_COMPRESSED}; restore it with the version of grit that wrote it"
            )
        above, sealed, seal = data.rpartition(_SEAL_BEGINS)
        claimed = sealed or _SEALED in document.value or _SEAL in document.value
        if claimed and seal != _seal_of(above):
            raise ManifestError(_changed(where))
        container = document.table("container")
        return cls(
            created=document.time("created"),
            container_id=container.text("id"),
            namespace=container.text("namespace"),
            image=container.text("image"),
            runtime=document.text("runtime"),
            engine=document.text("engine"),
            driver_version=document.text_or_null("driver"),
            gpus=[
                {"uuid": g.text("uuid"), "name": g.text("name")} for g in document.tables("gpus")
            ],
            criu_version=document.text("criu"),
            kernel=document.text("kernel"),
            hostname=document.text("hostname"),
            cpu=_read_cpu(document),
            options=document.table("options").scalars(),
            cuda_processes=[process.value for process in document.tables("cuda_processes")],
            phases=document.table("phases").numbers(),
            mounts=[_read_mount(mount) for mount in document.tables("mounts", optional=True)],
            devices=document.texts("devices", optional=True),
            encryption=_read_treatment(
                document,
                "encryption",
                ("algorithm", "key", "id"),
                needed=number == FORMAT_ENCRYPTED,
            ),
            compression=_read_treatment(
                document, "compression", ("algorithm", "why"), needed=number == FORMAT_COMPRESSED
            ),
            files=_read_files(document.table("files")),
        )


def _seal_of(above: bytes) -> bytes:
    """What follows `_SEAL_BEGINS`, to the manifest's end."""
    import hashlib

    return hashlib.sha256(above).hexdigest().encode() + b'"\n}\n'


def _changed(where: str) -> str:
    return (
        f"{where}: does not match the checksum in its last line: it is damaged, or was changed by "
        f"hand. Copy the checkpoint again; after a change that is meant, remove {_SEALED} and "
        f"{_SEAL} from it"
    )


class _Reader:
    """A JSON object and the place it has in the manifest, for errors that name the key."""

    def __init__(self, value: dict[str, object], where: str, path: str = "") -> None:
        self.value, self.where, self.path = value, where, path

    def wrong(self, key: str, what: str) -> ManifestError:
        return ManifestError(f"{self.where}: {self.path}{key} {what}")

    def get(self, key: str, *, right: str) -> object:
        if key not in self.value:
            raise self.wrong(key, f"is missing; it must be {right}")
        return self.value[key]

    def text(self, key: str) -> str:
        value = self.get(key, right="a string")
        if not isinstance(value, str):
            raise self.wrong(key, "must be a string")
        return value

    def text_or_null(self, key: str) -> str | None:
        return None if self.get(key, right="a string or null") is None else self.text(key)

    def time(self, key: str) -> str:
        import datetime

        value = self.text(key)
        try:
            datetime.datetime.fromisoformat(value)
        except ValueError:
            raise self.wrong(key, "must be a time as in RFC 3339") from None
        return value

    def integer(self, key: str) -> int:
        value = self.get(key, right="a whole number")
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, "must be a whole number, 0 or above")
        return value

    def table(self, key: str) -> _Reader:
        value = self.get(key, right="an object")
        if not isinstance(value, dict):
            raise self.wrong(key, "must be an object")
        return _Reader(value, self.where, f"{self.path}{key}.")

    def texts(self, key: str, *, optional: bool = False) -> list[str]:
        if optional and key not in self.value:
            return []
        value = self.get(key, right="an array of strings")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "must be an array of strings")
        return value

    def tables(self, key: str, *, optional: bool = False) -> list[_Reader]:
        if optional and key not in self.value:
            return []
        value = self.get(key, right="an array of objects")
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(key, "must be an array of objects")
        return [_Reader(v, self.where, f"{self.path}{key}[{n}].") for n, v in enumerate(value)]

    def scalars(self) -> dict[str, bool | int | str]:
        kept: dict[str, bool | int | str] = {}
        for key, value in self.value.items():
            if not isinstance(value, bool | int | str):
                raise self.wrong(key, "must be true, false, a whole number or a string")
            kept[key] = value
        return kept

    def numbers(self) -> dict[str, float]:
        kept: dict[str, float] = {}
        for key, value in self.value.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise self.wrong(key, "must be a number")
            kept[key] = value
        return kept


def _read_json(data: bytes, where: str) -> dict[str, object]:
    import json

    def not_json(word: str) -> object:
        raise ValueError(f"{word} is not JSON")

    try:
        document = json.loads(data.decode(), parse_constant=not_json)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: must hold a JSON object")
    return document


def _read_cpu(document: _Reader) -> dict[str, str]:
    """Absent or empty where it was not known."""
    if not document.value.get("cpu"):
        return {}
    table = document.table("cpu")
    return {key: table.text(key) for key in ("architecture", "model", "instructions")}


def _read_treatment(
    document: _Reader, name: str, keys: tuple[str, ...], *, needed: bool
) -> dict[str, str]:
    """What was done to the files: {} where there is no word of it, unless the format says so."""
    if name not in document.value and not needed:
        return {}
    table = document.table(name)
    return {key: table.text(key) for key in keys}


def _read_mount(mount: _Reader) -> dict[str, str]:
    kept = {key: mount.text(key) for key in ("destination", "path")}
    kept |= {key: mount.text(key) for key in ("source", "text") if key in mount.value}
    for key in ("destination", "path"):
        # "]" would end the name in CRIU's `external mnt[NAME]:SOURCE`.
        if not kept[key].startswith("/") or ".." in kept[key].split("/") or "]" in kept[key]:
            raise mount.wrong(key, "must be an absolute path without .. and ]")
    return kept


def _read_files(table: _Reader) -> dict[str, File]:
    files = {}
    for name in table.value:
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name:
            raise table.wrong(repr(name), "is not the name of a file within the checkpoint")
        entry = table.table(name)
        size = entry.integer("size")
        algorithm = XXH3 if _key(XXH3, size) in entry.value else SHA256
        file = File(size, entry.text(_key(algorithm, size)), algorithm)
        _, digits = _NAMES[algorithm]
        if len(file.digest) != digits or not set(file.digest) <= set("0123456789abcdef"):
            raise entry.wrong(file.key, f"must be {digits} lower-case hexadecimal digits")
        files[name] = file
    if INVENTORY not in files:
        raise table.wrong(INVENTORY, "is missing, and without it nothing can be restored")
    return files

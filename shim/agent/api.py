"""The API server as the agent sees it: each resource a dict as it is on the wire.

By the official client library, which knows service accounts, kubeconfigs and token renewal. Only
a migration, and a Restore by owner, need more of it than custom resources.
"""

from __future__ import annotations

import functools
import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Object = dict[str, Any]

GROUP, VERSION = "kaito.sh", "v1alpha1"
_CALL_SECONDS = 10
_CONNECTIONS = 8
"""By itself the library keeps five for each processor, and for each kind of resource."""


class ApiError(Exception):
    """The API server did not answer, or with an error. Nothing is known to have changed."""


class Conflict(ApiError):
    """Somebody has changed the resource meanwhile; nothing was written."""


class Unanswered(ApiError):
    """The API server is away, or takes too long."""


class Api:
    """The resources of one kind, by its `plural`, in all namespaces. All raise ApiError. `changed`
    gets each whose status was written, as it then is."""

    def __init__(
        self,
        plural: str,
        kubeconfig: str | None,
        changed: Callable[[Object], None] = lambda one: None,
    ) -> None:
        from kubernetes import client

        self._calls = client.CustomObjectsApi(_client(kubeconfig))
        self._plural = plural
        self._changed = changed

    def list(self) -> tuple[list[Object], str]:
        """All, and the resourceVersion to `wait` from."""
        found = _asked(
            lambda: self._calls.list_cluster_custom_object(
                GROUP, VERSION, self._plural, _request_timeout=_CALL_SECONDS
            )
        )
        return found["items"], found["metadata"]["resourceVersion"]

    def wait(self, version: str, seconds: float) -> None:
        """Until something has changed since `version`, at most `seconds`."""
        from kubernetes import watch

        def first() -> None:
            watcher = watch.Watch()
            for _ in watcher.stream(
                self._calls.list_cluster_custom_object,
                GROUP,
                VERSION,
                self._plural,
                resource_version=version,
                timeout_seconds=max(1, round(seconds)),
                _request_timeout=seconds + _CALL_SECONDS,
            ):
                watcher.stop()
                return

        _asked(first)

    def get(self, namespace: str, name: str) -> Object | None:
        return _or_gone(
            lambda: self._calls.get_namespaced_custom_object(
                GROUP, VERSION, namespace, self._plural, name, _request_timeout=_CALL_SECONDS
            )
        )

    def create(self, one: Object) -> None:
        """Does nothing if there is one of that name already."""
        try:
            _asked(
                lambda: self._calls.create_namespaced_custom_object(
                    GROUP,
                    VERSION,
                    one["metadata"]["namespace"],
                    self._plural,
                    one,
                    _request_timeout=_CALL_SECONDS,
                )
            )
        except Conflict:
            pass

    def put(self, one: Object) -> Object | None:
        """Writes everything but the status, unless somebody was faster (Conflict); None if the
        resource has gone."""
        return self._put(self._calls.replace_namespaced_custom_object, one)

    def put_status(self, one: Object) -> Object | None:
        """As `put`, but writes only the status."""
        found = self._put(self._calls.replace_namespaced_custom_object_status, one)
        if found:
            self._changed(found)
        return found

    def delete(self, one: Object) -> None:
        """Deletes this very resource, not a later one of the same name."""
        from kubernetes import client

        meta = one["metadata"]
        only = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=meta["uid"]))
        _or_gone(
            lambda: self._calls.delete_namespaced_custom_object(
                GROUP,
                VERSION,
                meta["namespace"],
                self._plural,
                meta["name"],
                body=only,
                _request_timeout=_CALL_SECONDS,
            )
        )

    def _put(self, call: Callable[..., Any], one: Object) -> Object | None:
        meta = one["metadata"]
        return _or_gone(
            lambda: call(
                GROUP,
                VERSION,
                meta["namespace"],
                self._plural,
                meta["name"],
                one,
                _request_timeout=_CALL_SECONDS,
            )
        )


class PodsApi:
    """Pods, as far as a migration and the owner of a restored pod need them. All raise ApiError."""

    def __init__(self, kubeconfig: str | None) -> None:
        from kubernetes import client

        self._calls = client.CoreV1Api(_client(kubeconfig))

    def get(self, namespace: str, name: str) -> Object | None:
        def ask() -> Any:
            # Without the client's model of a pod, which knows the fields of its own version only.
            answer = self._calls.read_namespaced_pod(
                name, namespace, _preload_content=False, _request_timeout=_CALL_SECONDS
            )
            return json.loads(answer.data)

        return _or_gone(ask)

    def delete(self, pod: Object) -> None:
        """Has this very pod end as by `kubectl delete`; one that has gone already is no error."""
        from kubernetes import client

        meta = pod["metadata"]
        only = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=meta["uid"]))

        def ask() -> Any:
            return self._calls.delete_namespaced_pod(
                meta["name"],
                meta["namespace"],
                body=only,
                _preload_content=False,
                _request_timeout=_CALL_SECONDS,
            )

        try:
            _or_gone(ask)
        except Conflict:
            pass  # its successor has that name


class EventsApi:
    """Events, as far as they are made. Raises ApiError, Conflict if there is one of that name."""

    def __init__(self, kubeconfig: str | None) -> None:
        from kubernetes import client

        self._calls = client.CoreV1Api(_client(kubeconfig))

    def create(self, event: Object) -> None:
        _asked(
            lambda: self._calls.create_namespaced_event(
                event["metadata"]["namespace"],
                event,
                _preload_content=False,
                _request_timeout=_CALL_SECONDS,
            )
        )


@functools.cache
def _client(kubeconfig: str | None) -> Any:
    """One for all resources: its connections are kept, at most `_CONNECTIONS`."""
    import logging

    from kubernetes import client, config

    try:
        if kubeconfig:
            config.load_kube_config(kubeconfig)
        else:
            config.load_incluster_config()
    except config.ConfigException as error:
        raise ApiError(
            f"no way to the API server: {error}. In a pod a service account is needed, "
            "elsewhere --kubeconfig"
        ) from error
    found = client.Configuration.get_default_copy()
    # The library asks four times what is not answered in time: longer than a claim lasts.
    found.retries = False
    found.connection_pool_maxsize = _CONNECTIONS
    # More are made where more is asked at once, and closed: no news.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return client.ApiClient(found)


class _Gone(ApiError):
    pass


def _or_gone(call: Callable[[], Any]) -> Object | None:
    try:
        found: Object = _asked(call)
    except _Gone:
        return None
    return found


def _of_one(body: Any) -> bool:
    """Whether a 404 is of the object asked for. A server that has just started, or does not serve
    the kind, says 404 too; taken for the other, it would cost the files of a Checkpoint."""
    try:
        told = json.loads(body)
        return bool(told["reason"] == "NotFound" and told["details"]["name"])
    except (ValueError, LookupError, TypeError):
        return False


def _asked(call: Callable[[], Any]) -> Any:
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return call()
    except ApiException as error:
        told = f"the API server answered {error.status} {error.reason}: {error.body or ''}".strip()
        if error.status == 404 and _of_one(error.body):
            raise _Gone(told) from error
        raise (Conflict if error.status == 409 else ApiError)(told) from error
    except (HTTPError, OSError, ValueError) as error:  # ValueError: an answer cut off
        raise Unanswered(f"the API server does not answer: {error}") from error

"""The node agent: what Checkpoint and Restore resources (`kaito.sh/v1alpha1`) ask for is done on
this node.

    python -m shim.agent [--config FILE] [--node NAME] [--address SOCKET] [--kubeconfig FILE]

One runs on each node (a DaemonSet), as root, with containerd's socket, the stores and
/run/containerd mounted. It needs the extra `agent` (`pip install containerd-shim-grit[agent]`) and
in the group kaito.sh list, watch, get, update, delete of checkpoints, list, watch, get, create of
restores, update of the status of both; get of pods (what successors have to share, owners), delete
of pods (migrations), create of events. Pods to save are found in containerd's own records.

    --node        what the node is called in status.nodeName; NODE_NAME, else the host name
    --address     containerd's socket; CONTAINERD_ADDRESS
    --kubeconfig  KUBECONFIG; without it the pod's service account
    --config      TOML, GRIT_AGENT_CONFIG, else /etc/grit/agent.toml where there is one:

        root = "/mnt/grit-agent"     # for a Checkpoint without volumeClaim: this node's directory
        workers = 4                  # checkpoints at the same time
        lease_seconds = 30           # unless renewed, others take the agent for dead
        pod_wait_seconds = 60        # before a Checkpoint whose pod runs nowhere fails
        orphan_seconds = 300         # before a deleted Checkpoint goes without its node's agent
        restore_seconds = 600        # for all containers of a restored pod to come back
        [stores]
        shared = "/mnt/shared"       # for volumeClaim.claimName "shared"; on all nodes the same

A Checkpoint goes Created, Pending (an agent has its pod and holds the claim in status.holder),
Checkpointing, Checkpointed or Failed; the condition `Checkpointed` says why. The pod is saved whole
with the code of `gritctl checkpoint`, into `<store>/<namespace>/<name>/`. With `autoMigration` it
goes on to Submitting and Submitted: a Restore for the controller's next pod is made, this one
deleted.

An agent that was killed and comes back resumes what it had paused and begins again, three times at
most; one that does not come back is failed by another when its claim has run out, and undoes it
when it comes back after all. A finalizer has the files removed with the resource.
`spec.ttlSecondsAfterFinished`, or the annotation `grit.dev/ttl-seconds-after-finished`, deletes it
some time after it has finished.

A Restore goes Created (each agent has it pending), Pending (one has claimed it for a pod that
starts on its node), Restoring (the pod's shim was told), Restored or Failed. Agent and shim speak
through files: shim/intents.py. With the optional webhook (webhook.py) it goes from Created to
Restoring when the pod is made.
"""

#!/bin/sh
# containerd's way into the shim. It runs `delete` at each task's end: while the task's daemon lives,
# or once it has gone and taken its records along, there is nothing to do but the stock shim's own
# `delete`, and Python would take longer to start than that takes in all. Everything else, a daemon
# that was killed above all, is for shim/cli.py, which looks once more.

served() { # whether a living daemon, or none any more, answers for the bundle we are called in
    answer=
    for record in bootstrap.json address; do
        [ -s $record ] || continue
        read -r answer <$record || : # without a newline at its end
        break
    done
    case $answer in *unix:///run/containerd/s/*) ;; *) return 1 ;; esac
    hash=${answer##*unix:///run/containerd/s/}
    group=/run/containerd/grit/${hash%%[!0-9a-f]*}
    [ -d "$group" ] || return 0
    daemon=
    while read -r name pid since; do # shim/group.py: living_process
        [ "$name" = outer ] && daemon=$pid started=$since
    done <"$group/processes"
    [ -n "$daemon" ] && read -r stat <"/proc/$daemon/stat" || return 1
    set -- ${stat##*) } # what follows the program's name: state, parent, ...
    # PF_EXITING: one that is killed closes its sockets, for which we are called, before it is a zombie.
    [ "$1" != Z ] && [ "$1" != X ] && [ $(($7 & 4)) = 0 ] && [ "${20}" = "$started" ]
}

stock= action=
for word; do
    [ "$action" = -publish-binary ] && stock=${word%/*}/containerd-shim-runc-v2
    action=$word
done
# Grit may itself go by the stock shim's name.
if [ "$action" = delete ] && [ -x "$stock" ] && ! [ "$stock" -ef "$0" ] && served 2>/dev/null; then
    exec "$stock" "$@"
fi
# -I, -S: neither the user's environment nor site-packages in the shim's start-up. -W: what a shim
# prints is read by containerd.
exec @PYTHON@ -ISWignore -c '
import sys

del sys.argv[0]  # the next one is the command as it was called
sys.path.append("@PACKAGES@")
from shim.cli import main

sys.exit(main())
' "$0" "$@"

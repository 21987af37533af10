#!/bin/sh
# Installs, by apt, what the tests need and this machine lacks. Says nothing if nothing does.
#   setup.sh PYTHON    the interpreter that development uses
set -eu
python=$1
missing=
need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need mmdebstrap mmdebstrap
need gcc gcc
need git git
need openssl openssl
need nsenter util-linux
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
"$python" -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
[ -n "$missing" ] || exit 0

[ "$(id -u)" = 0 ] || { echo "setup: as root, please: apt-get install$missing" >&2; exit 1; }
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086  # a list
apt-get install -qq -y --no-install-recommends $missing >/dev/null
"$python" -c 'import ensurepip' || {
    echo "setup: $python cannot make virtual environments (no ensurepip); put Debian's own" >&2
    echo "setup: python3 first in PATH" >&2
    exit 1
}

#!/bin/sh
# Run zbackup beside the tools that people would pick instead: sh tests/bench/run.sh [--scale 0.01] [--only NAME] ...
# Installs what it needs (as root, on Debian; else it takes what is there and leaves the others out).
set -eu
cd "$(dirname "$0")/../.."
venv=${ZBACKUP_VENV:-.venv}
python=${PYTHON:-python3}
borg=${BENCH_BORG:-build/bench/borg/bin/borg}

install_packages() {
    # An sshd of the system's own is not wanted: this keeps what is installed here from being started.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "$@"
    rm -f $policy
    trap - EXIT
}

wanted="rsync openssh-client openssh-server restic rsnapshot rdiff-backup iproute2 util-linux procps python3-venv"
# borg 1.4 comes from PyPI and is compiled.
[ -x "$borg" ] || wanted="$wanted gcc g++ python3-dev pkg-config libssl-dev libacl1-dev libxxhash-dev liblz4-dev libzstd-dev"
if [ "$(id -u)" = 0 ] && command -v dpkg-query >/dev/null; then
    missing=
    for package in $wanted; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' || missing="$missing $package"
    done
    # shellcheck disable=SC2086 # a list of words
    [ -z "$missing" ] || install_packages $missing
fi

# The same environment as the tests have.
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! cmp -s tests/requirements.txt "$venv/requirements.done"; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
    cp tests/requirements.txt "$venv/requirements.done"
fi
if [ ! -x "$borg" ]; then
    "$python" -m venv build/bench/borg
    build/bench/borg/bin/python -m pip install --quiet --disable-pip-version-check 'borgbackup==1.4.*' ||
        echo "borg 1.4 could not be installed" >&2
fi
if [ -x "$borg" ]; then
    BENCH_BORG=$(realpath "$borg")
    export BENCH_BORG
fi
exec "$venv/bin/python" tests/bench/bench.py "$@"

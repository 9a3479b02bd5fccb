#!/bin/sh
# Everything a fresh Debian machine with Python lacks: the programs that tests and demo speak to, and .venv.
#
#   tools/setup.sh            programs and .venv
#   tools/setup.sh --python   .venv alone, for lint and types
#
# A second run finds all in place and does nothing. Root gets missing packages installed; anybody else is
# told the one line that does it. PYTHON names the interpreter, python3 by default.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:/usr/sbin:/sbin" # where mkfs.ext4 lives, also for those whose PATH leaves it out

python=${PYTHON:-python3}
venv=.venv
key_file=$venv/.ready

# program:package, one for each Debian package
PROGRAMS="
    qemu-img:qemu-utils
    qemu-system-x86_64:qemu-system-x86
    qemu-storage-daemon:qemu-system-common
    nbdkit:nbdkit
    nbdinfo:libnbd-bin
    fio:fio
    strace:strace
    systemd-analyze:systemd
    nbdsh:python3-libnbd
    nbd-client:nbd-client
    openssl:openssl
    mkfs.ext4:e2fsprogs
    mkfs.xfs:xfsprogs
    rbd:ceph-common
    virsh:libvirt-clients
"

# shellcheck disable=SC2086  # $missing is a list of words
main() {
    check_python
    missing=$(missing_packages "${1:-}")
    if [ -n "$missing" ] && can_install; then
        install_packages $missing
        missing=
    fi
    if has_ensurepip; then
        make_venv
        [ "${1:-}" = --python ] || make_peers
    fi
    if [ -n "$missing" ]; then
        tell_what_to_install $missing
    fi
    has_ensurepip || {
        say "$python has no ensurepip, so no .venv can be made; name another one: make PYTHON=/usr/bin/python3"
        exit 1
    }
}

say() { echo "setup: $*" >&2; }

check_python() {
    command -v "$python" >/dev/null || {
        say "there is no $python here; install Python 3.10 or newer (apt-get install python3), or name one: make PYTHON=…"
        exit 1
    }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        say "lmdbitmap needs Python 3.10 or newer, and $python is none; name a newer one: make PYTHON=python3.12"
        exit 1
    }
}

# Debian keeps ensurepip, without which no venv can be made, in a package of its own.
has_ensurepip() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

missing_packages() {
    has_ensurepip || "$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
    [ "$1" = --python ] && return
    for pair in $PROGRAMS; do
        command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
    done
}

can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

install_packages() {
    say "installing $*"
    log=$(mktemp)
    apt_install "$@" >"$log" 2>&1 || {
        # No package lists yet, or stale ones.
        { apt-get -qq update && apt_install "$@"; } >"$log" 2>&1 </dev/null || {
            cat "$log" >&2
            say "apt-get could not install them, as above; mend that and run make again"
            exit 1
        }
    }
    rm -f "$log"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "$@" </dev/null
}

tell_what_to_install() {
    say "programs are missing. Run this one line, then make again:"
    echo "    sudo apt-get install --yes --no-install-recommends $*" >&2
    if has_ensurepip; then
        say "Or run what does not need them: $venv/bin/pytest skips the rest and says so."
    fi
    exit 1
}

# What .venv was made from. Another interpreter or another folder makes it anew; another pyproject.toml updates it.
base_key() { "$python" -c 'import os, sys; print(sys.hexversion, os.path.realpath(sys.executable), os.getcwd())'; }
full_key() { base_key; cksum pyproject.toml; }

make_venv() {
    exec 9<pyproject.toml && flock 9 # two makes at once: the second waits and finds it done
    if [ "$(full_key)" = "$(cat $key_file 2>/dev/null)" ]; then
        return
    fi
    if [ "$(base_key)" != "$(head -n -1 $key_file 2>/dev/null)" ]; then
        say "making $venv with $("$python" --version)"
        [ ! -L $venv ] || rm $venv # leads to another folder's, which is not ours to clear
        "$python" -m venv --clear $venv
    fi
    say "installing lmdbitmap and its test tools into $venv"
    $venv/bin/python -m pip install -qq --disable-pip-version-check --no-input --editable '.[test]' 9<&- || {
        say "pip could not install them, as above; mend that and run make again"
        exit 1
    }
    full_key >$key_file
}

# The Linux guest of the tests, and newer programs than this machine's. Without Debian's packages there are none, and
# the tests that need them are skipped.
make_peers() {
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
        $venv/bin/python tools/guest.py $venv/guest || say "no guest could be made: its tests will be skipped"
        $venv/bin/python tools/newer.py $venv/newer || say "no newer programs: their tests will be skipped"
    fi
}

main "$@"
